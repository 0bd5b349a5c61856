"""VAR's sampler against the official one, and one pass against a replay, on the CPU, in float32, with shared random weights.

    git clone https://github.com/FoundationVision/VAR
    python scripts/bench_var.py --official VAR [--threads 2] [--cells 1 1g 8 8g] [--repeat 1]

A cell is a batch size, with `g` for VAR's cfg 1.5. First both draw the most probable codes, whose pictures must agree. The last lines time the
log-probabilities of given codes: one teacher-forced pass against going through the ten scales with a cache, as the sampler does.
The limit is what weights, products and cache cost the transformer at the measured speeds of a large matrix product and of memory.
"""
import argparse
import contextlib
import io
import sys
import time

import beside
import torch

from arpo_nb.models.multiscale_vq import MultiScaleConfig, MultiScaleVQ
from arpo_nb.protocols import Streams
from arpo_nb.training.bench import sampling_limit
from arpo_nb.training.rollout import token_logps
from arpo_nb.models.var import VAR, replay, var_config

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--official', required=True, help='folder of the official code')
parser.add_argument('--cells', nargs='+', default=['1', '1g', '8', '8g'])
for name, default in dict(depth=16, threads=2, repeat=1, rows=8).items(): parser.add_argument(f'--{name}', type=int, default=default)
args = parser.parse_args()
torch.set_num_threads(args.threads)

vq = MultiScaleVQ(MultiScaleConfig()).eval()
ours = VAR(var_config(f'var_d{args.depth}'), vq.quantize).eval()
sys.path.insert(0, args.official)
from models import build_vae_var # after our modules are built: it switches off torch's initialisation

torch.manual_seed(0)
with contextlib.redirect_stdout(io.StringIO()):
    vae, theirs = build_vae_var(V=4096, Cvae=32, ch=160, share_quant_resi=4, device='cpu', patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), num_classes=1000, depth=args.depth, shared_aln=False)
for module in (vae, theirs):
    module.eval()
    with torch.no_grad():
        for name, p in module.named_parameters(): p.normal_(mean=float(p.dim() == 1 and name.endswith('weight')), std=.02)
torch.nn.init.normal_(vae.quantize.embedding.weight)
vq.load_state_dict(vae.state_dict()); ours.load_state_dict(theirs.state_dict())

spent = [0.]
def timed_decoder(f_hat, decode=vae.fhat_to_img):
    start = time.perf_counter(); images = decode(f_hat); spent[0] += time.perf_counter() - start
    return images
vae.fhat_to_img = timed_decoder

def run_theirs(n, cfg, top_k=900, top_p=.96):
    "Pictures in [0, 1], seconds of the transformer and of the decoder"
    spent[0], start = 0., time.perf_counter()
    images = theirs.autoregressive_infer_cfg(n, torch.arange(n), g_seed=0, cfg=cfg, top_k=top_k, top_p=top_p)
    return images, time.perf_counter() - start - spent[0], spent[0]

def run_ours(n, cfg, greedy=False):
    start = time.perf_counter(); tokens = ours.generate(torch.arange(n), Streams.range(0, 0, n), cfg_scale=1 + cfg, top_k=900, top_p=.96, greedy=greedy)
    middle = time.perf_counter(); images = vq.decode(tokens)
    return images, middle - start, time.perf_counter() - middle

torch.set_grad_enabled(False)
difference = (run_ours(2, 1.5, greedy=True)[0] - run_theirs(2, 1.5, top_k=1, top_p=0.)[0]).abs().max()
print(f'most probable codes, guided: pictures differ by at most {difference:.1e}', flush=True)
fast = beside.machine()
for cell in args.cells*args.repeat:
    n, cfg = int(cell.strip('g')), 1.5 if 'g' in cell else 0.
    (_, a, b), (_, c, d) = run_ours(n, cfg), run_theirs(n, cfg)
    print(f'batch {n}{", cfg 1.5" if cfg else ""}: ours {n/(a+b):.3f} images/s ({a:.1f} s transformer, {b:.1f} s decoder), official {n/(c+d):.3f} ({c:.1f} s, {d:.1f} s), '
          f'ratio {(c+d)/(a+b):.2f} (transformer {c/a:.2f}, decoder {d/b:.2f}); transformer at {sampling_limit(ours, n*(1 + bool(cfg)), fast)/a:.0%} of the limit', flush=True)
labels, tokens = torch.arange(args.rows), torch.randint(4096, (args.rows, 680))
def one_pass(): return token_logps(ours, ours.hidden(tokens, labels), tokens[:, None], chunk=10**6)[0][:, 0]
def ten_scales(): return replay(ours, tokens, labels).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
assert torch.allclose(one_pass(), ten_scales(), atol=1e-4)
a, b = (min(beside.timed(f)[0] for _ in range(2)) for f in (one_pass, ten_scales))
print(f'log-probabilities of {args.rows} × 680 codes: one pass {a:.2f} s, ten scales {b:.2f} s, ratio {b/a:.2f}')
