"Free-running policy tuning: processes, resuming, references, guidance, and both papers in one update"
import json
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from arpo_nb.config import Config, preset
from arpo_nb.training.launch import launch
from arpo_nb.systems import load_data, load_reward, load_system
from arpo_nb.training.trainer import train
from doors import notebook as run_notebook, ok, refused, warm
from test_runs import assert_same_training, killed_and_resumed, numbers, weights

TINY = replace(preset('toy', 'loofid'), steps=3, batch_size=4, num_generations=4, save_steps=2)
BUSY = dict(beta=.2, ref_policy='ema', ref_decay=.5, entropy_coef=1e-3, entropy_control='adaptive', mini_batch_size=8, num_iterations=2,
            scale_rewards='batch', top_entropy_quantile=.5) # everything that has a state or looks across processes


@pytest.mark.parametrize('sig, processes', [(signal.SIGTERM, 2), (signal.SIGKILL, 1)])
def test_killed_and_resumed_is_bit_for_bit_the_same(tmp_path, sig, processes):
    "Both papers in one update, and all that has a state"
    cfg = replace(preset('toy', 'vapi_loofid'), batch_size=4, num_generations=4, free_generations=4, update_dropout=True, **{**BUSY, 'mini_batch_size': 4})
    killed_and_resumed(replace(cfg, steps=7, save_steps=3, num_processes=processes), tmp_path, sig)


def test_two_processes_give_the_result_of_one(tmp_path):
    cfg = replace(TINY, **BUSY)
    one = launch(cfg, tmp_path/'one', progress=False)
    with warm(): two = launch(replace(cfg, num_processes=2), tmp_path/'two', progress=False)
    for a, b in zip(numbers(one), numbers(two), strict=True):
        assert a == {k: pytest.approx(v, rel=1e-3, abs=1e-4) for k, v in b.items()}
    assert_same_training(tmp_path/'one', tmp_path/'two', load_system('toy').policy.state_dict(), 1e-2)
    assert 'reward/loo_fid/ema_fid' in one[0] and 'policy/kl' in one[0] and one[-1]['policy/ratio'] != 1


def test_the_gap_of_sampler_and_scorer_is_logged(tmp_path):
    cfg = replace(preset('toy_var', 'var_grpo'), steps=1, batch_size=4, num_generations=4, mini_batch_size=8)
    with warm(): one, two = (launch(replace(cfg, num_processes=n), tmp_path/str(n), progress=False)[0] for n in (1, 2))
    gap = [k for k in one if k.startswith('sampling/')]
    assert len(gap) == 3 and {k: one[k] for k in gap} == pytest.approx({k: two[k] for k in gap}, abs=1e-5)
    assert 0 < one['sampling/sampling_logp_difference/max'] < 1e-3 and one['policy/ratio_deviation_first'] < 1e-5 < one['policy/ratio_deviation']


def test_the_frozen_reference_is_in_no_checkpoint(tmp_path):
    for ref, there in (('frozen', False), ('ema', True)):
        launch(replace(TINY, steps=1, beta=.1, ref_policy=ref), tmp_path/ref, progress=False)
        files = {p.name for p in (tmp_path/ref/'checkpoint').iterdir()}
        assert ('reference.safetensors' in files) == there
        assert len(weights(tmp_path/ref)) == len(load_system('toy').policy.state_dict())


def test_a_moving_reference_moves(tmp_path):
    "After one rollout with decay d, the reference is d of the start and 1-d of the policy"
    launch(replace(TINY, steps=1, beta=.1, ref_policy='ema', ref_decay=.75), tmp_path, progress=False)
    start, now, ref = load_system('toy').policy.state_dict(), weights(tmp_path), load_file(tmp_path/'checkpoint'/'reference.safetensors')
    for k, v in start.items(): torch.testing.assert_close(ref[k], .75*v + .25*now[f'model.{k}'], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('logprob_cfg', ['off', 'guided'])
def test_ratio_is_one_on_the_first_step(tmp_path, logprob_cfg):
    cfg = replace(TINY, steps=2, rollout_cfg_scale=2., logprob_cfg=logprob_cfg)
    if logprob_cfg == 'off':
        with pytest.warns(UserWarning, match='guided distribution, but scored'): rows = launch(cfg, tmp_path, progress=False)
    else: rows = launch(cfg, tmp_path, progress=False)
    assert abs(rows[0]['policy/ratio'] - 1) < 1e-5 and abs(rows[0]['policy/approx_kl']) < 1e-6


def test_both_in_one_update(tmp_path):
    "A mixed run without weight on its free-running half is VA-π; with it, it is something else"
    small = dict(batch_size=8, num_generations=2, steps=2, learning_rate=1e-4)
    vapi = launch(replace(preset('toy', 'vapi'), **small), tmp_path/'vapi', progress=False)
    mixed = replace(preset('toy', 'vapi_loofid'), **small)
    zero = launch(replace(mixed, free_coef=0.), tmp_path/'zero', progress=False)
    both = launch(mixed, tmp_path/'both', progress=False)
    assert zero[-1]['vapi/reward/mean'] == pytest.approx(vapi[-1]['reward/mean'], rel=1e-5)
    a, b, c = (weights(tmp_path/n) for n in ('vapi', 'zero', 'both'))
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a) and not all(torch.allclose(a[k], c[k], atol=1e-5) for k in a)
    assert {'reward/loo_fid', 'reward/class_score', 'vapi/policy/prior_ce'} <= both[0].keys()


def test_a_failing_reward_stops_the_run_and_loses_nothing(tmp_path):
    cfg, system = replace(TINY, steps=6, save_steps=50), load_system('toy')
    inner, calls = load_reward(cfg, system), []
    class Fails:
        together = True
        def __call__(self, images, batch, state=None):
            calls.append(1)
            if len(calls) == 4: raise ValueError('image 3: no face found')
            return inner(images, batch, state)
    with pytest.raises(RuntimeError, match='step 3: image 3: no face found'): train(system, load_data(cfg, system), cfg, tmp_path/'a', reward=Fails(), progress=False)
    assert torch.load(tmp_path/'a'/'checkpoint'/'run.pt')['step'] == 3
    again = load_system('toy')
    train(again, load_data(cfg, again), cfg, tmp_path/'a', reward=Fails(), progress=False) # it fails once
    whole = load_system('toy')
    train(whole, load_data(cfg, whole), cfg, tmp_path/'b', reward=load_reward(cfg, whole), progress=False)
    assert all(torch.equal(x, y) for x, y in zip(again.policy.parameters(), whole.policy.parameters()))


def test_moments_of_another_reference_are_refused(tmp_path):
    launch(replace(TINY, steps=1, rewards='loo_fid'), tmp_path/'a', progress=False)
    state = torch.load(tmp_path/'a'/'checkpoint'/'run.pt')['reward_state']
    cfg, system = replace(TINY, rewards='loo_fid'), load_system('toy')
    reward, images = load_reward(cfg, system), torch.rand(2, 4, 3, 32, 32)
    reward(images, None, state)
    term = reward.rewards['loo_fid'][0]
    term.reference = type(term.reference)(term.reference.mean + 1, term.reference.std)
    with pytest.raises(ValueError, match='reference'): reward(images, None, state)


def test_groups_are_not_split():
    with pytest.raises(ValueError, match='use 1, 2, 3, 4, 6, 12 processes'): Config(method='grpo', rewards='clip', batch_size=12, num_processes=8)


def test_run_loofid_end_to_end(tmp_path):
    ok(run_notebook('run_loofid', steps=2, out_dir=tmp_path/'out', overrides='batch_size=4,num_generations=4', eval_images=60, arms='instance_only, full, raw_sum'))
    summary = json.loads((tmp_path/'out'/'summary.json').read_text())
    assert {'base', 'tuned', 'instance_only', 'full', 'raw_sum'} < set(summary['metrics'])
    assert {'time/generate', 'time/decode', 'time/reward', 'time/update'} <= set(summary['step_s'])


def test_run_var_end_to_end(tmp_path):
    ok(run_notebook('run_var', steps=1, out_dir=tmp_path/'out', overrides='batch_size=4,num_generations=4,mini_batch_size=8', eval_images=60, arms='half_labels, loofid', sweeps='kl'))
    summary = json.loads((tmp_path/'out'/'summary.json').read_text())
    assert set(summary['metrics']) == {'base', 'tuned', 'half_labels', 'loofid'} and set(summary['sweeps']['kl']) == {'kl_0', 'kl_005', 'kl_02', 'kl_1'}


def test_run_brightness_end_to_end(tmp_path):
    ok(run_notebook('run_brightness', steps=2, out_dir=tmp_path/'out', overrides='batch_size=4,num_generations=4,mini_batch_size=8', bright_from=.4, eval_images=80))
    summary = json.loads((tmp_path/'out'/'summary.json').read_text())
    assert set(summary['shares']) == {'base', 'bright', 'dark'} and set(summary['shares']['dark']) == {'0.7', '1.0'} and summary['limits'] == dict(bright=.4, dark=.15)


@pytest.mark.parametrize('notebook, params, message', [
    ('run_var', dict(rewards='x'), 'no reward named'), ('run_loofid', dict(arms='dpo'), "no 'dpo'"), ('run_loofid', dict(overrides='rewards=clop'), 'did you mean'),
    ('run_var', dict(sweeps='group'), "sweeps='group': no 'group'"), ('run_var', dict(arms='half_labels, loofid', num_processes=5), 'arms/loofid: num_processes=5'),
    ('run_brightness', dict(overrides='brightness_threshold=.3'), 'use bright_from and dark_below')])
def test_bad_requests_are_refused_before_any_work(tmp_path, monkeypatch, notebook, params, message):
    assert message in refused(notebook, tmp_path, monkeypatch, out_dir=tmp_path/'out', **params) and not list((tmp_path/'out').rglob('metrics.jsonl'))
