"""Janus-Pro generation against transformers' own `generate`, on this machine, with random weights.

    python scripts/bench_janus.py [janus_pro_1b] [--images 1] [--tokens 16] [--dtype float32] [--threads 1]

Both sides share one set of weights and the same prompts; codes are compared greedily and with the same random numbers.
Fewer codes than 576 are drawn, so prompt and set-up weigh more than in a whole picture; `--repeat` runs both sides in turn.
"""
import argparse
import time
from dataclasses import replace
from unittest.mock import patch

import torch

from arpo_nb.models.janus import CONFIGS, VQ, JanusPolicy, import_transformers, transformers_config
from arpo_nb.protocols import Streams
from arpo_nb.maths.sampling import draw

parser = argparse.ArgumentParser()
parser.add_argument('model', nargs='?', default='janus_pro_1b', choices=list(CONFIGS))
for name, default in dict(images=1, tokens=16, threads=1, prompt=20, repeat=2, layers=0).items(): parser.add_argument(f'--{name}', type=int, default=default)
parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16'])
args = parser.parse_args()
torch.set_num_threads(args.threads)
dtype = getattr(torch, args.dtype)

cfg = replace(CONFIGS[args.model][0], num_tokens=args.tokens)
if args.layers: cfg = replace(cfg, n_layer=args.layers)
tf = import_transformers()
tf.logging.set_verbosity_error()
torch.manual_seed(0)
with torch.device('meta'): ours, theirs = JanusPolicy(cfg), tf.JanusForConditionalGeneration(transformers_config(cfg, VQ, num_hidden_layers=1))
ours = ours.to_empty(device='cpu').to(dtype).eval()
with torch.no_grad():
    for name, p in ours.named_parameters(): p.fill_(1.) if name.endswith('norm.weight') or 'layernorm' in name else p.normal_(std=.04)
for name in ('language_model', 'generation_embeddings', 'generation_aligner', 'generation_head'): # the same tensors in transformers' class
    getattr(theirs.model, name).load_state_dict(getattr(ours, name).state_dict(), assign=True)
for name, buffer in ours.language_model.rotary_emb.named_buffers(): setattr(theirs.model.language_model.rotary_emb, name, buffer.clone())
theirs.eval()
settings, i = theirs.generation_config, cfg.ids
settings.bos_token_id, settings.pad_token_id, settings.eos_token_id, settings.generation_kwargs = i.bos, i.pad_tag, i.eos, dict(boi_token_id=i.boi)

n = args.images
ids = torch.randint(1000, 90000, (n, args.prompt))
ids[:, 0], ids[:, -1] = i.bos, i.boi
cond, streams = (ids, torch.ones_like(ids)), Streams.range(0, 0, n)

def run_theirs(sample):
    kw = dict(input_ids=ids, attention_mask=cond[1], generation_mode='image', guidance_scale=5.)
    if not sample: return theirs.generate(**kw, do_sample=False)
    u = iter(streams.uniform(cfg.num_tokens).unbind(1))
    with patch('torch.multinomial', lambda p, num_samples: draw(p.float().log(), next(u)[:, None])): return theirs.generate(**kw, do_sample=True, top_k=0)

def run_ours(sample): return ours.generate(cond, streams, cfg_scale=5., greedy=not sample)

with torch.inference_mode():
    for sample in (False, True):
        seconds = dict(ours=[], theirs=[])
        for _ in range(args.repeat):
            for name, run in dict(ours=run_ours, theirs=run_theirs).items():
                start = time.perf_counter(); codes = run(sample); seconds[name].append(time.perf_counter() - start)
                globals()[name + '_codes'] = codes
        a, b = (min(s) for s in seconds.values())
        same = (ours_codes == theirs_codes).float().mean().item()
        print(f"{args.model} {args.dtype} {cfg.n_layer} layers, {n} images × {args.tokens} codes, {'sampled' if sample else 'greedy'}: ours {a:.2f} s, transformers {b:.2f} s, ratio {b/a:.2f}, same codes {same:.1%}", flush=True)
