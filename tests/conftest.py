"Shared by all tests: no network, and the --golden option"
import gc
import os
import shutil
from pathlib import Path

from filelock import FileLock

os.environ.setdefault('HF_HUB_OFFLINE', '1')
ROOT = Path(__file__).parent.parent


def pytest_addoption(parser):
    parser.addoption('--golden', action='append', metavar='DIR', default=None,
                     help='folder with golden cases, searched recursively; may be repeated (default: tests/golden)')


# whole runs come first, so that none of them is left to one worker in the end
LONG = 'sharding', 'free_running', 'backbones', 'runs', 'rehearse', 'own_files', 'names', 'claims', 'docs', 'run_life', 'matrix'

def pytest_collection_modifyitems(items):
    rank = {f'test_{name}.py': i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONG)))


def pytest_collection_finish():
    "The end of every run collects garbage: what was imported is not looked through each time"
    gc.collect()
    gc.freeze()


def pytest_generate_tests(metafunc):
    if 'golden_case' not in metafunc.fixturenames: return
    from golden_cases import discover
    roots = [Path(d) for d in metafunc.config.getoption('golden') or [Path(__file__).parent/'golden']]
    cases = [c for root in roots for c in discover(root)]
    metafunc.parametrize('golden_case', cases, ids=[c.id for c in cases])


def once(tmp_path_factory, name, make):
    "A folder that one worker fills by `make(folder)` while the others wait for it"
    base = tmp_path_factory.getbasetemp()
    home = (base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base)/name
    with FileLock(f'{home}.lock'):
        if not (whole := home/'.whole').exists():
            shutil.rmtree(home, ignore_errors=True) # of a worker that failed
            home.mkdir()
            make(home)
            whole.touch()
    return home
