"Checks of the maths that need files"
import pytest, torch

from arpo_nb.maths.moments import Reference
from arpo_nb.rewards import loo_fid_reward

@pytest.mark.parametrize('covariance', ['diag', 'full'])
def test_state_survives_a_checkpoint(covariance, tmp_path):
    g = torch.Generator().manual_seed(0)
    ref, x = Reference.from_features(torch.randn(50, 4, generator=g)), torch.randn(9, 4, generator=g)
    _, state = loo_fid_reward(x, ref, covariance=covariance)
    torch.save(tuple(state), tmp_path/'state.pt')
    a, _ = loo_fid_reward(x + 1, ref, state, covariance=covariance)
    b, _ = loo_fid_reward(x + 1, ref, torch.load(tmp_path/'state.pt', weights_only=True), covariance=covariance)
    assert torch.equal(a, b)
