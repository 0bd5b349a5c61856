"The run notebooks and the launcher, through the doors users come in by."
import json
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from doors import begin_warm_arpo, notebook, ok, papermill, refused, tiny_bench, warm
from PIL import Image
from safetensors.torch import load_file, save_file

from arpo_nb.config import preset, to_json
from arpo_nb.training.launch import launch, run
from arpo_nb.models.llamagen import GPT
from arpo_nb.models.toy import toy_gpt_config

TINY = replace(preset('toy'), steps=3, batch_size=8, num_generations=2, save_steps=2)


def weights(folder): return load_file(folder/'checkpoint'/'model.safetensors')


def numbers(rows): return [{k: v for k, v in r.items() if not k.startswith('time/')} for r in rows]


def assert_same_training(one, two, base, rel):
    "Weights moved alike: sums in another order differ by rounding, which Adam enlarges where a gradient is next to nothing, so each tensor is compared with how far it moved"
    for k, w in weights(one).items():
        moved = (w - base[k.removeprefix('model.')]).norm()
        assert moved > 0 and (w - weights(two)[k]).norm() < rel*moved, k


def test_two_processes_give_the_result_of_one(tmp_path):
    cfg = replace(TINY, noise_rate=.3, micro_batch_size=3, mini_batch_size=4, num_iterations=2)
    one = launch(cfg, tmp_path/'one', progress=False)
    with warm(): two = launch(replace(cfg, num_processes=2), tmp_path/'two', progress=False)
    for a, b in zip(numbers(one), numbers(two), strict=True):
        assert a == {k: pytest.approx(v, rel=1e-4, abs=1e-5) for k, v in b.items()}
    assert_same_training(tmp_path/'one', tmp_path/'two', load_file(ROOT/'arpo_nb/assets/policy.safetensors'), 1e-3)


def test_as_many_processes_as_the_configuration_says(tmp_path):
    with pytest.raises(ValueError, match='num_processes=2: 1 processes were started'): run(replace(TINY, num_processes=2), tmp_path)


def begin(folder): return begin_warm_arpo('train', folder/'job.json', '--out_dir', folder/'run')


@pytest.mark.parametrize('sig, processes', [(signal.SIGTERM, 1), (signal.SIGKILL, 1)])
def test_killed_and_resumed_is_bit_for_bit_the_same(tmp_path, sig, processes):
    killed_and_resumed(replace(TINY, steps=12, save_steps=3, update_dropout=True, num_processes=processes), tmp_path, sig)


def killed_and_resumed(cfg, tmp_path, sig):
    "A run killed after four steps and resumed against an unbroken one"
    for name in ('whole', 'killed'):
        (tmp_path/name).mkdir(); (tmp_path/name/'job.json').write_text(to_json(cfg))
    ok(begin(tmp_path/'whole').wait())
    child = begin(tmp_path/'killed')
    log, deadline = tmp_path/'killed'/'run'/'metrics.jsonl', time.time() + 120
    while not (log.exists() and len(log.read_text().splitlines()) >= 4):
        assert child.poll() is None and time.time() < deadline
        time.sleep(.02)
    child.send_signal(sig); child.wait()
    assert len(log.read_text().splitlines()) < cfg.steps, 'finished before it was killed'
    ok(begin(tmp_path/'killed').wait())
    a, b = (weights(tmp_path/n/'run') for n in ('whole', 'killed'))
    assert all(torch.equal(a[k], b[k]) for k in a)
    logged = lambda folder: numbers(json.loads(line) for line in (folder/'run'/'metrics.jsonl').read_text().splitlines())
    assert logged(tmp_path/'whole') == logged(tmp_path/'killed')


def test_run_vapi_end_to_end(tmp_path):
    small = dict(steps=2, out_dir=tmp_path/'out', overrides='batch_size=8,num_generations=2', eval_images=40, baselines='mle,ste_gumbel,tokenizer,no_prior,token_credit')
    ok(papermill('run_vapi', tmp_path/'a.ipynb', **small))
    out = tmp_path/'out'
    summary = json.loads((out/'summary.json').read_text())
    assert (summary['model'], summary['method'], summary['seed']) == ('toy', 'vapi', 0) and summary['wall_s'] > 0
    arms = {'base', 'tuned', 'mle', 'ste_gumbel', 'tokenizer', 'no_prior', 'token_credit'}
    assert arms < set(summary['metrics']) and any('temperature' in k for k in summary['metrics'])
    for m in summary['metrics'].values(): assert {'fid', 'inception_score', 'precision', 'recall', 'accuracy'} <= set(m)
    assert len((out/'metrics.jsonl').read_text().splitlines()) == 2
    for f in ('config.json', 'samples.png', 'curves.png', 'checkpoint/model.safetensors', 'checkpoint/optimizer.bin'): assert (out/f).exists(), f
    ok(notebook('run_vapi', **{**small, 'baselines': 'mle'})) # finished runs are not made again
    second = json.loads((out/'summary.json').read_text())
    assert second['metrics'] == {k: summary['metrics'][k] for k in second['metrics']} and 'mle' in second['metrics']
    ok(notebook('run_vapi', **{**small, 'baselines': 'none', 'out_dir': tmp_path/'from', 'weights': out/'checkpoint', 'steps': 1}))
    assert json.loads((tmp_path/'from'/'summary.json').read_text())['metrics']['base'] == summary['metrics']['tuned']


def test_own_pictures(tmp_path):
    for i in range(12):
        folder = tmp_path/'pictures'/('ab'[i % 2]); folder.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (40 + i, 60), (20*i, 100, 255 - 20*i)).save(folder/f'{i}.png')
    (tmp_path/'pictures'/'a'/'broken.jpg').write_bytes(b'\xff\xd8 no')
    done = notebook('run_vapi', steps=1, data=tmp_path/'pictures', out_dir=tmp_path/'out', overrides='batch_size=4,num_generations=2', eval_images=0, baselines='none')
    assert 'skipped 1 unreadable' in ok(done).stdout + done.stderr


@pytest.mark.parametrize('params, message', [
    (dict(model='toyy'), "did you mean 'toy'"), (dict(method='ppo'), 'choose one of vapi'), (dict(overrides='noise_rate=2'), 'ξ is a probability'),
    (dict(overrides='num_generations=1'), 'at least 2 samples'), (dict(data='nowhere'), "data='nowhere': no such file or folder"), (dict(baselines='dpo'), "no 'dpo'"),
    (dict(weights='nowhere.pt'), 'no such file'), (dict(model='llamagen_xxl'), 'c2i_XXL_384.pt'), (dict(num_processes=3), 'must divide batch_size=128'),
    (dict(weights='other.safetensors'), 'does not fit: it looks like a LlamaGen transformer with 3 layers of width 32'),
    (dict(out_dir='taken'), 'holds another run'), (dict(out_dir='file/below'), "can't write there")], ids=lambda x: next(iter(x)) + '-' + str(next(iter(x.values()))) if isinstance(x, dict) else '')
def test_bad_requests_fail_at_once(tmp_path, monkeypatch, params, message):
    (tmp_path/'taken').mkdir(); (tmp_path/'taken'/'config.json').write_text(to_json(replace(preset('toy'), seed=5)))
    (tmp_path/'file').touch()
    save_file(GPT(toy_gpt_config(dim=32)).state_dict(), tmp_path/'other.safetensors')
    assert message in refused('run_vapi', tmp_path, monkeypatch, **{'out_dir': 'fresh', 'steps': 1, **params})
    assert not list(tmp_path.rglob('checkpoint')) and sorted(p.name for p in (tmp_path/'taken').iterdir()) == ['config.json']


def test_run_pretrain(tmp_path):
    ok(notebook('run_pretrain', out_dir=tmp_path/'base', a_epochs=.03, b_epochs=.03, vq_epochs=.03, policy_epochs=.03))
    for name in ('net_a', 'net_b', 'vq', 'policy', 'reference'): assert (tmp_path/'base'/f'{name}.safetensors').exists()
    same_shapes(tmp_path/'base', ['net_a', 'net_b', 'vq', 'policy'])


def same_shapes(folder, names):
    "What a pretraining run makes fits what is shipped"
    for name in names:
        made, shipped = ({k: (v.shape, v.dtype) for k, v in load_file(d/f'{name}.safetensors').items()} for d in (folder, ROOT/'arpo_nb/assets'))
        assert made == shipped, name


def test_run_pretrain_var(tmp_path):
    ok(notebook('run_pretrain_var', out_dir=tmp_path/'base', num_images=128, num_test=50, vq_epochs=.5, policy_epochs=2., num_samples=20))
    same_shapes(tmp_path/'base', ['var_vq', 'var_policy'])


def test_run_bench(tmp_path):
    ok(tiny_bench(image_size=64, num_generations=2, repeats=1, growth=2, growth_model='toy', processes=1, out_dir=tmp_path/'bench'))
    summary = json.loads((tmp_path/'bench'/'summary.json').read_text())
    assert summary['ratio'] > 0 and summary['gradient_difference'] < 1e-3
    grown = json.loads((tmp_path/'bench'/'growth.json').read_text())
    assert len(grown) == 15 and all(c['sizes'][1] > c['sizes'][0] and len(c['costs']) == 2 for c in grown.values())
