"What the scripts share that time ours beside the authors': clocks, whether both sides agree, tables, and what the machine could do"
import sys
import time
import warnings
from types import ModuleType
from unittest.mock import MagicMock

import torch

from arpo_nb.training.bench import limits
from arpo_nb.training.rollout import Clock
from arpo_nb.weights import import_torchvision

ours, authors = Clock(), Clock() # `with ours('decode'):` adds seconds to a part


def official(folder):
    "Let their modules be imported, without what only their logs and launchers need"
    warnings.simplefilter('ignore')
    sys.path.insert(0, folder)
    import_torchvision() # also beside a torch of another build
    for name in ('wandb', 'datasets', 'deepspeed'): sys.modules.setdefault(name, MagicMock(spec=ModuleType(name)))


def gradients(net): return {n: p.grad for n, p in net.named_parameters() if p.grad is not None}

def must_agree(rewards, theirs, grads, their_grads):
    "Raise unless rewards and gradients of the same samples are the same, and say how far apart they are"
    assert grads.keys() == their_grads.keys()
    apart = max(((grads[n] - g).norm()/g.norm()).item() for n, g in their_grads.items() if g.norm() > 0)
    print(f'rewards differ by {(rewards - theirs).abs().max():.1e}, gradients by {apart:.1e} of their size', flush=True)
    assert (rewards - theirs).abs().max() < 1e-4 and apart < 1e-3


def compare(repeat, step, their_step):
    "Seconds of both steps, one after the other, by part"
    for clock in (ours, authors): clock.seconds.clear()
    for _ in range(repeat): step(); their_step()
    rows = [(name, ours.seconds[name], authors.seconds[name]) for name in ours.seconds]
    for name, a, b in [*rows, ('whole', sum(ours.seconds.values()), sum(authors.seconds.values()))]:
        print(f'{name:10} ours {a/repeat:8.2f}  authors {b/repeat:8.2f}  ratio {b/a:6.2f}')


@torch.no_grad()
def timed(run, *args, **kw):
    "Seconds of a call, and what it returns"
    start = time.perf_counter(); out = run(*args, **kw)
    return time.perf_counter() - start, out

def machine(dtype=torch.float32):
    "Operations and bytes per second of this process's threads, which are printed"
    flops, bandwidth = limits('cpu', dtype, side=4096)
    print(f'{torch.get_num_threads()} threads: 4096³ matrix product {flops/1e9:.0f} GFLOP/s, memory {bandwidth/1e9:.1f} GB/s', flush=True)
    return flops, bandwidth
