"Shared by all tests: no network, and the --golden option"
import os
from pathlib import Path

import pytest

os.environ.setdefault('HF_HUB_OFFLINE', '1')
ROOT = Path(__file__).parent.parent


def pytest_addoption(parser):
    parser.addoption('--golden', action='append', metavar='DIR', default=None,
                     help='folder with golden cases, searched recursively; may be repeated (default: tests/golden)')


def pytest_generate_tests(metafunc):
    if 'golden_case' not in metafunc.fixturenames: return
    from golden_cases import discover
    roots = [Path(d) for d in metafunc.config.getoption('golden') or [Path(__file__).parent/'golden']]
    cases = [c for root in roots for c in discover(root)]
    metafunc.parametrize('golden_case', cases, ids=[c.id for c in cases])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    "Tests that share a fixture of their module stay on one worker (--dist loadgroup), so that it is made once"
    for item in items:
        made = item._fixtureinfo.name2fixturedefs.items()
        shared = [name for name, defs in made if defs[-1].scope == 'module']
        if shared: item.add_marker(pytest.mark.xdist_group(f'{item.path.stem}-{shared[0]}'))
