"""What bounds a sampler on this CPU: how fast a few rows read a weight, plain and packed, and one query its keys and values.

    python scripts/bench_products.py [--threads 2] [--rows 1 2 8 16 64] [--dtype float32]

GB/s of weights read, of as many copies as no cache holds, by the two libraries that `packed_weights` chooses from, and microseconds of a call on
a tiny weight; then GB/s of keys and values read by three ways of attending with one query, 12 heads of 64, caches of 256 filled to the number given.
"""
import argparse
import time

import torch
import torch.nn.functional as F

from arpo_nb.models.llamagen import _mkl, _onednn

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--threads', type=int, default=2)
parser.add_argument('--rows', type=int, nargs='+', default=[1, 2, 8, 16, 64])
parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16'])
args = parser.parse_args()
torch.set_num_threads(args.threads)
torch.set_grad_enabled(False)
dtype = getattr(torch, args.dtype)


def seconds(f, repeat=7):
    "The least of several calls, after one that does not count"
    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter(); f()
        times.append(time.perf_counter() - start)
    return min(times[1:])

def ways():
    "Name → what makes a product with a weight"
    plain = {'plain': lambda w, rows: lambda x, bias: F.linear(x, w, bias)}
    return plain | ({'MKL': _mkl} if dtype == torch.float32 and torch.backends.mkl.is_available() else {}) | {'oneDNN': _onednn}

def products(k, n, rows, copies):
    "Seconds of a product, by way"
    weights, x = torch.randn(copies, n, k).mul(.02).to(dtype), torch.randn(rows, k).to(dtype)
    made = {name: [make(w, rows) for w in weights] for name, make in ways().items()}
    return {name: seconds(lambda: [f(x, None) for f in made[name]])/copies for name in made}

for k, n in ((768, 2304), (2048, 768), (768, 16384)):
    for rows in args.rows:
        size = k*n*dtype.itemsize
        said = ', '.join(f'{name} {size/s/1e9:.1f}' for name, s in products(k, n, rows, max(1, 10**8//size)).items())
        print(f'{k} → {n}, {rows} rows: {said} GB/s', flush=True)
print('8 → 8, 1 row: ' + ', '.join(f'{name} {1e6*s:.0f}' for name, s in products(8, 8, 1, 200).items()) + ' µs')

def fused(q, k, v): return F.scaled_dot_product_attention(q, k, v)
def batched(q, k, v): return (q @ k.mT).mul_(.125).softmax(-1) @ v
def elementwise(q, k, v): return ((k*q).sum(-1, keepdim=True).mul_(.125).softmax(-2)*v).sum(-2, keepdim=True)

for rows in (8, 16):
    for filled in (128, 255):
        q, kept = torch.randn(rows, 12, 1, 64).to(dtype), [torch.randn(2, rows, 12, 256, 64).to(dtype) for _ in range(6)]
        looks = {f.__name__: seconds(lambda: [f(q, *c[:, :, :, :filled]) for c in kept])/6 for f in (fused, batched, elementwise)}
        size = 2*rows*12*filled*64*dtype.itemsize
        print(f'attention, {rows} rows, {filled} of 256: ' + ', '.join(f'{name} {size/s/1e9:.1f}' for name, s in looks.items()) + ' GB/s', flush=True)
