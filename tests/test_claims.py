"The ledger end to end: its command runs an arm, stores it, and judges from what is stored"
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from arpo_nb.training.claims import CLAIMS, MINIATURES, arms_of, judge, ledger, load_results, main, miniature_config, results_folder


def test_the_command_runs_stores_and_prints(tmp_path):
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    cmd = [sys.executable, '-m', 'arpo_nb.training.claims', '--only', 'groups_2', '--seeds', '3:4', '--size', 'probe',
           '--results', str(tmp_path)]
    done = subprocess.run(cmd, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    got = json.loads((tmp_path/'probe'/'groups_2'/'3.json').read_text())
    assert (got['miniature'], got['seed'], got['size']) == ('groups_2', 3, 'probe') and got['config']['seed'] == 3
    assert '--only groups_2 --seeds 3:4 --size probe' in got['command'] and got['torch'] and 'commit' in got
    assert {'fid', 'accuracy'} < got['metrics'].keys() and {'bright_all', 'accuracy_unseen'} < got['shares'].keys()
    assert 'not run yet' in done.stdout and 'VAR-GRPO' in done.stdout


@pytest.mark.parametrize('argv', [['--only', 'dpo'], ['--size', 'huge']])
def test_unknown_names_are_refused_before_work(argv, tmp_path):
    with pytest.raises(ValueError, match='choose one of'): main([*argv, '--results', str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_commands_of_the_ledger_name_parameters_that_are_there():
    for claim in CLAIMS:
        for notebook, rest in re.findall(r'papermill nbs/(\S+) \S+((?: -p \S+ \S+)*)', claim.real):
            cells = json.loads((ROOT/'nbs'/notebook).read_text(encoding='utf-8'))['cells']
            text = next(''.join(c['source']) for c in cells if 'parameters' in c['metadata'].get('tags', []))
            wrong = {n for n in re.findall(r'-p (\S+)', rest) if not re.search(rf'^{n} = ', text, re.M)}
            assert not wrong, f'{claim.where}: {notebook} has no {wrong}'


def test_results_in_the_repository_are_whole():
    "Each stored result names an arm, its command, its commit and the versions, and was made by the configuration that the arm has now"
    for name, seeds in load_results(results_folder()).items():
        for seed, r in seeds.items():
            assert r['commit'] and r['torch'] and r['command'].startswith('python -m arpo_nb.training.claims'), (name, seed)
            cfg = miniature_config(name, seed, r['size'])
            known = {} if cfg is None else vars(cfg)
            old = {k: v for k, v in (r['config'] or {}).items() if k in known and known[k] != v}
            assert not old, f'{name}, seed {seed}: made with {old}'


@pytest.mark.parametrize('page', ['index', '62_claims', 'run_vapi', 'run_loofid', 'run_var', 'run_brightness'])
def test_pages_show_what_the_results_say(page):
    sys.path.insert(0, str(ROOT/'scripts'))
    from tables import PAGES, compute
    assert page in PAGES
    now = json.loads((ROOT/'nbs'/f'{page}.ipynb').read_text(encoding='utf-8'))
    want = compute(page)
    assert now == want, 'run python scripts/tables.py and python scripts/readme.py'


def test_every_row_has_a_verdict():
    for claim in CLAIMS:
        assert set(arms_of(claim)) <= set(MINIATURES)
        assert judge(claim, {})[0].startswith(('not run yet', "can't be tested here: ", 'proved in'))
    assert len(ledger({}).splitlines()) == len(CLAIMS) + 2
