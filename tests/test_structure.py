"What prose cannot hold: imports point one way, every module imports alone, notebooks are well-formed."
import ast
import json
import subprocess
import sys

import pytest
from conftest import ROOT

# A module may import those of its own line or of lines above it.
LAYERS = ['protocols config weights',
          'sampling plots image_io noisy_context grpo ste moments entropy elbo',
          'scalewise tokenizers llamagen multiscale_vq',
          'toy checkpoints',
          'rewards features data text_data enumerable inception lite_features',
          'vqgan var',
          'janus',
          'clip classifier maniqa var_toy',
          'reward_factory',
          'contract pretrain models sample_writer',
          'rollout',
          'trainer evaluate plan',
          'launch bench metrics geneval matrix']
LEVEL = {name: i for i, line in enumerate(LAYERS) for name in line.split()}
POLICIES = ('tokenizers', 'llamagen', 'multiscale_vq', 'var', 'toy', 'enumerable', 'checkpoints', 'vqgan', 'janus')
ABOUT_TRAINING = {'rewards', 'moments', 'entropy', 'grpo', 'ste', 'noisy_context', 'rollout', 'trainer', 'launch', 'evaluate', 'config'}
MODULES = sorted(p.stem for p in (ROOT/'arpo_nb').glob('*.py') if not p.stem.startswith('_'))
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))


def imports(module):
    tree = ast.parse((ROOT/'arpo_nb'/f'{module}.py').read_text())
    names = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    names |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    return {n.split('.')[1] for n in names if n.startswith('arpo_nb.')}


@pytest.mark.parametrize('module', MODULES)
def test_imports_point_one_way(module):
    assert module in LEVEL, f'{module} has no layer yet: add it to LAYERS'
    up = {m for m in imports(module) if LEVEL[m] > LEVEL[module]}
    assert not up, f'{module} imports {up}, which lie above it'


@pytest.mark.parametrize('module', POLICIES)
def test_policies_know_nothing_of_training(module): assert not imports(module) & ABOUT_TRAINING


def test_trainer_and_evaluation_know_protocols_only():
    for module in ('rollout', 'trainer', 'evaluate'): assert not imports(module) & {'tokenizers', 'llamagen', 'toy', 'models', 'pretrain'}


def test_every_module_imports_first():
    "Each module imports when nothing else of the package is loaded; no optional package is needed, nor fastcore (so any version will do)"
    code = (f'import importlib, sys\nfor m in {MODULES!r}:\n'
            '    for name in [n for n in sys.modules if n.startswith("arpo_nb")]: del sys.modules[name]\n'
            '    importlib.import_module("arpo_nb." + m)\n'
            'bad = {m for m in ("lpips", "open_clip", "hpsv2", "transformers", "nbdev", "fastcore", "torchvision") if m in sys.modules}\n'
            'assert not bad, bad')
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_form(path):
    nb = json.loads(path.read_text())
    assert nb['metadata']['kernelspec'] == dict(display_name='python3', language='python', name='python3')
    first = ''.join(nb['cells'][0]['source'])
    assert nb['cells'][0]['cell_type'] == 'markdown' and first.startswith('# ') and '\n> ' in first
    prose = sum(c['cell_type'] == 'markdown' for c in nb['cells'])/len(nb['cells'])
    assert prose >= .3, f'{prose:.0%} prose'
    errors = [o for c in nb['cells'] for o in c.get('outputs', []) if o['output_type'] == 'error']
    assert not errors
    if path.stem.startswith('run_'):
        tagged = [c for c in nb['cells'] if 'parameters' in c['metadata'].get('tags', [])]
        assert len(tagged) == 1
        values = [ast.literal_eval(s.value) for s in ast.parse(''.join(tagged[0]['source'])).body]
        assert all(isinstance(v, (int, float, str, bool)) for v in values), 'papermill parameters are scalars'
        assert not any('#| export' in ''.join(c['source']) for c in nb['cells'])


def test_sidebar_lists_every_notebook():
    text = (ROOT/'nbs/sidebar.yml').read_text()
    assert [p.name for p in NOTEBOOKS if p.name not in text] == []
    listed = [line.strip('- ').strip() for line in text.splitlines() if '.ipynb' in line]
    assert set(listed) == {p.name for p in NOTEBOOKS}


def test_readme_is_the_index():
    sys.path.insert(0, str(ROOT/'scripts'))
    from readme import readme
    assert (ROOT/'README.md').read_text() == readme(), 'run python scripts/readme.py'


def test_no_large_files():
    files = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert [f for f in files if (ROOT/f).is_file() and (ROOT/f).stat().st_size > 5e6] == []
