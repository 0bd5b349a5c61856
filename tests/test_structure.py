"What prose cannot hold: imports point one way, every module imports alone, notebooks are well-formed."
import ast
import json
import subprocess
import sys

import pytest
from conftest import ROOT

# The house, floor by floor: a module imports from its own folder and from floors below, never from one above.
FLOORS = ['protocols config weights', 'maths', 'rewards', 'models', 'scores', 'data', 'systems', 'evaluation', 'training']
LEVEL = {name: i for i, line in enumerate(FLOORS) for name in line.split()}
PACKAGE = ROOT/'arpo_nb'
MODULES = sorted('.'.join(p.relative_to(PACKAGE).with_suffix('').parts) for p in PACKAGE.rglob('*.py') if not p.stem.startswith('_'))
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
KNOWN_TO_TRAINING = ('models.', 'systems') # what rollout, trainer and the feature statistics must not know


def floor(module): return LEVEL[module.split('.')[0]]


def imports(module):
    "Modules of the package that a module imports, at its head or inside a function"
    home, found = module.split('.')[:-1], set()
    for node in ast.walk(ast.parse((PACKAGE/f"{module.replace('.', '/')}.py").read_text())):
        if isinstance(node, ast.ImportFrom):
            base = home[:len(home) + 1 - node.level] if node.level else []
            name = '.'.join([*base, *([node.module] if node.module else [])]).removeprefix('arpo_nb').removeprefix('.')
            if node.level or (node.module or '').split('.')[0] == 'arpo_nb':
                found |= {name} if name in MODULES else {f'{name}.{a.name}'.lstrip('.') for a in node.names}
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix('arpo_nb.') for a in node.names if a.name.startswith('arpo_nb.')}
    return found & set(MODULES)


def test_imports_are_seen(): # the walk above sees what is there
    assert 'maths.grpo' in imports('training.objectives') and 'weights' in imports('systems') and 'protocols' in imports('maths.enumerable')


def test_every_module_has_a_floor(): assert {m.split('.')[0] for m in MODULES} == set(LEVEL)


@pytest.mark.parametrize('module', MODULES)
def test_imports_point_one_way(module):
    up = {m for m in imports(module) if floor(m) > floor(module)}
    assert not up, f'{module} imports {up}, which lie above it'


def test_no_circles_within_a_folder():
    done, open_ = set(), []
    def visit(module):
        assert module not in open_, f"circle: {' → '.join([*open_, module])}"
        if module in done: return
        open_.append(module)
        for m in imports(module): visit(m)
        done.add(open_.pop())
    for module in MODULES: visit(module)


@pytest.mark.parametrize('module', [m for m in MODULES if m.startswith('models.') and m not in ('models.pretrain', 'models.contract')])
def test_policies_know_nothing_of_training(module):
    about = ('rewards', 'config', 'maths.moments', 'maths.entropy', 'maths.grpo', 'maths.ste', 'maths.noisy_context')
    assert not imports(module) & set(about)


@pytest.mark.parametrize('module', ['training.rollout', 'training.objectives', 'training.steps', 'training.run_folder', 'training.trainer',
                                    'evaluation.evaluate'])
def test_trainer_and_evaluation_know_protocols_only(module):
    assert not {m for m in imports(module) if m.startswith(KNOWN_TO_TRAINING)}


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
