"A run on its way: watched, kept, extended, begun elsewhere, stopped for a reason"
import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from accelerate.tracking import GeneralTracker
from conftest import ROOT
from safetensors.torch import load_file
from test_run_life import CFG, DATA, FREE, Bright, go, same_weights, tiny

from arpo_nb.config import Config, preset
from arpo_nb.rewards import WeightedSum
from arpo_nb.specs import find_model, resolve
from arpo_nb.systems import load_shapes, load_system
from arpo_nb.training.export import export, push
from arpo_nb.training.launch import launch, run
from arpo_nb.training.run_folder import read_rows
from arpo_nb.training.saving import find_checkpoint, read_run, snapshots


class Lines(GeneralTracker):
    name, requires_logging_directory, made = 'lines', False, []
    def __init__(self): super().__init__(); self.rows, self.images, self.done = [], [], False; Lines.made.append(self)
    @property
    def tracker(self): return self
    def store_init_configuration(self, values): self.config = values
    def log(self, values, step=None, **kw): self.rows.append((step, values))
    def log_images(self, values, step=None, **kw): self.images.append((step, {k: v.shape for k, v in values.items()}))
    def finish(self): self.done = True


def stops_at_two(step, row, system): return step == 2


# --- watched

def test_trackers_get_what_the_log_gets(tmp_path):
    rows = go(tmp_path/'x', replace(CFG, log_with='test_watched_runs:Lines', tracker_project='here', sample_every=3))
    t = Lines.made[-1]
    assert t.done and t.config['learning_rate'] == CFG.learning_rate and t.config['epsilon_high'] == 'None'
    assert [(s, v) for s, v in t.rows] == [(r['step'], {k: v for k, v in r.items() if k != 'step'}) for r in rows]
    assert [s for s, _ in t.images] == [0, 3, 6]
    with pytest.raises(ValueError, match="log_with='wanbd': no such tracker; choose from"): go(tmp_path/'y', replace(CFG, log_with='wanbd'))
    assert not (tmp_path/'y'/'metrics.jsonl').exists()


def test_tensorboard_through_accelerate(tmp_path):
    pytest.importorskip('tensorboard')
    go(tmp_path, replace(CFG, steps=2, log_with='tensorboard'))
    assert list((tmp_path/'logs').rglob('events.out.tfevents*'))


def test_grids_of_fixed_seeds(tmp_path):
    cfg = replace(CFG, sample_every=2)
    whole, again = tiny(), tiny()
    go(tmp_path/'x', cfg, whole)
    names = sorted(p.name for p in (tmp_path/'x'/'samples').iterdir())
    assert names == [f'{i:06d}.png' for i in (0, 2, 4, 6)]
    first, last = (np.array(Image.open(tmp_path/'x'/'samples'/names[i])) for i in (0, -1))
    assert first.shape == last.shape == (8, 4*9 - 1, 3) and not np.array_equal(first, last)
    go(tmp_path/'y', CFG, again) # watching changes nothing
    assert same_weights(whole.policy, again.policy)
    go(tmp_path/'z', replace(cfg, steps=4)); other = np.array(Image.open(tmp_path/'z'/'samples'/'000004.png'))
    assert np.array_equal(other, np.array(Image.open(tmp_path/'x'/'samples'/'000004.png')))


def test_evaluation_callbacks_and_early_stopping(tmp_path):
    seen, values = [], iter([5., 4., 6., 7., 8.])
    cfg = replace(CFG, steps=40, eval_every=2, metric_for_best_model='eval/fid', greater_is_better=False, early_stopping_patience=2)
    kw = dict(evaluate=lambda s: dict(fid=next(values)), callbacks=[lambda step, row, system: seen.append((step, row.get('eval/fid'), system.name))])
    rows = go(tmp_path, cfg, **kw)
    assert len(rows) == 8 and seen == [(i, {1: 5., 3: 4., 5: 6., 7: 7.}.get(i), 'tiny') for i in range(8)]
    state = read_run(find_checkpoint(tmp_path, verify=True))
    assert state['step'] == 8 and state['ended'].startswith('eval/fid has not been better than 4')
    assert len(go(tmp_path, cfg, **kw)) == 8 # it has ended
    assert 'ends after step 7: eval/fid has not been better' in (tmp_path/'run.log').read_text()
    with pytest.raises(ValueError, match='eval_every=2: nothing measures'): go(tmp_path/'y', replace(cfg, early_stopping_patience=0))
    with pytest.raises(ValueError, match="metric_for_best_model='fid': no such metric"): go(tmp_path/'z', replace(CFG, metric_for_best_model='fid', early_stopping_patience=1))


def test_what_was_best_is_not_forgotten(tmp_path):
    cfg = replace(CFG, steps=9, eval_every=1, metric_for_best_model='eval/x', early_stopping_patience=4, save_steps=1)
    class Power(Exception): pass
    def cut(step, row, system):
        if step == 2: raise Power
    seen = iter([3., 2., 1.])
    with pytest.raises(Power): go(tmp_path, cfg, evaluate=lambda s: dict(x=next(seen)), callbacks=[cut])
    left = iter([1., 0., -1.]) # step 2 again: it was never saved
    assert len(go(tmp_path, cfg, evaluate=lambda s: dict(x=next(left)))) == 5


def test_a_callback_ends_a_run_by_name_and_by_object(tmp_path):
    assert len(go(tmp_path/'x', replace(CFG, callbacks='test_watched_runs:stops_at_two'))) == 3
    assert len(go(tmp_path/'y', CFG, callbacks=[stops_at_two])) == 3
    with pytest.raises(ValueError, match='objects stay in this process'): launch(replace(preset('toy'), num_processes=2), tmp_path/'z', callbacks=[stops_at_two])


def test_the_toy_is_measured_by_its_own_metric(tmp_path):
    cfg = replace(preset('toy'), steps=2, batch_size=8, num_generations=2, eval_every=2, eval_images=64)
    rows = run(cfg, tmp_path, progress=False)
    assert 'eval/fid' not in rows[0] and {'eval/fid', 'eval/accuracy'} <= rows[1].keys()


def test_a_log_per_run(tmp_path):
    with pytest.warns(UserWarning, match='teaches nothing'): go(tmp_path, replace(FREE, steps=1), reward=lambda images, batch, state=None: (torch.ones(images.shape[:2]), state))
    text = (tmp_path/'run.log').read_text()
    assert 'process 0 of 1' in text and 'warning: step 0: all rewards are equal' in text and 'checkpoint after step 0' in text
    with pytest.raises(RuntimeError): go(tmp_path/'y', FREE, reward=Bright(at=1, error=RuntimeError('no answer')))
    assert 'no answer' in (tmp_path/'y'/'run.log').read_text()


def test_every_term_of_a_reward_is_told(tmp_path):
    one, two = Bright(), lambda images, batch, state=None: (images[:, :, 0].mean((-2, -1)), state)
    rows = go(tmp_path, replace(FREE, steps=2), reward=WeightedSum(dict(a=(one, 1.), b=(two, .5))))
    for r in rows:
        for n, w in dict(a=1., b=.5).items():
            assert r[f'reward/{n}_say'] == pytest.approx(w*r[f'reward/{n}_std']) and r[f'time/reward/{n}'] >= 0 and f'reward/{n}' in r


# --- kept

def test_snapshots_and_their_limit(tmp_path):
    system = tiny()
    go(tmp_path, replace(CFG, keep_every=1, save_total_limit=3), system)
    assert [p.name for p in snapshots(tmp_path)] == ['000004', '000005', '000006']
    last = snapshots(tmp_path)[-1]
    assert sorted(p.name for p in last.iterdir()) == ['manifest.json', 'policy.safetensors', 'run.pt']
    plain = load_file(last/'policy.safetensors')
    assert plain.keys() == system.policy.state_dict().keys() and all(torch.equal(plain[k], v) for k, v in system.policy.state_dict().items())
    beside = load_file(tmp_path/'checkpoint'/'policy.safetensors')
    assert all(torch.equal(plain[k], beside[k]) for k in plain)


def test_a_foreign_snapshot_stays(tmp_path):
    (tmp_path/'snapshots'/'000001').mkdir(parents=True); (tmp_path/'snapshots'/'000001'/'diary.txt').write_text('x')
    with pytest.raises((FileExistsError, RuntimeError), match='no run wrote it'): go(tmp_path, replace(CFG, keep_every=1, save_total_limit=1))
    assert (tmp_path/'snapshots'/'000001'/'diary.txt').read_text() == 'x'


def test_the_average_follows_and_comes_back(tmp_path):
    cfg = replace(CFG, ema_decay=.5, save_steps=3)
    by_hand, path = tiny().policy, []
    go(tmp_path/'x', cfg, callbacks=[lambda i, r, s: path.append([p.detach().clone() for p in s.policy.parameters()])])
    want = [p.detach().clone() for p in by_hand.parameters()]
    for step in path: want = [a.lerp(b, .5) for a, b in zip(want, step)]
    got = load_file(tmp_path/'x'/'checkpoint'/'ema.safetensors')
    for (name, _), w in zip(by_hand.named_parameters(), want): assert torch.allclose(got[name], w, atol=1e-6), name
    class Power(Exception): pass
    def cut(i, r, s):
        if i == 4: raise Power
    with pytest.raises(Power): go(tmp_path/'y', cfg, callbacks=[cut])
    go(tmp_path/'y', cfg)
    again = load_file(tmp_path/'y'/'checkpoint'/'ema.safetensors')
    assert all(torch.equal(got[k], again[k]) for k in got)


# --- extended, and begun elsewhere

def test_more_steps_continue_a_run(tmp_path):
    a, b = tiny(), tiny()
    go(tmp_path/'x', replace(CFG, steps=4)); rows = go(tmp_path/'x', CFG, a); go(tmp_path/'y', CFG, b)
    assert same_weights(a.policy, b.policy) and [r['step'] for r in rows] == list(range(6))
    assert json.loads((tmp_path/'x'/'config.json').read_text())['steps'] == 6
    with pytest.raises(FileExistsError, match='steps 6 → 4'): go(tmp_path/'x', replace(CFG, steps=4))


@pytest.mark.parametrize('changes, why', [(dict(lr_scheduler_type='cosine'), 'falls to zero at the last step'), (dict(entropy_coef=.1, entropy_control='schedule'), 'share of steps made')])
def test_a_schedule_that_knows_its_end_is_begun_anew(tmp_path, changes, why):
    "Not extended without a word; by an option in the same folder, warm-up and all, again and again"
    cfg = replace(FREE if 'entropy_coef' in changes else CFG, steps=2, warmup_steps=1, **changes)
    kw = dict(reward=Bright()) if 'entropy_coef' in changes else {}
    rates = [r['optim/lr'] for r in go(tmp_path, cfg, **kw)]
    with pytest.raises(FileExistsError, match=f'steps 2 → 4: .*{why}.*schedule_start=2'): go(tmp_path, replace(cfg, steps=4), **kw)
    with pytest.raises(FileExistsError, match='steps 2 → 4'): go(tmp_path, replace(cfg, steps=4, schedule_start=1), **kw)
    class Power(Exception): pass
    def cut(*_): raise Power
    for start in (2, 4):
        more = replace(cfg, steps=start + 2, schedule_start=start)
        with pytest.raises(Power): go(tmp_path, more, callbacks=[cut], **kw) # before it has a checkpoint of its own
        rows = go(tmp_path, more, **kw)
        assert [r['step'] for r in rows] == list(range(start + 2)) and [r['optim/lr'] for r in rows[start:]] == rates
    with pytest.raises(ValueError, match='schedule_start=2: the run is at step 0; let it come to its end'): go(tmp_path/'new', replace(cfg, steps=4, schedule_start=2), **kw)


def test_begin_at_a_checkpoint_or_at_kept_weights(tmp_path):
    go(tmp_path/'x', replace(CFG, keep_every=2, steps=4))
    whole, exact, fresh = tiny(), tiny(), tiny()
    go(tmp_path/'whole', CFG, whole)
    rows = go(tmp_path/'y', replace(CFG, resume_from_checkpoint=str(tmp_path/'x')), exact)
    assert same_weights(whole.policy, exact.policy) and [r['step'] for r in rows] == [4, 5]
    cfg = replace(CFG, learning_rate=1e-3, resume_from_checkpoint=str(tmp_path/'x'/'snapshots'/'000002'))
    with pytest.warns(UserWarning, match='moments start at zero'): rows = go(tmp_path/'z', cfg, fresh)
    assert [r['step'] for r in rows] == [2, 3, 4, 5] and not same_weights(whole.policy, fresh.policy)
    assert len(go(tmp_path/'z', cfg)) == 4 # its own checkpoint goes first
    with pytest.raises(FileNotFoundError, match='holds no run.pt'): go(tmp_path/'n', replace(CFG, resume_from_checkpoint=str(tmp_path)))
    with pytest.raises(ValueError, match='is at step 4 already'): go(tmp_path/'m', replace(CFG, steps=4, resume_from_checkpoint=str(tmp_path/'x')))


# --- what came free is what is trained

def test_a_policy_that_comes_partly_frozen_stays_so(tmp_path):
    system, before = tiny(), tiny()
    system.policy.requires_grad_(False); system.policy.output.weight.requires_grad_(True)
    go(tmp_path, replace(CFG, weight_decay=.1), system)
    moved = {n for (n, a), b in zip(system.policy.named_parameters(), before.policy.parameters()) if not torch.equal(a, b)}
    assert moved == {'output.weight'}
    go(tmp_path/'again', replace(CFG, method='tokenizer', num_generations=1), system)
    assert not any(p.requires_grad for p in system.policy.parameters())


# --- handed on

def recorded(name):
    data = json.loads((ROOT/'tests'/'golden'/name).read_text())['state_dict']
    return {k: list(v['shape'] if isinstance(v, dict) else v) for k, v in data.items()}


def shapes(state): return {k: list(v.shape) for k, v in state.items()}


@pytest.mark.parametrize('model, manifest, unwrap', [
    ('llamagen_b', 'llamagen/manifests/GPT-B_c2i_256.json', lambda c: c['model']), ('llamagen_xxl', 'llamagen/manifests/GPT-XXL_c2i_384.json', lambda c: c['model']),
    ('llamagen_t2i_xl', 'llamagen/manifests/GPT-XL_t2i_256.json', lambda c: c['model']), ('var_d16', 'var/manifests/var_d16.json', lambda c: c),
    ('vqgan_cin', 'vqgan/manifests/cin_transformer.json', lambda c: c['state_dict'])])
def test_exports_have_the_official_names_and_shapes(model, manifest, unwrap):
    "At the published sizes, on the meta device: the official class loads them strictly"
    system = load_shapes(model, perceptual=False)
    contents = resolve(find_model(model).export)(system)
    assert shapes(unwrap(contents)) == recorded(manifest)


@pytest.mark.parametrize('layout', ['official', 'transformers'])
def test_janus_is_whole_in_both_layouts(layout):
    pytest.importorskip('transformers')
    base = {k: torch.empty(s, device='meta') for k, s in recorded(f'janus/manifests/Janus-Pro-1B_{layout}.json').items()}
    system = load_shapes('janus_pro_1b', perceptual=False)
    made = resolve(find_model('janus_pro_1b').export)(system, base=base, layout=layout)
    assert shapes(made) == shapes(base)
    ours = sum(p.numel() for p in system.policy.state_dict().values())
    replaced = [k for k in made if made[k] is not base[k]]
    assert sum(made[k].numel() for k in replaced) == ours


def test_export_and_back(tmp_path):
    cfg = replace(preset('toy'), steps=1, batch_size=8, num_generations=2)
    run(cfg, tmp_path/'run', progress=False)
    tuned = load_file(tmp_path/'run'/'checkpoint'/'policy.safetensors')
    for name in 'a.pt', 'a.safetensors', 'a':
        policy = load_system('toy', str(export(tmp_path/'run', tmp_path/name)), perceptual=False).policy
        assert all(torch.equal(v, tuned[k]) for k, v in policy.state_dict().items())
    with pytest.raises(FileExistsError, match='already there'): export(tmp_path/'run', tmp_path/'a.pt')
    loaded = load_system('toy', str(tmp_path/'run'), perceptual=False).policy.state_dict()
    assert all(torch.equal(v, tuned[k]) for k, v in loaded.items())


def test_push_and_pull(tmp_path, monkeypatch):
    import shutil
    import arpo_nb.weights as weights
    class Hub:
        def create_repo(self, repo, private=True, exist_ok=True): self.made = repo, private
        def upload_folder(self, repo_id, folder_path, commit_message): shutil.copytree(folder_path, tmp_path/'hub'/repo_id)
    hub = Hub()
    run(replace(preset('toy'), steps=1, batch_size=8, num_generations=2, sample_every=1, data='default'), tmp_path/'run', progress=False)
    assert push(tmp_path/'run', 'me/toy', client=hub) == 'https://huggingface.co/me/toy' and hub.made == ('me/toy', True)
    assert sorted(p.name for p in (tmp_path/'hub'/'me'/'toy').rglob('*') if p.is_file()) == ['000001.png', 'README.md', 'policy.safetensors', 'run.json']
    card = (tmp_path/'run'/'README.md').read_text()
    assert card.startswith('---') and "weights='hf://me/toy'" in card and str(tmp_path) not in card and 'samples/000001.png' in card
    real = weights._hub()
    monkeypatch.setattr(real, 'snapshot_download', lambda repo, **kw: str(tmp_path/'hub'/repo), raising=False)
    with pytest.warns(UserWarning, match='taken as it is now'): pulled = load_system('toy', 'hf://me/toy', perceptual=False)
    tuned = load_file(tmp_path/'run'/'checkpoint'/'policy.safetensors')
    assert all(torch.equal(v, tuned[k]) for k, v in pulled.policy.state_dict().items())
    with pytest.raises(ValueError, match='expected user/name'): push(tmp_path/'run', 'toy', client=hub)
