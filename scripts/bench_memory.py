"A real step's memory beside its rehearsal: python scripts/bench_memory.py [--model llamagen_b] [--method vapi] [--set A=1,B=2]"
import argparse
import json
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import psutil
import torch
from torch.profiler import ProfilerActivity, profile

from arpo_nb.config import override, preset
from arpo_nb.protocols import Batch
from arpo_nb.systems import load_reward, system_of
from arpo_nb.training.rehearse import FakeData, rehearse
from arpo_nb.training.trainer import train

SMALL = 'batch_size=2,num_generations=2,micro_batch_size=1,mixed_precision=no,steps=2' # minutes of a CPU


class Noise(FakeData):
    "Batches whose pictures are noise"
    def batches(self, *args, **kwargs):
        for b in super().batches(*args, **kwargs):
            images = None if b.images is None else torch.rand(b.images.shape)
            yield Batch(b.cond, b.streams, images, b.prompts)


def peak_of_process() -> int: # bytes, since the process began
    import resource
    return 1024*resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def allocated(trace: Path) -> int: # bytes
    "The most that PyTorch had asked for at a time, from its profiler's own account"
    events = json.loads(trace.read_text())['traceEvents']
    cpu = [e['args']['Total Allocated'] for e in events if e.get('name') == '[memory]' and e['args'].get('Device Type') == 0]
    return max(cpu)


def train_once(cfg):
    "Two steps on noise, from random weights"
    warnings.simplefilter('ignore')
    with tempfile.TemporaryDirectory() as folder:
        system = system_of(cfg)
        train(system, Noise(system, cfg), cfg, folder, reward=load_reward(cfg, system), progress=False)


def of_process(cfg) -> dict: # name → bytes
    "What a process of its own grew by"
    before = psutil.Process().memory_info().rss
    train_once(cfg)
    if torch.cuda.is_available(): return dict(allocated=torch.cuda.max_memory_allocated(), reserved=torch.cuda.max_memory_reserved())
    return dict(process=peak_of_process() - before)


def of_tensors(cfg) -> dict: # name → bytes
    "What PyTorch had asked for; the account itself takes memory, hence another process"
    if torch.cuda.is_available(): return {}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen: train_once(cfg)
    with tempfile.TemporaryDirectory() as folder:
        seen.export_chrome_trace(str(trace := Path(folder)/'trace.json'))
        return dict(allocated=allocated(trace))


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--model', default='llamagen_b')
    p.add_argument('--method', default='vapi')
    p.add_argument('--set', default=SMALL)
    args = p.parse_args()
    warnings.simplefilter('ignore')
    cfg = override(preset(args.model, args.method), args.set, weights='random')
    start, found = time.perf_counter(), {}
    for f in (of_process, of_tensors):
        with ProcessPoolExecutor(1, get_context('spawn')) as alone: found |= alone.submit(f, cfg).result()
    print(f'{args.model}, {args.method}, {args.set}: {time.perf_counter() - start:.0f} s')
    said = rehearse(cfg).peak
    for name, n in dict(rehearsed=said, **found).items(): print(f'{name:10} {n/1e9:6.2f} GB, {n/said:.2f} of the rehearsal')


if __name__ == '__main__': main()
