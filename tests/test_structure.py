"What prose cannot hold: imports point one way, every module imports alone, notebooks are well-formed."
import ast
import json
import subprocess
import sys
from functools import cache

import pytest
from conftest import ROOT

# The house, floor by floor: a module imports from its own folder and from floors below, never from one above.
FLOORS = ['protocols specs own_rewards config files weights adapters docs', 'maths', 'rewards', 'models', 'scores', 'data', 'systems', 'evaluation', 'training']
LEVEL = {name: i for i, line in enumerate(FLOORS) for name in line.split()}
PACKAGE = ROOT/'arpo_nb'
MODULES = sorted('.'.join(p.relative_to(PACKAGE).with_suffix('').parts) for p in PACKAGE.rglob('*.py') if not p.stem.startswith('_'))
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
KNOWN_TO_TRAINING = ('models.', 'systems') # what rollout, trainer and the feature statistics must not know


def floor(module): return LEVEL[module.split('.')[0]]


@cache
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


FAMILY = ('toy', 'llamagen', 'vqgan', 'janus', 'var', 'var_', 't2i', 'c2i')


def _words(node):
    "Strings in an expression that are a model's name, or a part that names a family"
    from arpo_nb.specs import families
    found = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return [w for w in found if w in FAMILY or w in families() or w.startswith(tuple(f'{f}_' for f in FAMILY if len(f) > 3))]


def _holds_a_model(node):
    "Whether an expression is a variable or field called `model`, or the name of a system"
    if isinstance(node, ast.Attribute) and node.attr == 'name': return isinstance(node.value, ast.Name) and node.value.id in ('system', 'spec')
    return getattr(node, 'id', getattr(node, 'attr', '')) == 'model'


def branches_on_models(source):
    "Comparisons, memberships, prefixes, and look-ups by a literal that ask what a model is called"
    hits = []
    for n in ast.walk(ast.parse(source)):
        if isinstance(n, ast.Compare):
            is_none = all(isinstance(o, (ast.Is, ast.IsNot)) for o in n.ops)
            if not is_none and any(_words(s) or _holds_a_model(s) for s in (n.left, *n.comparators)): hits.append(ast.unparse(n))
        elif isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr in ('startswith', 'endswith', 'fullmatch', 'match', 'search'):
            if _holds_a_model(n.func.value) or any(_holds_a_model(a) or (_words(a) and n.func.attr in ('startswith', 'endswith')) for a in n.args): hits.append(ast.unparse(n))
        elif isinstance(n, ast.Match) and _holds_a_model(n.subject): hits.append(ast.unparse(n.subject))
    return hits


def test_branches_are_seen():
    for code in ("'toy' in model", "model == 'janus_pro_1b'", "cfg.model.startswith('var')", "system.name in names", "m in ('toy', 'toy_var')", "x.startswith('vqgan_')",
                 "match model:\n case 'toy': pass", "re.match('var', cfg.model)"): assert branches_on_models(code), code
    for code in ("model is None", "spec.data", "name == 'policy'", "kind == 'bf16'"): assert not branches_on_models(code), code


@pytest.mark.parametrize('module', [m for m in MODULES if not m.startswith('models.') and m != 'specs'])
def test_only_records_know_names(module):
    "What a model is called decides nothing outside its family's own module"
    assert branches_on_models((PACKAGE/f"{module.replace('.', '/')}.py").read_text()) == []


@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if p.stem.startswith('run_') and 'pretrain' not in p.stem], ids=lambda p: p.stem)
def test_only_records_know_names_in_runs(path):
    cells = [''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']
    assert [b for c in cells for b in branches_on_models(c)] == []


def below(module):
    "What a module imports, and what that imports, and so on"
    found, todo = set(), [module]
    while todo: todo += (new := imports(todo.pop()) - found); found |= new
    return found


def test_every_module_imports_alone():
    "Lowest first, so that little but what a module names itself is there when it is imported; no optional package is needed, and nothing that takes seconds"
    order = sorted(MODULES, key=lambda m: len(below(m)))
    code = (f'import importlib, sys\nfor m in {order!r}: importlib.import_module("arpo_nb." + m)\n'
            'bad = {m for m in ("lpips", "open_clip", "hpsv2", "transformers", "nbdev", "torchvision", "peft",'
            '"sympy", "torch._dynamo", "torch.distributed.tensor", "torch.distributed.checkpoint") if m in sys.modules}\n'
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


# Lines

@pytest.mark.parametrize('module', MODULES)
def test_no_line_is_over_120_characters(module):
    "But for `__all__`, which nbdev writes"
    lines = (PACKAGE/f"{module.replace('.', '/')}.py").read_text().splitlines()
    long = [(i, len(l)) for i, l in enumerate(lines, 1) if len(l) > 120 and not l.startswith('__all__')]
    assert not long
