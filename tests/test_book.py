"The notebooks as a book: cells of one thought, each used at once, everything documented, pictures; and what `@patch` must not hide."
import ast
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT/'scripts'))
import book

PAGES = {n: nb for n, nb in book.exporting(sorted((ROOT/'nbs').glob('*.ipynb'))).items()}
CHAPTERS = ['01_protocols', '02_config', '02_specs', '03_enumerable', '06_sampling', '07_image_io', '08_files', '08_weights', '09_adapters',
            '10_elbo', '13_grpo', '14_entropy', '16_scalewise', '19_own_rewards', '23_clip', '30_tokenizers', '31_llamagen', '32_multiscale_vq',
            '33_var', '34_var_toy', '34_vqgan', '35_toy', '46_steps', '47_run_folder', '47_watching', '48_saving', '49_export', '49_notebooks',
            '50_evaluate', '51_sample_writer', '61_matrix',
            '09_text_data', '26_inception', '38_checkpoints', '38_shapes', '45_objectives'] # the list grows
# pages whose exports are explained and used, one thought a cell; what they lack is a picture, some checks, or shorter cells
SHOWN = ['05_plots', '11_noisy_context', '12_ste', '15_moments', '20_rewards', '21_loo_fid', '22_features', '24_maniqa',
         '25_reward_factory', '36_pretrain', '37_models', '38_layouts', '39_janus', '41_trainer', '42_launch', '43_plan',
         '44_ledger', '44_processes', '44_rehearse', '48_sharding', '52_bench', '53_metrics', '54_classifier',
         '55_geneval', '56_lite_features', '60_your_own_model', '62_claims', '62_docs', '40_rollout', '04_data']
MODULES = sorted(p for p in (ROOT/'arpo_nb').rglob('*.py') if not p.stem.startswith('_'))


@pytest.mark.parametrize('name', CHAPTERS)
def test_a_chapter_reads_like_one(name):
    m = book.measure(PAGES[name])
    sizes = sorted(m['sizes'])
    assert sizes[len(sizes)//2] <= 10 and sizes[int(.9*len(sizes))] <= 22 and sizes[-1] <= 40
    assert book.share(m['used']) >= 95 and book.share(m['follows']) >= 85
    assert m['checks'] >= 3*len(m['own']) and m['pictures'] >= 2
    assert book.share(m['docments']) >= 95
    assert all(m['functions']) and all(m['methods'])


@pytest.mark.parametrize('name', CHAPTERS + SHOWN)
def test_a_page_uses_what_it_exports(name):
    m = book.measure(PAGES[name])
    assert max(m['sizes']) <= 40
    assert book.share(m['used']) >= 95 and book.share(m['follows']) >= 85 and book.share(m['docments']) >= 95
    assert all(m['functions']) and all(m['methods'])


def test_what_is_counted():
    cell = lambda text: dict(cell_type='code', source=text)
    nb = dict(cells=[cell('#| export\nimport os'), cell('#| exports\nclass A:\n    "What"\n    def __init__(self, x): self.x = x'),
                     cell('#| exports\n@patch\ndef f(self:A,\n      n # how many\n     ):\n    return n'), cell('assert A(1).f(2) == 2'),
                     cell('#| export\ndef _h(): pass\ndef g(a, b): pass'), cell('#| hide\ng(1, 2)')])
    m = book.measure(nb)
    assert m['sizes'] == [3, 5, 2] and m['bare'] == [3, 3, 2] and m['own'] == ['A', 'g'] and m['used'] == [True, False]
    assert m['follows'] == [True, True, False] and m['checks'] == 1
    assert m['docments'] == [False, True, False, False] and m['functions'] == [False] and m['methods'] == [False]


def patched(tree): return [n for n in tree.body if book.is_patch(n)]


@pytest.mark.parametrize('path', MODULES, ids=lambda p: p.stem)
def test_patch_hides_no_name_of_the_module(path):
    "`@patch` leaves a name in the module that is not the method, so no import, function or class may have that name"
    tree = ast.parse(path.read_text())
    bound = [a.asname or a.name.partition('.')[0] for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names]
    bound += [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not book.is_patch(n)]
    bound += [t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)]
    assert not {n.name for n in patched(tree)} & {*bound}


@pytest.mark.parametrize('path', MODULES, ids=lambda p: p.stem)
def test_patched_methods_name_their_class(path):
    "In a patched method the bare `super()` fails when it is called, long after the import"
    for n in patched(ast.parse(path.read_text())):
        assert n.args.args[0].annotation is not None, n.name
        bare = [c for c in ast.walk(n) if isinstance(c, ast.Call) and getattr(c.func, 'id', '') == 'super' and not c.args]
        assert not bare, f'{n.name}: write super(Class, self)'


def test_the_book_as_a_whole():
    "Floors that rise with every chapter"
    m = book.total([book.measure(nb) for nb in PAGES.values()])
    middle = lambda sizes: sorted(sizes)[len(sizes)//2]
    assert middle(m['sizes']) <= 9 and middle(m['bare']) <= 9 and sorted(m['sizes'])[int(.9*len(m['sizes']))] <= 22
    assert book.share(m['docments']) >= 96 and book.share(m['used']) >= 97 and book.share(m['follows']) >= 96
    assert book.share(m['functions']) == 100 and book.share(m['methods']) >= 97
    assert m['long'] == 0 and m['checks'] >= 3.2*len(m['own']) and m['pictures'] >= 2*len(PAGES)
