"Checkers of VA-π's update: the authors' own functions on tiny models, their rewards, advantages, loss and gradients beside ours"
import json
from dataclasses import replace

import pytest
import torch

from arpo_nb.config import Config
from arpo_nb.maths.grpo import group_advantages
from arpo_nb.models.janus import JanusPolicy, import_transformers, split_parts, to_transformers
from arpo_nb.models.llamagen import GPT
from arpo_nb.models.tokenizers import VQConfig, VQModel
from arpo_nb.protocols import Batch, Rollout, Streams, System
from arpo_nb.training.rollout import encode_images, rollout_logps, score_groups
from arpo_nb.training.objectives import PolicyGradient
from arpo_nb.training.steps import make_reward
from golden_cases import Case, checks, close

def beside(case, name):
    "Another case of the same folder"
    path = case.path.parent/f'{name}.case.json'
    data = json.loads(path.read_text())
    return Case(name, data['kind'], data, path)

def check_update(case, system, cond, cfg, official):
    "One update of `system` against the case; `official` gives our parameter of an official name"
    tol, images = case.data['tolerance'], (case['in.images'] + 1)/2
    batch = Batch(cond, Streams.range(0, 0, len(images)), images)
    objective = PolicyGradient(system, cfg)
    targets = encode_images(system.tokenizer, images)
    case.equal(targets, 'out.gt')
    r = Rollout(batch, case['in.tokens'], torch.zeros(case['in.tokens'].shape), case['in.context'][:, None], targets)
    with torch.no_grad():
        case.close(rollout_logps(system.policy, r)[0], 'out.old_logps', tol)
        rewards, _ = score_groups(make_reward(system, cfg), system.tokenizer, r.tokens, batch)
        case.close(rewards, 'out.rewards', tol)
        advantages = group_advantages(rewards, cfg.scale_rewards, cfg.unbiased_std, cfg.advantage_eps, cfg.advantage_clip)
        case.close(advantages, 'out.advantages', tol*20) # a reward's last digits over a group's std
        for p in system.policy.parameters():
            if p.ndim > 1: p.mul_(case.data['grown'])
        case.close(rollout_logps(system.policy, r)[0], 'out.new_logps', tol)
    r = replace(r, old_logps=case['out.old_logps'], advantages=case['out.advantages'])
    loss, stats = objective(r)
    case.close(loss.detach()[None], 'out.loss', tol)
    case.close(stats['policy/prior_ce'][None], 'out.ce', tol)
    loss.backward()
    for name, want in case.matching('out.grad.'): close(official(name, want), want, tol, f'out.grad.{name}')

CONFIG = Config(prior_coef=.1, perceptual_coef=0.) # the script's, but for the perceptual term

@checks('vapi-c2i-update')
def c2i(case):
    from golden_llamagen import build_gpt
    base, k = beside(case, case.data['gpt']), case.data['vocab_size']
    base.tensors = {n: v[:k] if n in ('w.tok_embeddings.weight', 'w.output.weight') else v for n, v in base.tensors.items()}
    base.data['config']['vocab_size'] = k
    other = beside(case, case.data['vq'])
    c = other.data['config']
    vq = VQModel(VQConfig(ch=c['ch'], encoder_ch_mult=tuple(c['encoder_ch_mult']), decoder_ch_mult=tuple(c['decoder_ch_mult']), z_channels=c['z_channels'],
                          codebook_size=c['codebook_size'], codebook_embed_dim=c['codebook_embed_dim'], image_size=8)).eval()
    vq.load_state_dict(other.weights())
    policy = build_gpt(base)
    params = dict(policy.named_parameters())
    check_update(case, System('tiny', policy, vq, num_classes=10), case['in.labels'], replace(CONFIG, num_generations=case.data['num_generations']), lambda name, want: params[name].grad)

@checks('vapi-janus-update')
def janus(case):
    pytest.importorskip('transformers')
    import_transformers()
    from golden_janus import configs
    base = beside(case, case.data['weights'])
    cfg, vq_cfg = configs(base)
    parts = split_parts(base.weights(), vq_cfg.usage_window)
    policy, vq = JanusPolicy(cfg).eval(), VQModel(vq_cfg).eval()
    policy.load_state_dict(parts.policy); vq.load_state_dict(parts.tokenizer)
    ids, pad = case['in.prompts'], cfg.ids.pad_tag
    rows = [r[r != pad] for r in ids] # theirs are padded on the right, ours on the left
    left = torch.stack([torch.cat([r.new_full((ids.shape[1] - len(r),), cfg.ids.pad), r]) for r in rows])
    cond = left, torch.stack([torch.arange(ids.shape[1]) >= ids.shape[1] - len(r) for r in rows]).long()
    params = {f'model.{k}': p for k, p in policy.named_parameters()}
    def official(name, want):
        (ours, _), = to_transformers({name: want}).items()
        return params[ours].grad
    released = replace(CONFIG, model='janus_pro_1b', teacher_forcing='released_code', num_generations=case.data['num_generations'])
    check_update(case, System('tiny', policy, vq), cond, released, official)
