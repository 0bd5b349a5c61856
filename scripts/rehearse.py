"The table of rehearsals: every model and method on 1, 8 and 64 devices of 80 GB, as JSON; goes on where it stopped"
import argparse
import json
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

METHODS, DEVICES, MEMORY = ('vapi', 'mle', 'ste', 'tokenizer', 'loofid', 'ar_grpo', 'var_grpo'), (1, 8, 64), 80e9


def cell(model, method, n):
    "One cell: what fits, and what it takes; a text where there is none"
    from arpo_nb.config import preset
    from arpo_nb.training.rehearse import DEVICES, propose, step_seconds
    warnings.simplefilter('ignore')
    try:
        cfg = preset(model, method)
        whole = -(-cfg.batch_size//n)*n # conditions that n devices share evenly
        small = -(-cfg.mini_batch_size//n)*n
        cfg = replace(cfg, num_processes=n, batch_size=whole, mini_batch_size=small)
        fits, r = propose(cfg, MEMORY)
    except (ValueError, MemoryError, NotImplementedError) as e: return dict(why=f'{type(e).__name__}: {e}')
    changed = {k: v for k, v in asdict(fits).items() if v != getattr(cfg, k)}
    at_least = {d: sum(step_seconds(r, DEVICES[d]).values()) for d in ('A100 80GB', 'H100')}
    return dict(bytes=r.peak, kinds=r.kinds, shards=r.shards, changed=changed, batch_size=whole, seconds=at_least, steps=cfg.steps)


def main():
    from arpo_nb.specs import known_models
    p = argparse.ArgumentParser()
    p.add_argument('--out', type=Path, default=Path('results/rehearsal.json'))
    p.add_argument('--minutes', type=float, default=10.)
    p.add_argument('--workers', type=int, default=2)
    args = p.parse_args()
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    wanted = [(m, h, n) for n, m, h in product(DEVICES, known_models(), METHODS) if f'{m} {h} {n}' not in found]
    end, names = time.time() + 60*args.minutes, {}
    with ProcessPoolExecutor(args.workers, max_tasks_per_child=8) as pool:
        for c in wanted[:args.workers]: names[pool.submit(cell, *c)] = c
        left = iter(wanted[args.workers:])
        while names:
            done = next(as_completed(names))
            found[' '.join(map(str, names.pop(done)))] = done.result()
            args.out.write_text(json.dumps(found, indent=1) + '\n')
            if time.time() < end and (c := next(left, None)): names[pool.submit(cell, *c)] = c
    print(f'{len(found)} cells, {len(wanted)} were to be done')


if __name__ == '__main__': main()
