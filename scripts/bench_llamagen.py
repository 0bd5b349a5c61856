"""LlamaGen's class-conditional sampler against the official one, on the CPU, with shared random weights.

    git clone https://github.com/FoundationVision/LlamaGen
    python scripts/bench_llamagen.py --official LlamaGen [--size B] [--threads 2] [--cells 1 8 8g 32g] [--dtype float32] [--repeat 1]

A cell is a batch size, with `g` for guidance 1.5. First both draw greedy tokens, which must be equal in float32; then each cell draws whole images, one side after the other.
The limit is what the weights and the cache cost at the measured speeds of a large matrix product and of memory.
"""
import argparse
import sys

import beside
import torch

from arpo_nb.models.llamagen import GPT, gpt_config
from arpo_nb.protocols import Streams
from arpo_nb.training.bench import sampling_limit

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--official', required=True, help='folder of the official code')
parser.add_argument('--size', default='B', choices=['B', 'L', 'XL'])
parser.add_argument('--cells', nargs='+', default=['1', '8', '8g', '32g'])
parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16'])
for name, default in dict(threads=2, repeat=1).items(): parser.add_argument(f'--{name}', type=int, default=default)
args = parser.parse_args()
torch.set_num_threads(args.threads)
dtype = getattr(torch, args.dtype)
sys.path.insert(0, args.official)
from autoregressive.models import generate, gpt as official

torch.manual_seed(0)
theirs = getattr(official, f'GPT_{args.size}')(block_size=256, vocab_size=16384, num_classes=1000, cls_token_num=1, model_type='c2i').eval()
torch.nn.init.normal_(theirs.output.weight, std=.02) # the official initialisation is zero
ours = GPT(gpt_config(args.size)).eval()
ours.load_state_dict(theirs.state_dict(), strict=True)
for side in ours, theirs: side.to(dtype)

def run_ours(n, scale, greedy=False): return ours.generate(torch.arange(n), Streams.range(0, 0, n), cfg_scale=scale, greedy=greedy)

def run_theirs(n, scale, greedy=False):
    return generate.generate(theirs, torch.arange(n), 256, cfg_scale=scale, temperature=1., top_k=0, top_p=1., sample_logits=not greedy)

a, b = (beside.timed(run, 2, 1.5, greedy=True)[1].long() for run in (run_ours, run_theirs))
print(f'greedy tokens, 2 images, guidance 1.5: {(a == b).float().mean().item():.2%} equal, {len(a.unique())} different ones', flush=True)
fast = beside.machine(dtype)
for cell in args.cells*args.repeat:
    n, scale = int(cell.strip('g')), 1.5 if 'g' in cell else 1.
    x, y = (256*n/beside.timed(run, n, scale)[0] for run in (run_ours, run_theirs))
    print(f'batch {n}{", guidance 1.5" if scale > 1 else ""}: ours {x:.1f} tokens/s, official {y:.1f}, ratio {x/y:.2f}; ours at {x/256/n*sampling_limit(ours, n*(1 + (scale > 1)), fast):.0%} of the limit', flush=True)
