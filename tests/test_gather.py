"Leave-one-out rewards over two real processes equal those of one"
import torch, torch.distributed as dist, torch.multiprocessing as mp

from arpo_nb.maths.moments import Reference
from arpo_nb.rewards import loo_fid_reward

def features(step): return torch.randn(10, 5, generator=torch.Generator().manual_seed(step))*.6 + .2
def reference(): return Reference.from_features(torch.randn(80, 5, generator=torch.Generator().manual_seed(99)))

def gather(x):
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)

def run(covariance, rows=slice(None), gather=None):
    "Rewards of three steps and the last state"
    state, out = None, []
    for step in range(3):
        r, state = loo_fid_reward(features(step)[rows], reference(), state, covariance=covariance, gather=gather)
        out.append(r)
    return torch.stack(out), state

def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/sync', rank=rank, world_size=2)
    results = {}
    for c in ('diag', 'full'):
        rewards, state = run(c, slice(5*rank, 5*rank+5), gather)
        results[c] = rewards, state.mean, state.second
    torch.save(results, f'{folder}/{rank}.pt')
    dist.destroy_process_group()

def test_two_processes_equal_one(tmp_path):
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path/f'{r}.pt') for r in range(2)]
    for c in ('diag', 'full'):
        rewards, state = run(c)
        both = torch.cat([r[c][0] for r in ranks], 1)
        assert torch.allclose(both, rewards, rtol=1e-6, atol=1e-7)
        for r in ranks: assert torch.equal(r[c][1], state.mean) and torch.equal(r[c][2], state.second) # the same bits on every rank
        alone, _ = run(c, slice(0, 5))
        assert not torch.allclose(alone, rewards[:, :5], rtol=.01) # without gathering they would differ
