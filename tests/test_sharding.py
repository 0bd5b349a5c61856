"FSDP2 on two processes, started by two torchrun agents, against DDP and one process"
import json
import os
import subprocess
import sys

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from conftest import once
from sharding_worker import RESUMED, ROOT, SETTINGS, environment, run

from arpo_nb.config import Config
from arpo_nb.models.checkpoints import read_state_dict
from arpo_nb.training.processes import free_port, read_launcher
from arpo_nb.training.sharding import shard_count

TIMES = ('time/', 'sampling/')


def train(out):
    "Two agents of one process each, which leave what they found in the folder"
    agent = [sys.executable, '-m', 'torch.distributed.run', '--nnodes=2', '--nproc_per_node=1', '--rdzv_backend=c10d',
             f'--rdzv_endpoint=127.0.0.1:{free_port()}', '--rdzv_id=test', '--local_addr=127.0.0.1', os.path.join(os.path.dirname(__file__), 'sharding_worker.py'), str(out)]
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    agents = [subprocess.Popen(agent, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    said = [a.communicate()[0] for a in agents]
    assert not any(a.returncode for a in agents), '\n'.join(said)


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    "Folder, and what both processes found"
    out = once(tmp_path_factory, 'sharding', train)
    return out, [json.loads((out/f'found{r}.json').read_text()) for r in range(2)]


def assert_same(a, b, tolerance=3e-6): # 1.5e-6 was seen: sums over two shards are added in another order
    assert len(a) == len(b) and a
    for x, y in zip(a, b):
        assert x.keys() == y.keys()
        for k in x:
            loose = 10 if k == 'optim/grad_norm' else 1 # after a step of Adam the order of additions shows there first: 2.5e-6 was seen
            if not k.startswith(TIMES): assert x[k] == pytest.approx(y[k], rel=loose*tolerance, abs=loose*tolerance), k


@pytest.mark.parametrize('name', SETTINGS)
def test_fsdp_is_ddp_is_one_process(found, tmp_path, name):
    out, (first, second) = found
    ddp, fsdp = first[f'{name}/ddp'], first[f'{name}/fsdp']
    assert fsdp[-1]['optim/grad_norm'] > 0
    assert_same(fsdp, ddp)
    one = run(SETTINGS[name], tmp_path/'one')
    if name == 'bf16': # a pass over two rows rounds their gradients once, two processes twice; Adam's first step makes signs of what is
        one, fsdp, ddp = ([rows[0] | {'optim/grad_norm': 1.}] for rows in (one, fsdp, ddp)) # left, and some draws of the second step flip
    assert_same(fsdp, one)
    a, b = (read_state_dict(out/f'{name}_{kind}'/'checkpoint') for kind in ('fsdp', 'ddp')) # the same file, name for name
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=0, atol=3e-6) for k in a)


def test_continues_across_layouts(found, tmp_path):
    out, (first, _) = found
    whole = run(RESUMED, tmp_path/'whole')
    there = {k: v for k, v in first.items() if k.split('_')[0] in ('sharded', 'full', 'ddp')}
    assert len(there) == 4
    for name in ('sharded_one', 'full_one'): there[name] = run(RESUMED, out/name)
    want = read_state_dict(tmp_path/'whole'/'checkpoint')
    for name, rows in there.items():
        assert_same(rows, whole)
        state = read_state_dict(out/name/'checkpoint') # those of FSDP in parts
        assert state.keys() == want.keys(), name
        # Adam's first steps divide tiny gradients by themselves: single weights may part by a share of the learning rate
        apart, size = (sum((x[k] - y).pow(2).sum() for k, y in other.items()).sqrt() for x, other in
                       ((state, want), (want, {k: torch.zeros_like(v) for k, v in want.items()})))
        assert apart <= 1e-5*size, (name, apart/size)
    assert (out/'sharded_fsdp'/'checkpoint'/'sharded').is_dir() and not (out/'sharded_ddp'/'checkpoint'/'sharded').exists()


@pytest.mark.parametrize('file, processes, shards', [('ddp.yaml', 8, 1), ('fsdp2.yaml', 8, 8), ('multi_node.yaml', 16, 8)])
def test_configurations_that_come_along(file, processes, shards, monkeypatch):
    "accelerate reads them without a doubt, and means what read_launcher says"
    path, env = ROOT/'accelerate'/file, environment(file)
    assert read_launcher(f'accelerate launch --config_file {path}') == dict(processes=processes, shards=shards)
    assert env.get('ACCELERATE_USE_FSDP', 'false') == str(shards > 1).lower()
    for k, v in env.items(): monkeypatch.setenv(k, v)
    assert shard_count(Config(num_processes=processes, batch_size=16)) == shards
    if shards > 1: assert FullyShardedDataParallelPlugin().fsdp_version == 2


def test_refused_on_every_process(found):
    for f in found[1]:
        assert 'start it without FSDP' in f['tokenizer']
        assert 'process 1 on' in f['seeds'] and 'seed 1 instead of 0' in f['seeds']
