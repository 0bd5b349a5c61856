"""A whole step of VA-π beside the authors' trainer, on the CPU, in float32, with shared random weights.

    git clone https://github.com/Lil-Shake/VA-Pi
    python scripts/bench_step.py --official VA-Pi/LlamaGen [--size B] [--images 2] [--generations 8] [--threads 2]

Their networks and functions do what their loop does with them: a context for each sample, pictures eight at a time, the originals repeated.
First rewards and all gradients must agree on the same samples; then the parts are timed, one side after the other.
"""
import argparse
from dataclasses import replace

import beside
import torch
import torch.nn.functional as F

from arpo_nb.config import override, preset
from arpo_nb.maths.grpo import group_advantages
from arpo_nb.models.llamagen import GPT, gpt_config
from arpo_nb.models.tokenizers import VQConfig, VQModel
from arpo_nb.protocols import Batch, Streams, System
from arpo_nb.rewards import ReconstructionReward
from arpo_nb.scores.features import LPIPSFeatures
from arpo_nb.training.objectives import PolicyGradient
from arpo_nb.training.rollout import encode_images, teacher_forced

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--official', required=True, help='LlamaGen folder of the authors\' code')
parser.add_argument('--size', default='B')
for name, default in dict(images=2, generations=8, side=256, threads=2, repeat=1).items(): parser.add_argument(f'--{name}', type=int, default=default)
args = parser.parse_args()
torch.set_num_threads(args.threads)
beside.official(args.official)
from autoregressive.models.gpt import GPT_models
from autoregressive.train import train_c2i_ddp_grpo as official
from tokenizer.tokenizer_image.vq_model import VQ_models

B, G, T = args.images, args.generations, (args.side//16)**2
torch.manual_seed(0)
policy, vq = GPT(gpt_config(args.size, args.side)).eval(), VQModel(VQConfig(image_size=args.side)).eval()
torch.nn.init.normal_(policy.output.weight, std=.02)
perceptual = LPIPSFeatures(random=True).eval()
gpt = GPT_models[f'GPT-{args.size}'](vocab_size=16384, block_size=T, num_classes=1000, cls_token_num=1, model_type='c2i').eval()
vq_model = VQ_models['VQ-16'](codebook_size=16384, codebook_embed_dim=8).eval()
gpt.load_state_dict(policy.state_dict()); vq_model.load_state_dict(vq.state_dict(), strict=False)
images = torch.rand(B, 3, args.side, args.side)
batch = Batch(torch.arange(B), Streams.range(0, 0, B), images)
cfg = override(preset('llamagen_b'), '', batch_size=B, num_generations=G, micro_batch_size=0, mini_batch_size=0, prior_coef=.1, noise_rate=0.)
system = System('bench', policy, vq, perceptual, num_classes=1000)
reward = ReconstructionReward(perceptual)


def eight(f, *xs): return torch.cat([f(*(x[i:i+8] for x in xs)) for i in range(0, len(xs[0]), 8)])

def paid(pictures, originals):
    "Reward of pictures [n, 3, H, W], each with an original of its own"
    return reward(pictures[:, None], Batch(torch.arange(len(pictures)), Streams.range(0, 0, len(pictures)), originals))[0][:, 0]

def theirs(tokens=None):
    "Their step: rewards and gradients of given samples, or of drawn ones"
    with torch.no_grad():
        with beside.authors('encode'): gt = vq_model.encode(2*images - 1)[2][2].view(B, T)
        with beside.authors('samples'):
            logits = official.tf_logits(gpt, batch.cond, gt, 1, tf_input_override=gt[:, :-1])
            drawn = torch.stack([official.sample_one_sequence_from_tf(logits, 1., 0, 1.)[0] for _ in range(G)], 1)
            tokens = drawn if tokens is None else tokens
            old = logits.log_softmax(-1)[:, None].expand(-1, G, -1, -1).gather(-1, tokens[..., None])[..., 0].flatten(0, 1)
        flat = tokens.flatten(0, 1)
        with beside.authors('decode'): pictures = eight(lambda k: vq_model.decode_code(k, [len(k), 8, args.side//16, args.side//16]), flat)
        with beside.authors('reward'): rewards = eight(paid, (pictures + 1)/2, images.repeat_interleave(G, 0))
    advantages = group_advantages(rewards.view(B, G)).flatten()
    with beside.authors('update'):
        gpt.zero_grad()
        again = gt.repeat_interleave(G, 0)
        logits = official.tf_logits(gpt, batch.cond.repeat_interleave(G), again, 1, tf_input_override=again[:, :-1])
        ratio = (logits.log_softmax(-1).gather(-1, flat[..., None])[..., 0] - old).exp()
        gain = advantages[:, None]*ratio
        loss = -torch.minimum(gain, advantages[:, None]*ratio.clamp(.8, 1.2)).mean()
        (loss + .1*F.cross_entropy(logits.flatten(0, 1), again.flatten())).backward()
    return rewards.view(B, G), beside.gradients(gpt)

def ours():
    "Our step: samples, rewards and gradients"
    with beside.ours('encode'), torch.no_grad(): targets = encode_images(vq, images)
    with beside.ours('samples'): r = teacher_forced(policy, batch, targets, num_generations=G)
    with torch.no_grad():
        with beside.ours('decode'): pictures = vq.decode(r.tokens.flatten(0, 1), clamp=False).unflatten(0, (B, G))
        with beside.ours('reward'): rewards = reward(pictures, batch)[0]
    with beside.ours('update'):
        objective.zero_grad()
        objective(replace(r, rewards=rewards, advantages=group_advantages(rewards)))[0].backward()
    return r.tokens, rewards, beside.gradients(policy)

objective = PolicyGradient(system, cfg)
tokens, mine, grads = ours()
their, their_grads = theirs(tokens)
beside.must_agree(mine, their, grads, their_grads)
print(f'{args.size}, {args.side} pixels, {B} images x {G} samples, {args.threads} threads; seconds of a step')
beside.compare(args.repeat, ours, theirs)
