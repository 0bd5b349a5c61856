"The doors users come in by: command lines and run notebooks, each in a process of its own that is forked from one which has torch already."
import json
import multiprocessing
import os
import runpy
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from conftest import ROOT

from arpo_nb.training.processes import free_port, read_launcher

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


class Warm:
    "What `launch` knows of torchrun, whose processes are forked instead of started: each has torch already"
    def __init__(self, command, env, **_):
        port, count = str(free_port()), read_launcher(shlex.join(command))['processes']
        ranks = [dict(RANK=str(i), LOCAL_RANK=str(i), WORLD_SIZE=str(count), MASTER_ADDR='127.0.0.1', MASTER_PORT=port) for i in range(count)]
        words, said, stdin = command[command.index('arpo_nb.training.launch') + 1:], multiprocessing.Pipe(False), multiprocessing.Pipe(False)
        context = FORKS if multiprocessing.parent_process() is None else multiprocessing.get_context('fork') # one that was forked is warm itself
        with patch.dict(os.environ, SERVER):
            self.processes = [context.Process(target=_rank, args=(words, {**env, **OURS, **r}, said, stdin)) for r in ranks]
            for p in self.processes: p.start()
        said[1].close(); stdin[0].close()
        self.end, self.returncode = stdin[1], None # the processes end when this is closed
        self.stdout = os.fdopen(os.dup(said[0].fileno()), errors='replace')

    def wait(self, timeout=None):
        ends = time.time() + (timeout or 1e6)
        for p in self.processes: p.join(max(0, ends - time.time()))
        if any(p.is_alive() for p in self.processes): raise subprocess.TimeoutExpired('', timeout)
        self.returncode = max(abs(p.exitcode) for p in self.processes)
        return self.returncode

    def terminate(self):
        for p in self.processes: p.terminate()

    def kill(self):
        for p in self.processes: p.kill()


def _rank(words, env, said, stdin):
    for pipe, fds in ((stdin[0], [0]), (said[1], [1, 2])):
        for fd in fds: os.dup2(pipe.fileno(), fd)
    for pipe in (*said, *stdin): pipe.close()
    sys.stdout, sys.stderr = (open(fd, 'w', buffering=1, closefd=False) for fd in (1, 2)) # those of a file can seek
    os.environ.clear()
    os.environ.update(env)
    from arpo_nb.training.launch import main
    main(words)


def warm():
    "Within it, `launch` forks its processes; tests of torchrun and of what it hands on do without"
    from arpo_nb.training import launch
    return patch.object(launch, 'subprocess', SimpleNamespace(**vars(subprocess) | dict(Popen=Warm)))


def _warm_arpo(*words):
    with warm(): return _arpo(*words)


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


def _tiny_bench(params):
    "The benchmark on a network without size, in one process: 52_bench times a real one in a process of its own"
    from arpo_nb.models.llamagen import SIZES
    from arpo_nb.training import bench
    with patch.dict(SIZES, B=dict(n_layer=2, n_head=2, dim=64)), patch.object(bench, 'in_child', bench.time_update): _cells('run_bench', params)


def _script(path, *words):
    sys.argv = [path, *words]
    runpy.run_path(path, run_name='__main__')


def begin_script(path, *words): return Started(_script, str(path), *map(str, words))
def begin_arpo(*words, cwd=None, **env): return Started(_arpo, *map(str, words), cwd=cwd, env=env)
def begin_warm_arpo(*words): return Started(_warm_arpo, *map(str, words))
def arpo(*words, cwd=None, **env): return begin_arpo(*words, cwd=cwd, **env).wait()
def tiny_bench(**params): return Started(_tiny_bench, params).wait()
def notebook(name, cwd=None, **params): return Started(_cells, name, params, cwd=cwd).wait()


def papermill(notebook, out, **params):
    "As a user runs it, by papermill and in a kernel"
    args = [a for k, v in params.items() for a in ('-p', k, str(v))]
    return subprocess.run([sys.executable, '-m', 'papermill', str(ROOT/'nbs'/f'{notebook}.ipynb'), str(out), '-k', 'python3', *args],
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=out.parent, env=ENV)


def ok(done):
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return done
