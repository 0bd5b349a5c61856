"""Export → the authors' class → the logits we have. Their forward stands here a second time, as a function of the file's
tensors under their names and nothing of ours. That it is theirs is told by recorded numbers of their code, in golden/."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from golden_cases import discover
from golden_janus import configs
from golden_llamagen import build_gpt
from golden_var import build, part, vq_config
from golden_vqgan import tokenizer_config, transformer_config

from arpo_nb.models.janus import JanusPolicy, import_transformers, split_parts, to_transformers, transformers_config
from arpo_nb.models.layouts import janus_file, llamagen_file, taming_file, var_file
from arpo_nb.models.multiscale_vq import MultiScaleQuantizer
from arpo_nb.models.tokenizers import VQModel
from arpo_nb.models.vqgan import VQGAN, CINTransformer, split_state
from arpo_nb.protocols import System


def case(name):
    family, stem = name.split('/')
    return next(c for c in discover(ROOT/'tests'/'golden'/family) if c.id == stem)


def tuned(policy):
    "Other weights than those of the fixture, as after training"
    with torch.no_grad():
        for p in policy.parameters(): p.add_(.02*torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    return policy.eval()


def attend(q, k, v, allowed, scale=None): # [B, heads, T, d]
    scores = q @ k.transpose(-1, -2)*(scale or q.shape[-1]**-.5)
    return scores.masked_fill(~allowed, -math.inf).softmax(-1) @ v


# --- LlamaGen: RMS norms, one projection for queries, keys and values, rotary angles on the token grid

def llamagen_logits(s, labels, ids, heads, kv, base=10000., eps=1e-5):
    rms = lambda x, w: w*x/(x.square().mean(-1, keepdim=True) + eps).sqrt()
    x = torch.cat([s['cls_embedding.embedding_table.weight'][labels][:, None], s['tok_embeddings.weight'][ids[:, :-1]]], 1)
    b, t, c = x.shape
    d, side = c//heads, int(ids.shape[1]**.5)
    freqs = base**-(torch.arange(0, d//2, 2)/(d//2))
    y, z = (torch.arange(side*side)//side)[:, None]*freqs, (torch.arange(side*side) % side)[:, None]*freqs
    turn = torch.polar(torch.ones(side*side, d//2), torch.cat([y, z], 1))
    turn = torch.cat([torch.zeros(1, d//2, dtype=turn.dtype), turn])[:t] # the class token is turned to nothing
    rotate = lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())*turn).flatten(-2)
    for i in range(1 + max(int(k.split('.')[1]) for k in s if k.startswith('layers.'))):
        w = lambda name: s[f'layers.{i}.{name}.weight']
        q, k, v = (rms(x, w('attention_norm')) @ w('attention.wqkv').T).split([heads*d, kv*d, kv*d], -1)
        q, k, v = (m.view(b, t, -1, d).transpose(1, 2) for m in (q, k, v))
        k, v = (m.repeat_interleave(heads//kv, 1) for m in (k, v))
        h = attend(rotate(q), rotate(k), v, torch.ones(t, t).tril().bool())
        x = x + h.transpose(1, 2).flatten(2) @ w('attention.wo').T
        h = rms(x, w('ffn_norm'))
        x = x + (F.silu(h @ w('feed_forward.w1').T)*(h @ w('feed_forward.w3').T)) @ w('feed_forward.w2').T
    return rms(x, s['norm.weight']) @ s['output.weight'].T


# --- VAR: scales see each other, six vectors of the class modulate every block

def var_logits(s, labels, x, heads, eps=1e-6): # x: what word_embed sees, [B, T-1, z]
    lin = lambda name, h: F.linear(h, s[f'{name}.weight'], s.get(f'{name}.bias'))
    cond = s['class_emb.weight'][labels]
    level = s['lvl_1L'][0]
    x = torch.cat([cond[:, None] + s['pos_start'], lin('word_embed', x)], 1) + s['lvl_embed.weight'][level] + s['pos_1LC']
    allowed, c = level[:, None] >= level[None], x.shape[-1]
    norm = lambda h: F.layer_norm(h, (c,), eps=eps)
    for i in range(1 + max(int(k.split('.')[1]) for k in s if k.startswith('blocks.'))):
        at = f'blocks.{i}.'
        if f'{at}ada_gss' in s: six = lin('shared_ada_lin.1', F.silu(cond)).view(-1, 1, 6, c) + s[f'{at}ada_gss']
        else: six = lin(f'{at}ada_lin.1', F.silu(cond)).view(-1, 1, 6, c)
        gain1, gain2, scale1, scale2, shift1, shift2 = six.unbind(2)
        h = norm(x)*(1 + scale1) + shift1
        bias = torch.cat([s[f'{at}attn.{n}'] for n in ('q_bias', 'zero_k_bias', 'v_bias')])
        q, k, v = ((h @ s[f'{at}attn.mat_qkv.weight'].T + bias).view(*h.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4))
        scale = .25/(c//heads)**.5
        if (grow := s.get(f'{at}attn.scale_mul_1H11')) is not None:
            q, k, scale = F.normalize(q, dim=-1)*grow.clamp(max=math.log(100)).exp(), F.normalize(k, dim=-1), 1.
        x = x + gain1*lin(f'{at}attn.proj', attend(q, k, v, allowed, scale).transpose(1, 2).flatten(2))
        h = norm(x)*(1 + scale2) + shift2
        x = x + gain2*lin(f'{at}ffn.fc2', F.gelu(lin(f'{at}ffn.fc1', h), approximate='tanh'))
    scale, shift = lin('head_nm.ada_lin.1', F.silu(cond)).view(-1, 1, 2, c).unbind(2)
    return lin('head', norm(x)*(1 + scale) + shift)


# --- taming: minGPT, whose condition is the first token, and whose mask is in the file

def taming_logits(s, labels, ids, heads):
    s = {k.removeprefix('transformer.'): v for k, v in s.items() if k.startswith('transformer.')}
    lin = lambda name, h: F.linear(h, s[f'{name}.weight'], s.get(f'{name}.bias'))
    norm = lambda name, h: F.layer_norm(h, h.shape[-1:], s[f'{name}.weight'], s[f'{name}.bias'])
    seen = torch.cat([labels[:, None], ids], 1)[:, :-1]
    t = seen.shape[1]
    x = s['tok_emb.weight'][seen] + s['pos_emb'][:, :t]
    for i in range(1 + max(int(k.split('.')[1]) for k in s if k.startswith('blocks.'))):
        at, h = f'blocks.{i}', norm(f'blocks.{i}.ln1', x)
        q, k, v = (lin(f'{at}.attn.{n}', h).view(*h.shape[:2], heads, -1).transpose(1, 2) for n in ('query', 'key', 'value'))
        x = x + lin(f'{at}.attn.proj', attend(q, k, v, s[f'{at}.attn.mask'][0, 0, :t, :t].bool()).transpose(1, 2).flatten(2))
        x = x + lin(f'{at}.mlp.2', F.gelu(lin(f'{at}.mlp.0', norm(f'{at}.ln2', x))))
    return lin('head', norm('ln_f', x))


def close(a, b): torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@torch.no_grad()
def test_their_code_computes_what_ours_does_llamagen():
    c = case('llamagen/gpt_c2i_gqa')
    labels, ids, shape = c['in.cond_ids'], c['in.idx'], dict(heads=c.data['config']['n_head'], kv=c.data['config']['n_kv_head'])
    close(llamagen_logits(c.weights(), labels, ids, **shape), c['out.train_logits'])
    policy = tuned(build_gpt(c))
    made = llamagen_file(System('tiny', policy, None))['model']
    assert made.keys() == c.weights().keys() and not torch.equal(made['output.weight'], c.weights()['output.weight'])
    close(llamagen_logits(made, labels, ids, **shape), policy(ids, labels))


@pytest.mark.parametrize('name', ['transformer_plain_attn', 'transformer_shared_adaln'])
@torch.no_grad()
def test_their_code_computes_what_ours_does_var(name):
    c = case(f'var/{name}')
    w, cfg, labels = c.weights(), c.data['config'], c['in.labels']
    close(var_logits(part(w, 'var.'), labels, c['in.x'], cfg['num_heads']), c['out.logits'])
    q = MultiScaleQuantizer(vq_config(cfg)); q.load_state_dict(part(w, 'vae.quantize.'))
    policy = tuned(build(cfg, w, q))
    ids = torch.cat([c[f'in.idx.{k}'] for k in range(len(q.sizes))], 1)
    made = var_file(System('tiny', policy, None))
    assert made.keys() == part(w, 'var.').keys()
    close(var_logits(made, labels, c['in.x'], cfg['num_heads']), policy(ids, labels))


@torch.no_grad()
def test_their_code_computes_what_ours_does_taming():
    c = case('vqgan/label_to_image')
    w, cfg, labels = c.weights(), c.data['config'], c['in.labels']
    ids, heads = c['out.target'].view(len(labels), -1), cfg['transformer']['n_head']
    policy, vq = CINTransformer(transformer_config(cfg['transformer'], cfg['cond_stage']['n_classes'])), VQGAN(tokenizer_config(cfg['first_stage']))
    for m, state in zip((policy, vq), split_state(w)): m.load_state_dict(state)
    made = taming_file(System('tiny', policy, vq))['state_dict']
    close(taming_logits(made, labels, ids, heads), c['out.logits'])
    assert {k for k in made if not k.endswith('attn.mask')} == {k for k in w if not k.endswith('attn.mask')}
    made = taming_file(System('tiny', tuned(policy), vq))['state_dict']
    close(taming_logits(made, labels, ids, heads), policy(ids, labels))


@pytest.mark.parametrize('layout', ['official', 'transformers'])
@torch.no_grad()
def test_their_code_computes_what_ours_does_janus(layout):
    pytest.importorskip('transformers')
    transformers = import_transformers('janus')
    c = case('janus/janus_tiny_official')
    cfg, vq_cfg = configs(c)
    w = c.weights() if layout == 'official' else to_transformers(c.weights())
    policy, vq = JanusPolicy(cfg), VQModel(vq_cfg)
    policy.load_state_dict(split_parts(c.weights(), vq_cfg.usage_window).policy)
    prompt, codes = c['in.prompt.A'], c['in.image_tokens.A']
    cond = prompt.expand(len(codes), -1), torch.ones(len(codes), len(prompt), dtype=torch.long)
    theirs = _official_janus if layout == 'official' else _transformers_janus
    close(theirs(transformers, c, cfg, vq_cfg, w, cond[0], codes), c['out.cond_logits.A'])
    made = janus_file(System('tiny', tuned(policy), vq), base=w, layout=layout)
    assert made.keys() == w.keys()
    close(theirs(transformers, c, cfg, vq_cfg, made, cond[0], codes), policy(codes, cond))


def _official_janus(transformers, c, cfg, vq_cfg, s, prompt, codes):
    "LlamaForCausalLM, as their class has it, and the generation parts around it"
    llm = c.data['config']['llm']
    lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llm)).eval()
    lm.load_state_dict({k.removeprefix('language_model.'): v for k, v in s.items() if k.startswith('language_model.')}, strict=True)
    lin = lambda name, h: F.linear(h, s[f'{name}.weight'], s[f'{name}.bias'])
    image = lin('gen_aligner.layers.2', F.gelu(lin('gen_aligner.layers.0', s['gen_embed.weight'][codes[:, :-1]])))
    h = lm.model(inputs_embeds=torch.cat([lm.get_input_embeddings()(prompt), image], 1), use_cache=False).last_hidden_state
    return lin('gen_head.vision_head', F.gelu(lin('gen_head.output_mlp_projector', h[:, prompt.shape[1]-1:])))


def _transformers_janus(transformers, c, cfg, vq_cfg, s, prompt, codes):
    "JanusForConditionalGeneration"
    v = c.data['config']['vision']
    config = transformers_config(cfg, vq_cfg, hidden_size=v['width'], num_hidden_layers=v['layers'], num_attention_heads=v['heads'],
                                 image_size=v['image_size'], patch_size=v['patch_size'], mlp_ratio=float(v['mlp_ratio']))
    model = transformers.JanusForConditionalGeneration(config).eval()
    model.load_state_dict(s, strict=True)
    image = model.prepare_embeddings_for_image_generation(codes[:, :-1])
    text = model.get_input_embeddings()(prompt)
    h = model.model.language_model(inputs_embeds=torch.cat([text, image], 1), use_cache=False).last_hidden_state
    return model.model.generation_head(h[:, prompt.shape[1]-1:])
