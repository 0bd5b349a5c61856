"Models, rewards, data, optimizers and perceptual networks of one's own, by a dotted path, through every door."
import json
import shlex
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from doors import arpo, notebook, ok

from arpo_nb.config import Config, from_json, preset
from arpo_nb.specs import ModelSpec, families, find_model, find_recipe, pick, registered, resolve
from arpo_nb.systems import load_system, model_files, model_table, own_data
from arpo_nb.training.launch import launch
from arpo_nb.training.steps import make_optimizer
from arpo_nb.training.trainer import train

MINE = '''
import torch
from arpo_nb.models.toy import build_toy, toy_judge, toy_pictures
from arpo_nb.protocols import System
from arpo_nb.specs import ModelSpec, Recipe

class Colourfulness:
    def __call__(self, images, prompts=None): return images.std(1).mean((1, 2)) + images.mean((1, 2, 3))
def transposed(images, batch, state): return images.mean((2, 3, 4)).T, state
def broadcast(images, batch, state): return images.mean((2, 3, 4))[:1], state
def nothing(images): pass
def fails(images): raise KeyError('in my own line')

def build():
    policy, vq = build_toy()
    return System('mine', policy, vq, toy_judge(), num_classes=10, class_names=[f'thing {i}' for i in range(10)])
def pair(weights=None): return build_toy(weights)
RECIPES = dict(loofid=Recipe('arpo_nb.config:loofid_toy', dict(rewards='my_things.Colourfulness')), grpo='loofid')
def record(): return ModelSpec('mine', build, num_classes=10, data=toy_pictures, recipes=RECIPES)
def few(image_size):
    images, labels, pixels = toy_pictures()
    return images[:40], labels[:40], pixels
NUMBER = 3
def no_optimizer(params): return 3
'''
SIZES = 'steps=2,batch_size=4,num_generations=4'
REWARD = '0.5*my_things.Colourfulness+class_score'


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path/'my_things.py').write_text(MINE)
    (tmp_path/'my_fault.py').write_text('import json\n1/0\n')
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ('my_things', 'my_fault'): sys.modules.pop(name, None)


def command(*args): return arpo('train', *args)


def rows(folder): return [{k: v for k, v in json.loads(line).items() if not k.startswith('time/')} for line in (folder/'metrics.jsonl').read_text().splitlines()]


def test_the_same_reward_by_every_door(mine):
    "Command line on one process and two, the notebook, and Python: the same numbers, and the same record of them"
    for name, n in (('one', 1), ('two', 2)):
        done = command('--model', 'toy', '--method', 'loofid', '--set', f'rewards={REWARD},num_processes={n},{SIZES}', '--out_dir', name)
        assert done.returncode == 0, done.stderr[-2000:]
    ok(notebook('run_loofid', out_dir='mill', arms='none', eval_images=0, overrides=f'rewards={REWARD},{SIZES}'))
    launch(replace(preset('toy', 'loofid'), rewards=REWARD, steps=2, batch_size=4, num_generations=4), mine/'python', progress=False)
    first = rows(mine/'one')
    assert 'reward/my_things.Colourfulness' in first[0] and len(first) == 2
    for other in ('two', 'mill', 'python'):
        for a, b in zip(first, rows(mine/other), strict=True): assert a == {k: pytest.approx(v, rel=1e-4, abs=1e-5) for k, v in b.items()}, other
        assert json.loads((mine/other/'config.json').read_text())['rewards'] == REWARD
    again = command('--model', 'toy', '--method', 'loofid', '--set', f'rewards=class_score,{SIZES}', '--out_dir', 'one')
    assert again.returncode and 'holds another run (rewards' in again.stderr


def test_an_object_is_recorded_by_the_name_that_leads_to_it(mine):
    Colourfulness = resolve('my_things.Colourfulness')
    system, cfg = load_system('toy'), Config(model='toy', method='grpo', rewards='brightness', steps=1, batch_size=2, num_generations=2)
    data = own_data(replace(cfg, data='my_things:few'), system)
    train(system, data, cfg, mine/'out', reward=lambda images, batch, state: (Colourfulness()(images.flatten(0, 1)), state), progress=False)
    assert from_json((mine/'out'/'config.json').read_text()).rewards.startswith('test_names:')


@pytest.mark.parametrize('name, why', [('my_things.transposed', 'its answer is transposed, [G, B]'), ('my_things.broadcast', 'returned [1, 4]'), ('my_things.nothing', 'returned None'),
                                       ('my_things.fails', 'in my own line'), ('my_things.Colour', "did you mean 'Colourfulness'"), ('my_fault.Reward', 'ZeroDivisionError'),
                                       ('my_thing.Reward', "no module named 'my_thing'"), ('my_things.NUMBER', 'is a int'), ('colourfulness', 'no reward named')])
def test_rewards_that_are_none(mine, name, why):
    cfg = replace(preset('toy', 'loofid'), rewards=name, steps=1, batch_size=4, num_generations=4)
    with pytest.raises((ValueError, ImportError, RuntimeError)) as e: launch(cfg, mine/'out', progress=False)
    assert why in str(e.value)


def test_models_by_name(mine):
    record = find_model('my_things:record')
    assert isinstance(record, ModelSpec) and find_model('my_things:record') is record and model_files('my_things:build') == []
    with pytest.raises(ValueError, match="no recipe for method 'vapi'; it has loofid, grpo"): preset('my_things:record', 'vapi')
    with pytest.raises(ValueError, match="did you mean 'build'"): find_model('my_things:biuld')
    with pytest.raises(ValueError, match='a int; expected a ModelSpec'): find_model('my_things:NUMBER')
    assert load_system('my_things:pair', 'random').num_classes == 0 and load_system('my_things:build').class_names[3] == 'thing 3'
    with pytest.raises(ValueError, match="weights='x.pt': my_things:build brings its own"): load_system('my_things:build', 'x.pt')
    launch(replace(preset('my_things:record', 'loofid'), steps=1, batch_size=2, num_generations=2), mine/'out', progress=False)
    assert json.loads((mine/'out'/'config.json').read_text())['model'] == 'my_things:record' and 'reward/my_things.Colourfulness' in rows(mine/'out')[0]


def test_data_optimizer_and_network(mine):
    args = ('--model', 'my_things:build', '--set', f'{SIZES},mixed_precision=no,data=my_things:few,optim=torch.optim.SGD,perceptual_net=arpo_nb.models.toy:toy_judge')
    dry, done = command(*args, '--dry-run'), command(*args, '--out_dir', 'out')
    assert dry.returncode == done.returncode == 0, dry.stderr + done.stderr[-2000:]
    assert json.loads((mine/'out'/'config.json').read_text())['optim'] == 'torch.optim.SGD' and len(rows(mine/'out')) == 2
    p = torch.nn.Parameter(torch.ones(2, 2))
    assert isinstance(make_optimizer([p], Config()), torch.optim.AdamW) and isinstance(make_optimizer([p], Config(optim='torch.optim.SGD')), torch.optim.SGD)
    with pytest.raises(ValueError, match='expected a torch.optim.Optimizer'): make_optimizer([p], Config(optim='my_things.no_optimizer'))
    with pytest.raises(ValueError, match='optim=\'sgd\': choose one of adamw'): Config(optim='sgd')


def test_records_are_whole():
    for spec in families().values():
        assert spec.build and spec.title and (spec.layout or spec.data) and find_recipe(spec, 'grpo')
        for method in ('vapi', 'mle', 'ste', 'tokenizer', 'grpo', 'mixed', 'loofid', 'ar_grpo', 'var_grpo', 'vapi_loofid'): preset(spec.name, method)
    assert all(name in model_table() for name in families()) and model_table(['toy'], markdown=True).count('\n') == 2


def test_a_family_needs_nothing_but_its_module(monkeypatch, tmp_path):
    import arpo_nb.models
    (tmp_path/'fresh.py').write_text("from arpo_nb.specs import ModelSpec\nSPECS = [ModelSpec('fresh', build=dict)]\n")
    monkeypatch.setattr(arpo_nb.models, '__path__', [*arpo_nb.models.__path__, str(tmp_path)])
    try: assert 'fresh' in families.__wrapped__()
    finally: sys.modules.pop('arpo_nb.models.fresh', None)


def test_entry_points(mine, monkeypatch):
    "An installed package's names, and a name that two claim"
    info = mine/'theirs-1.dist-info'; info.mkdir()
    (info/'METADATA').write_text('Metadata-Version: 2.1\nName: theirs\nVersion: 1\n')
    (info/'entry_points.txt').write_text('[arpo_nb.models]\ntheirs = my_things:record\ntoy = my_things:build\n[arpo_nb.rewards]\ncolourful = my_things:Colourfulness\nclip = my_things:nothing\n')
    monkeypatch.syspath_prepend(str(mine))
    assert find_model('theirs').name == 'mine' and 'theirs' in model_table(['theirs'])
    with pytest.raises(ValueError, match='arpo_nb and theirs both register that name'): find_model('toy')
    with pytest.raises(ValueError, match="rewards='clip': arpo_nb and theirs both"): pick('clip', ['clip'], registered('arpo_nb.rewards'), 'rewards')
    launch(replace(preset('theirs', 'loofid'), rewards='colourful', steps=1, batch_size=2, num_generations=2), mine/'out', progress=False)
    assert 'reward/colourful' in rows(mine/'out')[0]


def test_every_field_is_an_option(mine):
    "Reachable and documented, and a number that is none fails with its name"
    from arpo_nb.training.launch import main
    text = ok(command('--help')).stdout
    for name in vars(Config()): assert f'--{name} ' in text or f'--{name}\n' in text, name
    assert 'weight of the cross-entropy on the' in ' '.join(text.split()) and 'the optimiser' in text.lower()
    with pytest.raises(SystemExit): main(['--model', 'toy', '--learning_rate', 'fast', '--dry-run'])
    with pytest.raises(ValueError, match='learning_rate=inf: expected a finite number'): main(['--model', 'toy', '--learning_rate', 'inf', '--dry-run'])
    main(['--model', 'toy', '--learning_rate', '1e-5', '--gradient_checkpointing', 'on', '--steps', '1', '--batch_size', '2', '--num_generations', '2', '--out_dir', 'out'])
    cfg = from_json((mine/'out'/'config.json').read_text())
    assert (cfg.learning_rate, cfg.gradient_checkpointing, cfg.steps) == (1e-5, True, 1)


def test_examples_run_by_their_own_commands(tmp_path):
    "Own reward, model, data and metric, and a run written down: each by the line that its own file gives"
    ran = []
    for path in sorted((ROOT/'examples').glob('*.*')):
        line = next((line.lstrip('# ') for line in path.read_text().splitlines() if line.lstrip('# ').startswith('arpo ')), None)
        assert line, f'{path.name} says no command'
        words = shlex.split(line)[1:]
        words[words.index('--out_dir') + 1] = str(tmp_path/path.stem)
        small = ['--steps', '1', '--batch_size', '2', '--num_generations', '2'] if words[0] == 'train' else ['--batch_size', '20']
        ok(arpo(*words, *small, cwd=path.parent))
        if words[0] == 'train': assert len(rows(tmp_path/path.stem)) == 1
        else: assert json.loads((tmp_path/path.stem/'eval.json').read_text())['metrics']['base']['own_metric.sharpness'] > 0
        ran.append(path.name)
    assert ran == ['colourful.yaml', 'own_data.py', 'own_metric.py', 'own_model.py', 'own_reward.py']
