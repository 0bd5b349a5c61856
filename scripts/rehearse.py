"The table of rehearsals: every model and method on 1, 8 and 64 devices of 80 GB, as JSON; goes on where it stopped"
import argparse
import gc
import json
import os
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

METHODS, COUNTS, MEMORY = ('vapi', 'mle', 'ste', 'tokenizer', 'loofid', 'ar_grpo', 'var_grpo'), (1, 8, 64), 80e9 # the fast ones first
# what the papers ran, and on how many devices; their models come first
PAPERS = {('llamagen_xxl', 'vapi'): (8,), ('llamagen_l', 'loofid'): (1, 4), ('llamagen_xl', 'loofid'): (4,),
          ('var_d16', 'var_grpo'): (8,), ('var_d30', 'var_grpo'): (8,), ('janus_pro_1b', 'vapi'): (8,),
          ('janus_pro_7b', 'loofid'): (8,)}


RECORDS = {} # what this process has seen of networks, whatever they were a part of


def begin(parent):
    "Collect garbage rarely, which costs a tenth here; end this process when the one that started it has gone"
    gc.set_threshold(200_000, 20, 20)
    def watch():
        while os.getppid() == parent: time.sleep(.5)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def shared(cfg, n):
    "The configuration with as many conditions as n devices can share evenly, and as many updates"
    from arpo_nb.config import contexts
    whole, updates = -(-cfg.batch_size//n)*n, contexts(cfg)//(cfg.mini_batch_size or contexts(cfg))
    more = replace(cfg, batch_size=whole, mini_batch_size=0)
    small = contexts(more)//updates if cfg.mini_batch_size else 0
    return replace(more, num_processes=n, mini_batch_size=small)


def cell(cfg, n, parts):
    "What fits one of n devices, and what a step takes; a text where there is none"
    from arpo_nb.training.rehearse import DEVICES, propose, step_seconds
    cfg = shared(cfg, n)
    try: fits, r = propose(cfg, MEMORY, parts=parts, records=RECORDS)
    except (ValueError, RuntimeError, MemoryError, NotImplementedError) as e: return dict(why=f'{type(e).__name__}: {e}')
    changed = {k: v for k, v in asdict(fits).items() if v != getattr(cfg, k)}
    at_least = {d: round(sum(step_seconds(r, DEVICES[d]).values()), 4) for d in ('A100 80GB', 'H100')}
    kinds = {k: int(v) for k, v in r.kinds.items() if v > .01*r.peak}
    return dict(bytes=int(r.peak), kinds=kinds, shards=r.shards, changed=changed, batch_size=cfg.batch_size,
                mini_batch_size=cfg.mini_batch_size, checkpoint=int(r.checkpoint), seconds=at_least, steps=cfg.steps)


def layouts(model, _, counts):
    "Bytes of a device that trains on one picture at a time, alone, as one of eight copies, and with an eighth of the policy"
    from arpo_nb.config import preset
    from arpo_nb.training.rehearse import LAYOUTS, build, rehearse
    warnings.simplefilter('ignore')
    began, found = time.process_time(), {}
    cfg = replace(preset(model, 'mle'), micro_batch_size=1, mini_batch_size=0, gradient_checkpointing=True)
    parts = build(cfg)
    for name, (n, shards) in LAYOUTS.items():
        try: r = rehearse(replace(cfg, batch_size=n, num_processes=n), shards=shards, parts=parts, records=RECORDS)
        except (ValueError, RuntimeError, NotImplementedError) as e: found[name] = dict(why=f'{type(e).__name__}: {e}')
        else: found[name] = dict(bytes=int(r.peak), kinds={k: int(v) for k, v in r.kinds.items() if v > .01*r.peak})
    print(f'{model} layouts: {time.process_time() - began:.0f} s', flush=True)
    return found


def row(model, method, counts):
    "The cells of a model and a method, which share what has been seen"
    from arpo_nb.config import preset
    from arpo_nb.training.rehearse import build
    warnings.simplefilter('ignore')
    began = time.process_time()
    try:
        cfg = preset(model, method)
        parts = build(cfg)
    except (ValueError, ImportError, NotImplementedError) as e:
        return {str(n): dict(why=f'{type(e).__name__}: {e}') for n in counts}
    cells = {str(n): cell(cfg, n, parts) for n in counts}
    print(f'{model} {method}: {time.process_time() - began:.0f} s', flush=True)
    return cells


def main():
    from arpo_nb.specs import find_model, known_models
    p = argparse.ArgumentParser()
    p.add_argument('--out', type=Path, default=Path('results/rehearsal.json'))
    p.add_argument('--minutes', type=float, default=10.)
    p.add_argument('--workers', type=int, default=2)
    args = p.parse_args()
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    models = [m for m in known_models() if not find_model(m).shape] # the others have that of a file
    pairs = dict.fromkeys([*PAPERS, *((m, 'layouts') for m in models), *((m, h) for h, m in product(METHODS, models))])
    counts = {pair: tuple(sorted({*COUNTS, *PAPERS.get(pair, ())})) for pair in pairs}
    def left_of(pair): return tuple(n for n in counts[pair] if str(n) not in found.get(' '.join(pair), {}))
    wanted = [(*pair, left_of(pair)) for pair in pairs if left_of(pair) and not (pair[1] == 'layouts' and ' '.join(pair) in found)]
    first = [m for m, _ in PAPERS]
    order = dict.fromkeys([*first, *reversed(models)]) # small ones last, so that workers end together
    by_model = iter([rows for model in order if (rows := [r for r in wanted if r[0] == model])])
    end, lock = time.time() + 60*args.minutes, threading.Lock()

    def keep(name, cells):
        found[name] = found.get(name, {}) | cells
        in_order = {name: found[name] for name in [*map(' '.join, pairs), *found] if name in found}
        args.out.write_text(json.dumps(in_order, indent=1) + '\n')

    def go_on(_):
        "One process takes a model's rows, which share what has been seen, then those of the next model"
        with ProcessPoolExecutor(1, initializer=begin, initargs=(os.getpid(),)) as pool:
            while rows := next(by_model, ()):
                for model, method, counts in rows:
                    if time.time() > end: return
                    cells = pool.submit(layouts if method == 'layouts' else row, model, method, counts).result()
                    with lock: keep(f'{model} {method}', cells)

    with ThreadPoolExecutor(args.workers) as threads: list(threads.map(go_on, range(args.workers)))
    print(f'{len(found)} rows, {len(wanted)} were to be done')


if __name__ == '__main__': main()
