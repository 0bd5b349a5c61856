"""VQGAN's class-conditional sampler against the official one, on the CPU, in float32, with shared random weights.

    git clone https://github.com/CompVis/taming-transformers
    python scripts/bench_vqgan.py --official taming-transformers [--layers 48] [--tokens 256] [--threads 2] [--cells 1 8] [--repeat 1]

A cell is a batch size. First both draw greedy tokens, which must be equal; then each cell draws as many tokens, one side after the other.
The limit is what the weights and the cache cost at the measured speeds of a large matrix product and of memory.
"""
import argparse
import sys

import beside
import torch

from arpo_nb.models.janus import import_transformers
from arpo_nb.models.vqgan import CINConfig, CINTransformer
from arpo_nb.protocols import Streams
from arpo_nb.training.bench import sampling_limit

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--official', required=True, help='folder of the official code')
parser.add_argument('--cells', nargs='+', type=int, default=[1, 8])
for name, default in dict(layers=48, tokens=256, threads=2, repeat=1).items(): parser.add_argument(f'--{name}', type=int, default=default)
args = parser.parse_args()
torch.set_num_threads(args.threads)
sys.path.insert(0, args.official)
import_transformers()
sys.modules['transformers'].top_k_top_p_filtering = None # newer ones have it no more, and it is not called here
from taming.modules.transformer import mingpt

torch.manual_seed(0)
cfg = CINConfig(n_layer=args.layers)
ours = CINTransformer(cfg).eval()
with torch.device('meta'): theirs = mingpt.GPT(cfg.vocab_size, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd).eval()
masks = {name: torch.ones(1, 1, cfg.block_size, cfg.block_size).tril() for name in theirs.state_dict() if name.endswith('attn.mask')}
theirs.load_state_dict(ours.state_dict() | masks, assign=True)
ours.num_tokens = args.tokens

def run_ours(n, greedy=False): return ours.generate(torch.arange(n), Streams.range(0, 0, n), greedy=greedy)
def run_theirs(n, greedy=False): return mingpt.sample_with_past(torch.arange(n)[:, None], theirs, args.tokens, sample_logits=not greedy)

a, b = (beside.timed(run, 2, greedy=True)[1] for run in (run_ours, run_theirs))
print(f'greedy tokens, 2 images: {(a == b).float().mean().item():.2%} equal, {len(a.unique())} different ones', flush=True)
fast = beside.machine()
for n in args.cells*args.repeat:
    x, y = (args.tokens*n/beside.timed(run, n)[0] for run in (run_ours, run_theirs))
    print(f'batch {n}: ours {x:.1f} tokens/s, official {y:.1f}, ratio {x/y:.2f}; ours at {x/args.tokens/n*sampling_limit(ours, n, fast):.0%} of the limit', flush=True)
