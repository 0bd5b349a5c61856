"Leave-one-out rewards over two real processes equal those of one, and networks of rewards reach both"
import os
from unittest.mock import patch

import doors # whose server has torch already
import torch, torch.distributed as dist, torch.multiprocessing as mp
from accelerate import Accelerator
from torch import nn

from arpo_nb.config import Config
from arpo_nb.maths.moments import Reference
from arpo_nb.rewards import loo_fid_reward

def features(step): return torch.randn(10, 5, generator=torch.Generator().manual_seed(step))*.6 + .2
def reference(): return Reference.from_features(torch.randn(80, 5, generator=torch.Generator().manual_seed(99)))

def gather(x):
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)

def run(covariance, rows=slice(None), gather=None):
    "Rewards of three steps and the last state"
    state, out = None, []
    for step in range(3):
        r, state = loo_fid_reward(features(step)[rows], reference(), state, covariance=covariance, gather=gather)
        out.append(r)
    return torch.stack(out), state

def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/sync', rank=rank, world_size=2)
    results = {}
    for c in ('diag', 'full'):
        rewards, state = run(c, slice(5*rank, 5*rank+5), gather)
        results[c] = rewards, state.mean, state.second
    torch.save(results, f'{folder}/{rank}.pt')
    dist.destroy_process_group()

def test_two_processes_equal_one(tmp_path):
    mp.start_processes(worker, (str(tmp_path),), nprocs=2, start_method='forkserver')
    ranks = [torch.load(tmp_path/f'{r}.pt') for r in range(2)]
    for c in ('diag', 'full'):
        rewards, state = run(c)
        both = torch.cat([r[c][0] for r in ranks], 1)
        assert torch.allclose(both, rewards, rtol=1e-6, atol=1e-7)
        for r in ranks: assert torch.equal(r[c][1], state.mean) and torch.equal(r[c][2], state.second) # the same bits on every rank
        alone, _ = run(c, slice(0, 5))
        assert not torch.allclose(alone, rewards[:, :5], rtol=.01) # without gathering they would differ


def judges(cfg, system=None):
    "A reward with a network, a buffer and a reference, in place of `load_reward`: without memory where nothing is to be read"
    from arpo_nb.rewards import WeightedSum
    seen = nn.Linear(5, 1)
    seen.register_buffer('scale', torch.ones(1) if cfg.weights == 'random' else torch.full((1,), 3.))
    def term(images, batch, state=None): return (seen(images)*seen.scale)[..., 0], state
    term.reference = reference() if cfg.weights != 'random' else None
    term.seen = seen
    return WeightedSum(dict(mine=(term, 1.)))

def sent(rank, folder):
    from arpo_nb.training import processes
    torch.manual_seed(rank)
    dist.init_process_group('gloo', init_method=f'file://{folder}/sync', rank=rank, world_size=2)
    read = []
    def load(cfg, system):
        read.append(cfg.weights)
        if folder.endswith('broken') and rank == 0: raise FileNotFoundError('clip.pt: no such file')
        return judges(cfg)
    os.environ.update(RANK=str(rank), WORLD_SIZE='2', LOCAL_RANK=str(rank), MASTER_ADDR='127.0.0.1', MASTER_PORT='1')
    cfg = Config(method='grpo', rewards='brightness', batch_size=2, num_generations=2, num_processes=2)
    with patch.object(processes, 'load_reward', load), patch.object(processes, 'reward_files', lambda *a: ['clip_l14']):
        try: term = processes.reward_once(cfg, None, Accelerator(cpu=True), say=lambda _: None).rewards['mine'][0]
        except Exception as e: found = type(e).__name__, str(e)
        else: found = read, [t.detach() for t in (*term.seen.parameters(), term.seen.scale, term.reference.mean)]
    torch.save(found, f'{folder}/{rank}.pt')
    dist.destroy_process_group()

def test_rewards_are_read_by_one_process_and_sent(tmp_path):
    for name in ('whole', 'broken'):
        (tmp_path/name).mkdir()
        mp.start_processes(sent, (str(tmp_path/name),), nprocs=2, start_method='forkserver')
    first, second = (torch.load(tmp_path/'whole'/f'{r}.pt') for r in range(2))
    assert first[0] == ['default'] and second[0] == ['random'] # only one of them had a file to read
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True)) and second[1][2] == 3
    said = [torch.load(tmp_path/'broken'/f'{r}.pt') for r in range(2)]
    assert said == [('FileNotFoundError', 'clip.pt: no such file'), ('RuntimeError', 'process 0 could not load the rewards brightness: clip.pt: no such file')]
