"Every notebook passes nbdev's docs processing (the step before quarto renders the site)."
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT


def test_notebooks_process_for_the_site(tmp_path):
    pytest.importorskip('nbdev')
    for name in ('nbs', 'arpo_nb'): shutil.copytree(ROOT/name, tmp_path/name, symlinks=True, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for name in ('settings.ini', '_quarto.yml'): shutil.copy(ROOT/name, tmp_path/name)
    code = 'from nbdev.serve import proc_nbs; proc_nbs(n_workers=0, force=True)'
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(tmp_path)})
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'Found cells containing imports and other code' not in done.stderr, done.stderr[-3000:]
    made = {p.name for p in (tmp_path/'_proc').glob('*.ipynb')}
    assert made == {p.name for p in (ROOT/'nbs').glob('*.ipynb')}


def test_site_renders(tmp_path):
    if not shutil.which('quarto'): pytest.skip('quarto is not installed')
    for name in ('nbs', 'arpo_nb'): shutil.copytree(ROOT/name, tmp_path/name, symlinks=True)
    for name in ('settings.ini', '_quarto.yml', 'setup.py', 'README.md'): shutil.copy(ROOT/name, tmp_path/name)
    subprocess.run(['nbdev_docs'], cwd=tmp_path, check=True)
    assert (tmp_path/'_docs'/'index.html').exists()
