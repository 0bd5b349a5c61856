"""One free-running iteration, ours beside the way public trainers write it, on the same tokens; CPU or GPU.

    OMP_NUM_THREADS=1 python scripts/bench_iteration.py [--model toy] [--prompts 12] [--generations 12] [--repeat 3]

The public way (AR-GRPO's trainer, a TRL descendant): images are decoded and scored one at a time, full-vocabulary logits are kept
in float32 to take log-probabilities and entropy from, and old, reference and new log-probabilities are a pass each over everything.
Sampling is the same in both and is timed apart. Equality is checked first: rewards, loss and gradients."""
import argparse
import statistics
import time
import warnings
from dataclasses import replace

import torch

from arpo_nb.config import preset
from arpo_nb.data.images import batches
from arpo_nb.maths.grpo import group_advantages, grpo_loss
from arpo_nb.systems import load_data, load_reward, load_system
from arpo_nb.protocols import repeat_cond
from arpo_nb.training.rollout import free_running, rollout_logps, score_groups

def ours(system, reward, r, cfg, ref):
    "Batched decoding and rewards, logits in chunks"
    rewards, _ = score_groups(reward, system.tokenizer, r.tokens, r.batch, None, cfg.decode_batch_size)
    with torch.no_grad():
        old, ref_logps = (rollout_logps(p, r)[0] for p in (system.policy, ref))
    logps, _, entropy = rollout_logps(system.policy, r)
    loss, _ = grpo_loss(logps, old, group_advantages(rewards, unbiased=False, eps=1e-4), ref_logps=ref_logps, beta=.1)
    loss.backward()
    return rewards, loss.detach(), entropy.mean()

def public(system, reward, r, cfg, ref):
    "One image at a time, all logits at once"
    b, g, t = r.tokens.shape
    cond, tokens = repeat_cond(r.batch.cond, g), r.tokens.flatten(0, 1)
    with torch.no_grad():
        pixels = torch.cat([system.tokenizer.decode(x[None]) for x in tokens])
        each = {n: reward_one(part, pixels.unflatten(0, (b, g)), r) * w for n, (part, w) in reward.rewards.items()}
        rewards = sum(x/x.std() for x in each.values())
    def logits(policy): return policy.head(policy.hidden(tokens, cond)).float()
    with torch.no_grad():
        old = logits(system.policy).log_softmax(-1).gather(-1, tokens[..., None])[..., 0].unflatten(0, (b, g))
        ref_logps = logits(ref).log_softmax(-1).gather(-1, tokens[..., None])[..., 0].unflatten(0, (b, g))
    full = logits(system.policy).log_softmax(-1)
    entropy = -(full.exp()*full).sum(-1).detach().mean()
    loss, _ = grpo_loss(full.gather(-1, tokens[..., None])[..., 0].unflatten(0, (b, g)), old, group_advantages(rewards, unbiased=False, eps=1e-4), ref_logps=ref_logps, beta=.1)
    loss.backward()
    return rewards, loss.detach(), entropy

def reward_one(part, pixels, r):
    "Scores image by image"
    return torch.stack([torch.cat([part(pixels[i:i+1, j:j+1], r.batch.take(slice(i, i+1)), None)[0] for j in range(pixels.shape[1])], 1)[0] for i in range(len(pixels))])

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', default='toy')
    p.add_argument('--rewards', default='', help='default: class_score on the toy, clip_b32 with random weights elsewhere')
    for name, value in dict(prompts=12, generations=12, repeat=3).items(): p.add_argument(f'--{name}', type=int, default=value)
    a = p.parse_args()
    warnings.simplefilter('ignore')
    toy, device = a.model.startswith('toy'), 'cuda' if torch.cuda.is_available() else 'cpu'
    cfg = replace(preset(a.model, 'loofid'), rewards=a.rewards or ('class_score' if toy else 'clip_b32'), normalize_rewards=True, batch_size=a.prompts, num_generations=a.generations,
                  weights='default' if toy else 'random', micro_batch_size=0, gradient_checkpointing=False)
    system, ref = load_system(cfg.model, cfg.weights).to(device), load_system(cfg.model, cfg.weights, seed=1).policy.to(device)
    reward = load_reward(cfg, system)
    batch = system.with_prompts(next(iter(batches(load_data(cfg, system), cfg.batch_size, 0, 0, 1)))).to(device)
    wait = torch.cuda.synchronize if device == 'cuda' else lambda: None
    t = time.perf_counter(); r = free_running(system.policy, batch, num_generations=cfg.num_generations); wait()
    print(f'{a.model}: {a.prompts} × {a.generations} samples, generation and scoring {time.perf_counter() - t:.2f} s, the same for both')
    got = {}
    for f in (ours, public):
        system.policy.zero_grad()
        out = f(system, reward, r, cfg, ref)
        got[f.__name__] = (*out, torch.cat([q.grad.flatten() for q in system.policy.parameters() if q.grad is not None]))
    for name, x, y in zip(('rewards', 'loss', 'entropy', 'gradients'), *got.values()): print(f'largest difference of {name}: {(x - y).abs().max():.2e} at a scale of {y.abs().max():.2e}')
    seconds = {f.__name__: [] for f in (ours, public)}
    for _ in range(a.repeat):
        for f in (ours, public):
            system.policy.zero_grad(); wait(); t = time.perf_counter()
            f(system, reward, r, cfg, ref); wait()
            seconds[f.__name__].append(time.perf_counter() - t)
    mid = {k: statistics.median(v) for k, v in seconds.items()}
    print(', '.join(f'{k} {v:.2f} s' for k, v in mid.items()), f"ratio {mid['public']/mid['ours']:.2f}")

if __name__ == '__main__': main()
