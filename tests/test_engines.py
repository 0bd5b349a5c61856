"Samples of an engine in a run: the policy's own numbers from an exact copy, and engines that answer wrongly or never"
import time
from dataclasses import replace

import pytest
import torch

from arpo_nb.config import Config
from arpo_nb.maths.grpo import grpo_loss
from arpo_nb.systems import load_data, load_reward, load_system
from arpo_nb.training.trainer import train

TINY = Config(model='toy_var', method='grpo', rewards='class_score', steps=2, batch_size=3, num_generations=3, learning_rate=1e-4)


class Uniform:
    "Tokens that have nothing to do with the policy, and the truth about them"
    has_sampler_logps = True
    def __init__(self, policy, wait_at=0): self.t, self.v, self.calls, self.wait_at = policy.num_tokens, policy.vocab_size, 0, wait_at
    def sync(self, named_tensors): self.weight = {n: t.clone() for n, t in named_tensors}['head.weight']
    def generate(self, cond, streams, *, return_logps=False, **sampling):
        self.calls += 1
        if self.calls == self.wait_at: time.sleep(60)
        tokens = (streams.uniform(self.t)*self.v).long()
        return tokens, torch.full(tokens.shape, -1.)*torch.tensor(float(self.v)).log()


def run(cfg, out):
    system = load_system(cfg.model)
    return train(system, load_data(cfg, system), cfg, out, reward=load_reward(cfg, system), progress=False)


def test_an_exact_copy_changes_nothing(tmp_path):
    alone = run(TINY, tmp_path/'alone')
    copied = run(replace(TINY, sampler='PolicyCopy', sampler_args='dtype=float32', vllm_importance_sampling_correction=True), tmp_path/'copy')
    for a, b in zip(alone, copied):
        assert b['sampling/importance_sampling_ratio/mean'] == pytest.approx(1, abs=1e-4)
        for k in a:
            if not k.startswith(('time/', 'sampling/')): assert a[k] == pytest.approx(b[k], rel=1e-4, abs=1e-5), k
    assert alone[1]['policy/rollout_entropy'] != alone[0]['policy/rollout_entropy'] # the copy followed an update


def test_another_distribution_shows_and_is_weighed(tmp_path):
    cfg = replace(TINY, sampler=f'{__name__}.Uniform', steps=1)
    plain = run(cfg, tmp_path/'plain')[0]
    weighed = run(replace(cfg, vllm_importance_sampling_correction=True, vllm_importance_sampling_clip_max=.5), tmp_path/'weighed')[0]
    assert plain['sampling/sampling_logp_difference/mean'] == weighed['sampling/sampling_logp_difference/mean'] > .1
    low, mean, high = (weighed[f'sampling/importance_sampling_ratio/{k}'] for k in ('min', 'mean', 'max'))
    assert 0 < low < mean < high <= .5
    assert weighed['optim/grad_norm'] < plain['optim/grad_norm']


def test_never_ends_the_run(tmp_path):
    cfg = replace(TINY, sampler=f'{__name__}.Uniform', sampler_args='wait_at=2', sampler_timeout=1., save_steps=1)
    start = time.perf_counter()
    with pytest.raises(RuntimeError, match='step 1: sampler=.*no answer from generate in 1 s'): run(cfg, tmp_path)
    assert time.perf_counter() - start < 45 and (tmp_path/'checkpoint').is_dir()


@pytest.mark.parametrize('loss_type', ['grpo', 'dapo', 'cispo', 'sapo'])
def test_weights_multiply_the_policy_term_alone(loss_type):
    torch.manual_seed(0)
    old, ref, a = (torch.randn(2, 3, 4) for _ in range(3))
    def gradient(**kw):
        logps = old.clone().requires_grad_()
        grpo_loss(logps, old, a, loss_type=loss_type, **kw)[0].backward()
        return logps.grad
    w = torch.rand(2, 3, 4)
    torch.testing.assert_close(gradient(sampling_ratio=w), gradient()*w)
    kl = gradient(ref_logps=ref, beta=.3) - gradient()
    torch.testing.assert_close(gradient(sampling_ratio=w, ref_logps=ref, beta=.3), gradient()*w + kl)


def test_another_process_draws_the_same(tmp_path):
    alone = run(replace(TINY, steps=1), tmp_path/'alone')[0]
    there = run(replace(TINY, steps=1, sampler='OtherProcess', sampler_args='dtype=float32'), tmp_path/'there')[0]
    assert there['sampling/sampling_logp_difference/max'] < 1e-4 # its own account of what it drew with
    for k in alone:
        if not k.startswith(('time/', 'sampling/')): assert alone[k] == pytest.approx(there[k], rel=1e-4, abs=1e-5), k
