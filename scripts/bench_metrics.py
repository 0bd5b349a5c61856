"""Fréchet distance against pytorch-fid and torch-fidelity, and memory of precision and recall.

    pip install --no-deps pytorch-fid torch-fidelity
    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python scripts/bench_metrics.py fid
    OMP_NUM_THREADS=1 python scripts/bench_metrics.py pr
"""
import resource
import sys
import time

import numpy as np
import torch

from arpo_nb.evaluation.evaluate import frechet_distance, moments, precision_recall
from arpo_nb.weights import import_torchvision


def pool_like(n, shift, seed):
    "[n, 2048] float32: correlated, not negative, as pooled features are"
    mix = np.random.default_rng(0).standard_normal((256, 2048)).astype(np.float32)/16
    rng = np.random.default_rng(seed)
    return np.maximum(.4*rng.standard_normal((n, 256), np.float32)@mix + .25*rng.standard_normal((n, 2048), np.float32) + shift, 0)


def fid(n=10_000, repeats=3):
    "CPU seconds and distance of `n` features against stored moments"
    import_torchvision()
    from pytorch_fid.fid_score import calculate_frechet_distance
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    fake, (mu, sigma) = pool_like(n, .25, 2), moments(torch.from_numpy(pool_like(n, .2, 1)))
    alike = lambda s: dict(mu=mu.numpy().astype(s['mu'].dtype), sigma=sigma.numpy().astype(s['sigma'].dtype))
    tools = {'ours': (lambda: moments(torch.from_numpy(fake)), lambda s: frechet_distance(mu, sigma, *s)),
             'torch-fidelity': (lambda: fid_features_to_statistics(torch.from_numpy(fake)), lambda s: list(fid_statistics_to_metric(alike(s), s, False).values())[0]),
             'pytorch-fid': (lambda: (fake.mean(0), np.cov(fake, rowvar=False)), lambda s: calculate_frechet_distance(mu.numpy(), sigma.numpy(), *s))}
    for name in [*tools]*repeats:
        a = time.process_time(); s = tools[name][0]()
        b = time.process_time(); d = tools[name][1](s)
        c = time.process_time()
        print(f'{name:15} {float(d):.8f}   moments {b-a:.2f} s   distance {c-b:.2f} s', flush=True)


def pr(real=10_000, fake=50_000):
    "Peak memory of precision and recall, features included"
    a, b = (torch.cat([torch.from_numpy(pool_like(5000, .2, s+i)) for i in range(n//5000)]) for n, s in ((real, 1), (fake, 100)))
    start = time.process_time()
    print(precision_recall(a, b), f'{time.process_time() - start:.0f} CPU s, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e3:.0f} MB')


if __name__ == '__main__': {'fid': fid, 'pr': pr}[sys.argv[1]]()
