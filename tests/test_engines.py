"Samples of an engine in a run: the policy's own numbers from an exact copy, and engines that answer wrongly or never"
import threading
import time
from dataclasses import replace

import pytest
import torch

from arpo_nb.config import Config
from arpo_nb.maths.grpo import grpo_loss
from arpo_nb.systems import load_data, load_reward, load_system
from arpo_nb.training.engines import PolicyCopy
from arpo_nb.training.trainer import train
from test_runs import numbers, weights

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


def run(cfg, out, **kw):
    system = load_system(cfg.model)
    return train(system, load_data(cfg, system), cfg, out, reward=load_reward(cfg, system), progress=False, **kw)


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


class Recorded:
    "A copy of the policy that notes what happened when, and in the second step waits for the first one's reward"
    has_sampler_logps, scored, notes = True, threading.Event(), []
    def __init__(self, policy):
        self.copy, self.calls = PolicyCopy(policy, 'float32'), 0
        self.scored.clear(); self.notes.clear()
    def sync(self, tensors): self.copy.sync(tensors); self.notes.append('sync')
    def generate(self, cond, streams, **sampling):
        self.calls += 1
        if self.calls == 2: assert self.scored.wait(30), 'the first step waited for the second'
        self.notes.append(f'drew {streams.index[0, 0]}')
        return self.copy.generate(cond, streams, **sampling)


def scoring(reward):
    def scored(images, batch, state=None):
        Recorded.scored.set()
        return reward(images, batch, state)
    return scored


def test_one_step_ahead(tmp_path):
    "The second step's samples are drawn while the first learns, from the weights that the first began with"
    cfg = replace(TINY, steps=3, sampler=f'{__name__}.Recorded', max_staleness=1, learning_rate=1e-3, vllm_importance_sampling_correction=True)
    system = load_system(cfg.model)
    rows = train(system, load_data(cfg, system), cfg, tmp_path, reward=scoring(load_reward(cfg, system)), progress=False)
    assert Recorded.notes == ['sync', 'drew 0', 'drew 3', 'sync', 'drew 6', 'sync'] # nothing after the last
    gaps = [r['sampling/sampling_logp_difference/mean'] for r in rows]
    assert gaps[0] < 1e-5 and min(gaps[1:]) > 1e-4 # a step behind, and it is told
    assert all(r['sampling/importance_sampling_ratio/mean'] == pytest.approx(1, abs=.05) for r in rows)
    alone = run(replace(TINY, steps=1, learning_rate=1e-3), tmp_path/'alone')
    assert rows[0]['reward/mean'] == pytest.approx(alone[0]['reward/mean'], rel=1e-5)


class Failing(PolicyCopy):
    "Exact, and breaks in its call number `at`"
    def __init__(self, policy, at=0): super().__init__(policy, 'float32'); self.at = at
    def generate(self, *args, **kwargs):
        self.at -= 1
        if not self.at: raise OSError('gone')
        return super().generate(*args, **kwargs)


def stop_after_two(step, row, system):
    if step == 1: raise KeyboardInterrupt


def test_what_was_drawn_ahead_comes_back(tmp_path):
    cfg = replace(TINY, steps=4, sampler=f'{__name__}.Failing', max_staleness=1, learning_rate=1e-3, save_steps=1)
    whole = run(cfg, tmp_path/'whole')
    with pytest.raises(KeyboardInterrupt): run(cfg, tmp_path/'cut', callbacks=[stop_after_two])
    assert numbers(run(cfg, tmp_path/'cut')) == numbers(whole)
    a, b = (weights(tmp_path/n) for n in ('whole', 'cut'))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('save_steps', [1, 9]) # found out while a checkpoint is written, or in the step that wants the samples
def test_an_engine_that_fails_ahead(tmp_path, save_steps):
    cfg = replace(TINY, steps=4, sampler=f'{__name__}.Failing', sampler_args='at=3', max_staleness=1, save_steps=save_steps)
    if save_steps == 1:
        with pytest.warns(UserWarning, match='OSError: gone; asked again'): assert len(run(cfg, tmp_path)) == 4
        return
    with pytest.raises(RuntimeError, match='step 2: .*gone'): run(cfg, tmp_path)
    assert [r['step'] for r in run(cfg, tmp_path)] == [0, 1, 2, 3]
