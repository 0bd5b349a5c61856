"""A whole step of AR-GRPO beside the authors' code, on the CPU, in float32, with shared random weights.

    git clone https://github.com/Kwai-Klear/AR-GRPO
    python scripts/bench_argrpo.py --official AR-GRPO [--size B] [--prompts 1] [--generations 4] [--side 256] [--threads 2]

Their networks and functions do what their trainer does with them: a guided sampler that keeps all logits, a mask for each sample,
scores image by image (CLIP B/32 of the three rewards), the reference in a pass of its own, an entropy of kept logits.
First rewards, and for the same rewards all gradients, must agree on the same samples; then the parts are timed, one side after the other.
"""
import argparse
from dataclasses import replace

import beside
import torch

from arpo_nb.config import override, preset
from arpo_nb.maths.grpo import group_advantages
from arpo_nb.models.llamagen import GPT, gpt_config
from arpo_nb.models.tokenizers import VQConfig, VQModel
from arpo_nb.protocols import Batch, Streams, System
from arpo_nb.systems import load_reward
from arpo_nb.training.objectives import PolicyGradient
from arpo_nb.training.rollout import free_running, rollout_logps

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--official', required=True, help='folder of the authors\' code')
parser.add_argument('--size', default='B')
for name, default in dict(prompts=1, generations=4, side=256, threads=2, repeat=1).items(): parser.add_argument(f'--{name}', type=int, default=default)
args = parser.parse_args()
torch.set_num_threads(args.threads)
beside.official(args.official)
from autoregressive.models.generate import generate
from autoregressive.models.gpt import GPT_models
from tokenizer_lg.tokenizer_image.vq_model import VQ_models

B, G, T, SCALE, BETA = args.prompts, args.generations, (args.side//16)**2, 2., .1
torch.manual_seed(0)
policy, reference, vq = GPT(gpt_config(args.size, args.side)).eval(), GPT(gpt_config(args.size, args.side)).eval(), VQModel(VQConfig(image_size=args.side)).eval()
for net in (policy, reference): torch.nn.init.normal_(net.output.weight, std=.02)
def as_theirs(net):
    "Their network with the weights of one of ours"
    made = GPT_models[f'GPT-{args.size}'](vocab_size=16384, block_size=T, num_classes=1000, cls_token_num=1, model_type='c2i').eval()
    made.load_state_dict(net.state_dict())
    return made
gpt, their_reference = as_theirs(policy), as_theirs(reference)
vq_model = VQ_models['VQ-16'](codebook_size=16384, codebook_embed_dim=8).eval()
vq_model.load_state_dict(vq.state_dict(), strict=False)
cfg = override(preset('llamagen_b', 'ar_grpo'), '', batch_size=B, num_generations=G, micro_batch_size=0, mini_batch_size=0, rewards='5*clip_b32',
               weights='random', gradient_checkpointing=False, mixed_precision='no', decode_batch_size=8)
system = System('bench', policy, vq, None, num_classes=1000)
reward = load_reward(cfg, system)
batch = system.with_prompts(Batch(torch.arange(B), Streams.range(0, 0, B)))


def one(pictures, i):
    "The score of one picture [H, W] by its prompt"
    return reward(pictures[i][None, None], batch.take(slice(i//G, i//G + 1)), None)[0].flatten()

def logits_of(net, tokens):
    "As their model's forward pass: a mask for each sample, all positions"
    net.disable_caches()
    n = len(tokens)
    mask = torch.tril(torch.ones(n, T + 1, T + 1))[:, None].bool()
    logits, _ = net(cond_idx=batch.cond.repeat_interleave(G)[:, None], idx=tokens, targets=None, mask=mask, input_pos=torch.arange(T + 1))
    return logits[:, :-1]

def logps_of(net, tokens): return logits_of(net, tokens).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]

def theirs(tokens=None, scores=None):
    "Their step: rewards, loss and gradients of given samples, or of drawn ones; advantages are of given rewards, or of its own"
    with torch.no_grad():
        with beside.authors('samples'):
            drawn = generate(gpt, batch.cond.repeat_interleave(G), T, cfg_scale=SCALE, temperature=1., top_k=0, top_p=1., sample_logits=True, return_logits=True)
        flat = drawn['output_ids'].long() if tokens is None else tokens.flatten(0, 1)
        kept = torch.cat([x.view(len(flat), 1, -1) for x in drawn['logits']], 1)
        with beside.authors('decode'): pictures = (vq_model.decode_code(flat, [len(flat), 8, args.side//16, args.side//16]) + 1).mul(.5).clamp(0, 1)
        with beside.authors('reward'): rewards = torch.cat([one(pictures, i) for i in range(len(flat))])
        with beside.authors('reference'): ref = logps_of(their_reference, flat)
    advantages = group_advantages(rewards.view(B, G) if scores is None else scores).flatten()[:, None]
    with beside.authors('update'):
        gpt.zero_grad()
        logps = logps_of(gpt, flat)
        ratio, kl = (logps - logps.detach()).exp(), (ref - logps).exp() - (ref - logps) - 1
        (kept.logsumexp(-1) - (kept.softmax(-1)*kept).sum(-1)).mean()
        loss = (-torch.minimum(ratio*advantages, ratio.clamp(.8, 1.2)*advantages) + BETA*kl).mean()
        loss.backward()
    return rewards.view(B, G), loss.detach(), beside.gradients(gpt)

def ours():
    "Our step: samples, rewards, loss and gradients"
    with beside.ours('samples'): r = free_running(policy, batch, num_generations=G, cfg_scale=SCALE, micro_batch_size=0)
    with torch.no_grad():
        with beside.ours('decode'): pictures = vq.decode(r.tokens.flatten(0, 1)).unflatten(0, (B, G))
        with beside.ours('reward'): rewards = reward(pictures, batch, None)[0]
        with beside.ours('reference'): ref = rollout_logps(reference, r)[0]
    with beside.ours('update'):
        objective.zero_grad()
        loss = objective(replace(r, rewards=rewards, advantages=group_advantages(rewards), ref_logps=ref))[0]
        loss.backward()
    return r.tokens, rewards, loss.detach(), beside.gradients(policy)

objective = PolicyGradient(system, cfg)
tokens, mine, loss, grads = ours()
their, their_loss, their_grads = theirs(tokens, mine) # rewards of a group that are close make differences large
print(f'the loss differs by {(loss - their_loss).abs():.1e}')
beside.must_agree(mine, their, grads, their_grads)
print(f'{args.size}, {args.side} pixels, {B} prompts x {G} samples, guidance {SCALE}, {args.threads} threads; seconds of a step')
beside.compare(args.repeat, ours, theirs)
