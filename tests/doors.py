"The doors users come in by: command lines and run notebooks, each in a process of its own that is forked from one which has torch already."
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from subprocess import CompletedProcess
from unittest.mock import patch

import pytest
from conftest import ROOT

OURS = {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
ENV = {**os.environ, **OURS} # of a subprocess
SERVER = OURS | {'PYTHONPATH': os.pathsep.join((str(ROOT), str(ROOT/'tests')))} # which finds `warm` there
FORKS = multiprocessing.get_context('forkserver')
FORKS.set_forkserver_preload(['warm'])


class Started:
    "A process that was begun; `wait` gives what `subprocess.run` gives"
    def __init__(self, target, *args, cwd=None, env=None):
        self.said = tempfile.TemporaryDirectory()
        files = [str(Path(self.said.name)/n) for n in ('stdout', 'stderr')]
        self.process = FORKS.Process(target=_child, args=(target, args, str(cwd or Path.cwd()), {**os.environ, **OURS, **(env or {})}, *files))
        with patch.dict(os.environ, SERVER): self.process.start() # the first start begins the server
        self.args, self.files, self.pid = args, files, self.process.pid

    def poll(self): return self.process.exitcode
    def send_signal(self, sig): os.kill(self.pid, sig)

    def wait(self):
        self.process.join()
        return CompletedProcess(self.args, self.process.exitcode, *(Path(f).read_text(errors='replace') for f in self.files))


def _child(target, args, cwd, env, out, err):
    for fd, name in ((1, out), (2, err)): os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), fd)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.exit(target(*args))


def _arpo(*words):
    from arpo_nb.training.launch import arpo
    return arpo(list(words))


def _cells(notebook, params):
    import matplotlib
    matplotlib.use('agg')
    run_cells(notebook, **params)


def run_cells(notebook, **params):
    "The cells of a run notebook in this process, with other parameters; the names they leave"
    names = {'__name__': '__main__'}
    for cell in json.loads((ROOT/'nbs'/f'{notebook}.ipynb').read_text(encoding='utf-8'))['cells']:
        if cell['cell_type'] != 'code': continue
        exec(compile(''.join(cell['source']), notebook, 'exec'), names)
        if 'parameters' in cell['metadata'].get('tags', ()):
            assert params.keys() <= names.keys(), f'no parameters of {notebook}: {params.keys() - names.keys()}'
            names |= {k: str(v) if isinstance(v, Path) else v for k, v in params.items()}
    return names


def refused(notebook, home, monkeypatch, **params):
    "What a run notebook raises, here in this process"
    monkeypatch.chdir(home)
    with pytest.raises(Exception) as e: run_cells(notebook, **params)
    return str(e.value)


def _script(path, *words):
    sys.argv = [path, *words]
    runpy.run_path(path, run_name='__main__')


def begin_script(path, *words): return Started(_script, str(path), *map(str, words))
def begin_arpo(*words, cwd=None, **env): return Started(_arpo, *map(str, words), cwd=cwd, env=env)
def arpo(*words, cwd=None, **env): return begin_arpo(*words, cwd=cwd, **env).wait()
def notebook(name, cwd=None, **params): return Started(_cells, name, params, cwd=cwd).wait()


def papermill(notebook, out, **params):
    "As a user runs it, by papermill and in a kernel"
    args = [a for k, v in params.items() for a in ('-p', k, str(v))]
    return subprocess.run([sys.executable, '-m', 'papermill', str(ROOT/'nbs'/f'{notebook}.ipynb'), str(out), '-k', 'python3', *args],
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=out.parent, env=ENV)


def ok(done):
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return done
