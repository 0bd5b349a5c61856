"FSDP2 on two processes, started by two torchrun agents, against DDP and one process"
import json
import weakref
from contextlib import nullcontext

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from conftest import once
from doors import Started, ok
from sharding_worker import RESUMED, ROOT, SETTINGS, agent, environment, run
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard import _fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from arpo_nb.config import Config
from arpo_nb.models.checkpoints import read_state_dict
from arpo_nb.training.ledger import DEVICE, Ledger, tensors
from arpo_nb.training.processes import free_port, read_launcher
from arpo_nb.training.rehearse import _processes
from arpo_nb.training.sharding import Sharded, shard, shard_count

TIMES = ('time/', 'sampling/')


def train(out):
    "Two agents of one process each, which leave what they found in the folder"
    endpoint = f'127.0.0.1:{free_port()}'
    agents = [Started(agent, str(out), endpoint) for _ in range(2)]
    for a in agents: ok(a.wait())


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


def test_copies_of_parts_are_averaged(found):
    assert all(f['copies'] < 1e-5 for f in found[1])


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


class Held(TorchDispatchMode):
    "Bytes of all storages that are alive, at their most since `most` was asked for"
    def __init__(self):
        super().__init__()
        self.homes, self.peak = weakref.WeakSet(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tensors(args, kwargs, out): self.homes.add(getattr(x, '_local_tensor', x).untyped_storage())
        self.peak = max(self.peak, sum(h.nbytes() for h in self.homes))
        return out

    def most(self):
        peak, self.peak = self.peak, 0
        return peak


class Deep(nn.Module):
    "A policy of sixteen equal units, and little besides"
    num_tokens = 2
    def __init__(self, dim=128):
        super().__init__()
        self.embed, self.output = nn.Embedding(8, dim), nn.Linear(dim, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(dim, 4*dim), nn.GELU(), nn.Linear(4*dim, dim)) for _ in range(16))

    def hidden(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks: x = x + checkpoint(block, x, use_reentrant=False)
        return x

    def head(self, x): return self.output(x)
    def generate(self, tokens): return self.head(self.hidden(tokens)).argmax(-1)


class Mean(nn.Module):
    def __init__(self, policy):
        super().__init__()
        self.model = policy

    def forward(self, tokens): return self.model.head(self.model.hidden(tokens)).mean()


def peaks(policy, device, autocast, most):
    "Bytes at the most: sampling, scoring, and the second of two micro-batches"
    objective, tokens = Sharded(Mean(policy), autocast), torch.zeros(1, 2, dtype=torch.long, device=device)
    with autocast(), torch.no_grad():
        policy.generate(tokens)
        found = dict(generate=most())
        policy.head(policy.hidden(tokens))
        found['score'] = most()
    for last in (False, True):
        objective.set_requires_gradient_sync(last) # as accelerate's no_sync does
        objective(tokens).backward()
        found['update'] = most()
    return found


def half(): return torch.autocast('cpu', torch.bfloat16)


@pytest.mark.parametrize('autocast', [nullcontext, half])
def test_what_a_process_holds(monkeypatch, autocast):
    "Its part and a few units beside sampling; weights that are let go leave no copy behind; the rehearsal says the same"
    n = 8
    with _processes(n):
        mesh = init_device_mesh('cpu', (n,))
        monkeypatch.setattr(_fully_shard, '_get_device_from_mesh', lambda mesh: torch.device('cpu'))
        policy, held = shard(Deep(), 'cpu', mesh=mesh), Held()
        full, unit = (4*sum(p.numel() for p in m.parameters()) for m in (policy, policy.blocks[0]))
        with held:
            for p in policy.parameters(): held.homes.add(p.to_local().untyped_storage())
            real = peaks(policy, 'cpu', autocast, held.most)
        monkeypatch.setattr(_fully_shard, '_get_device_from_mesh', lambda mesh: DEVICE)
        with FakeTensorMode(allow_non_fake_inputs=True):
            with torch.device(DEVICE): policy, ledger = shard(Deep(), DEVICE, mesh=mesh), Ledger(n)
            for p in policy.parameters(): ledger.keep(p, 'parameters')
            with ledger: said = peaks(policy, DEVICE, autocast, lambda: ledger.phases.pop('start').peak)
    assert full < real['generate'] < 1.8*full # gathered whole; a copy in half precision beside it
    # two units are whole at a time, and what is gathered is copied once; then gradients of two units, and of a part
    assert real['score'] < full/n + 4*unit
    assert real['update'] < 2*full/n + 5*unit
    for k, size in real.items(): assert said[k] == pytest.approx(size, rel=.1), k
