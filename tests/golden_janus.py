"Checkers of the Janus-Pro cases"
import json
import re
from unittest.mock import patch

import pytest
import torch

from arpo_nb.models import janus
from arpo_nb.models.janus import (CONFIGS, JanusConfig, JanusPolicy, SpecialIds, describe, format_prompt, import_transformers, is_official, llama_config,
                           merge_policy, split_parts, to_transformers, transformers_config)
from arpo_nb.protocols import Streams
from arpo_nb.maths.sampling import guide
from arpo_nb.models.tokenizers import VQConfig, VQModel
from arpo_nb.models.vqgan import load_strict, truncate_uint8
from golden_cases import checks, close

def configs(case):
    "Our configurations of policy and tokenizer"
    llm, vq, ids = (case.data['config'][k] for k in ('llm', 'vq', 'special'))
    c = case.data['config']
    cfg = JanusConfig(dim=llm['hidden_size'], n_layer=llm['num_hidden_layers'], n_head=llm['num_attention_heads'], n_kv_head=llm['num_key_value_heads'],
                      ffn_dim=llm['intermediate_size'], text_vocab_size=llm['vocab_size'], max_positions=llm['max_position_embeddings'], norm_eps=llm['rms_norm_eps'],
                      rope_base=llm['rope_theta'], vocab_size=vq['codebook_size'], code_dim=vq['codebook_embed_dim'], head_hidden=c['gen_head_hidden'],
                      num_tokens=c['grid']**2, ids=SpecialIds(ids['bos'], ids['eos'], ids['boi'], ids['pad'], ids['pad']))
    mult = tuple(vq['ch_mult'])
    return cfg, VQConfig(ch=vq['ch'], encoder_ch_mult=mult, decoder_ch_mult=mult, z_channels=vq['z_channels'], codebook_size=vq['codebook_size'],
                         codebook_embed_dim=vq['codebook_embed_dim'], image_size=c['pix'])

def logp(logits, ids): return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]

def check_conversion(case):
    "Both layouts sort into the same parts; the key map, where it is recorded, sends every tensor where it says"
    state, path = case.weights(), case.path.parent/'janus_tiny_key_map.json'
    if not is_official(state): return
    a, b = split_parts(state), split_parts(to_transformers(state))
    for x, y in (a.policy, b.policy), (a.tokenizer, b.tokenizer), (a.understanding, b.understanding):
        assert x.keys() == y.keys() and all(torch.equal(v, y[k]) for k, v in x.items() if k != 'quantize.codebook_used')
    if not path.exists(): return
    mapped = json.loads(path.read_text())['map']
    if mapped.keys() != state.keys(): return # it was recorded with another case
    want = {}
    for official, where in mapped.items():
        v = state[official]
        for name, op in where: want[name] = v if op is None else v[0] if op == 'squeeze0' else v.chunk(3)[op]
    got = to_transformers(state)
    assert got.keys() == want.keys() and all(torch.equal(got[k], v) for k, v in want.items())

def understanding(case, cfg, vq, parts):
    "Vision encoder and text head, by transformers' classes"
    from transformers.models.janus.modeling_janus import JanusVisionAlignerMLP, JanusVisionModel
    v = case.data['config']['vision']
    config = transformers_config(JanusConfig(**{**vars(cfg), 'head_hidden': None}), vq, hidden_size=v['width'], num_hidden_layers=v['layers'],
                                 num_attention_heads=v['heads'], image_size=v['image_size'], patch_size=v['patch_size'], mlp_ratio=float(v['mlp_ratio']))
    under = lambda prefix: {k.removeprefix(prefix): t for k, t in parts.understanding.items() if k.startswith(prefix)}
    vision = load_strict(JanusVisionModel(config.vision_config), under('vision_model.'), case.id).eval()
    aligner = load_strict(JanusVisionAlignerMLP(config.vision_config), under('aligner.'), case.id)
    assert set(parts.understanding) == {'lm_head.weight', *(f'vision_model.{k}' for k in vision.state_dict()), *(f'aligner.{k}' for k in aligner.state_dict())}
    return lambda pixels: aligner(vision(pixels).last_hidden_state)

@checks('janus-pro')
def janus_pro(case):
    pytest.importorskip('transformers')
    import_transformers()
    tol = case.data['tolerance']
    cfg, vq_cfg = configs(case)
    check_conversion(case)
    state = case.weights()
    parts = split_parts(state, vq_cfg.usage_window)
    policy = load_strict(JanusPolicy(cfg), parts.policy, case.id, describe).eval()
    vq = load_strict(VQModel(vq_cfg), parts.tokenizer, case.id, describe).eval()
    for x in 'AB':
        prompt, codes = case[f'in.prompt.{x}'], case[f'in.image_tokens.{x}']
        cond = prompt.expand(len(codes), -1), torch.ones(len(codes), len(prompt), dtype=torch.long)
        null = policy.null_cond(cond)
        case.equal(null[0][0], f'out.uncond_ids.{x}')
        with torch.no_grad():
            scores, unguided = policy(codes, cond), policy(codes, null)
            inputs = torch.cat([policy.language_model.embed_tokens(cond[0]), policy.embed_codes(codes[:, :-1])], 1)
            case.close(policy.trunk(inputs, torch.ones(inputs.shape[:2], dtype=torch.bool)), f'out.hidden.{x}', tol['logits_abs'])
        case.close(scores, f'out.cond_logits.{x}', tol['logits_abs'])
        case.close(unguided, f'out.uncond_logits.{x}', tol['logits_abs'])
        case.close(logp(scores, codes), f'out.token_logp.{x}', tol['logits_abs'])
        if f'out.token_logp_uncond.{x}' in case: case.close(logp(unguided, codes), f'out.token_logp_uncond.{x}', tol['logits_abs'])
        for kind, of in ('cfg_logits', lambda g: g), ('token_logp_cfg', lambda g: logp(g, codes)):
            for name, _ in case.matching(f'out.{kind}.w'):
                s, at = name.rsplit('.', 1)
                if at == x: case.close(of(guide(scores, unguided, float(s))), f'out.{kind}.w{name}', tol['logits_abs']*max(1, float(s)))
        one = tuple(c[:1] for c in cond)
        for name, _ in case.matching('out.greedy.w'):
            s, at = name.rsplit('.', 1)
            if at == x: case.equal(policy.generate(one, Streams.range(0, 0, 1), cfg_scale=float(s), greedy=True), f'out.greedy.w{name}')
        for name, want in case.matching('out.sampled.w'):
            s, temperature, seed, at = re.fullmatch(r'([\d.]+)\.T([\d.]+)\.seed(\d+)\.(\w+)', name).groups()
            if at != x: continue
            torch.manual_seed(int(seed))
            with patch.object(janus, 'sample_token', lambda logits, u, t, *_: torch.multinomial((logits/t).softmax(-1), 1)[:, 0]):
                two = tuple(c[:1].expand(len(want), -1) for c in cond)
                case.equal(policy.generate(two, Streams.range(0, 0, len(want)), cfg_scale=float(s), temperature=float(temperature)), f'out.sampled.w{name}')
    codes, prompt = case['in.image_tokens.A'], case['in.prompt.A']
    cond = prompt.expand(len(codes), -1), torch.ones(len(codes), len(prompt), dtype=torch.long)
    nll = -logp(policy(codes, cond), codes).mean()
    case.close(nll[None].detach(), 'out.nll.A', tol['logits_abs'])
    nll.backward()
    params = {f'model.{k}': p for k, p in policy.named_parameters()}
    for name, want in case.matching('out.grad.'):
        (ours, want), = to_transformers({name: want}).items()
        close(params[ours].grad, want, tol['grad_abs'], f'out.grad.{name}')
    with torch.no_grad():
        case.close(policy.embed_codes(codes), 'out.image_embeds.A', tol['logits_abs'])
        both = torch.stack([case[f'in.image_tokens.{x}'][0] for x in 'AB'])
        case.close(policy(both, left_padded(case, cfg)), 'out.padded_cond_logits', tol['logits_abs'])
        pixels = vq.decode(codes, clamp=False)
        case.close(2*pixels - 1, 'out.pixels.A', tol['pixels_abs'])
        level = 255*pixels.permute(0, 2, 3, 1)
        off = (truncate_uint8(pixels).int() - case['out.pixels_uint8.A'].int()).abs()
        assert (off <= ((level - level.round()).abs() < .02).int()).all(), f'out.pixels_uint8.A: off by up to {off.max()} levels'
        image = (case['in.image'] + 1)/2
        case.close(vq.quant_conv(vq.encoder(case['in.image'])), 'out.vq_prequant', tol['logits_abs'])
        ids = vq.encode(image)
        case.equal(ids.flatten(), 'out.vq_indices')
        h, w = vq.token_grid
        case.close(vq.quantize.codes[ids].transpose(1, 2).unflatten(2, (h, w)), 'out.vq_quantized', tol['logits_abs'])
        embeds = understanding(case, cfg, vq_cfg, parts)(case['in.pixel_values'])
        case.close(embeds, 'out.understanding_embeds', tol['logits_abs'])
        states = policy.trunk(policy.language_model.embed_tokens(prompt[None]), torch.ones(1, len(prompt), dtype=torch.bool))
        case.close(states @ parts.understanding['lm_head.weight'].T, 'out.text_logits.A', tol['logits_abs'])
    merged = merge_policy(policy.state_dict(), state)
    assert all(torch.equal(merged[k], v) for k, v in (to_transformers(state) if is_official(state) else state).items())

def left_padded(case, cfg):
    "The padded batch of the case; its padding may lie on either side"
    ids, mask = case['in.padded_ids'], case['in.padded_mask']
    rows = [r[m.bool()] for r, m in zip(ids, mask)]
    pad = lambda r, v: torch.cat([torch.full((ids.shape[1] - len(r),), v), r])
    cond = torch.stack([pad(r, cfg.ids.pad) for r in rows]), torch.stack([pad(torch.ones_like(r), 0) for r in rows])
    assert torch.equal(ids, cond[0]) and torch.equal(mask, cond[1]), 'in.padded_ids are not padded on the left'
    return cond

@checks('janus-pro-prompt')
def prompts(case):
    wrong = [(c['prompt'], format_prompt(c['prompt']), c['formatted']) for c in case.data['cases'] if format_prompt(c['prompt']) != c['formatted']]
    assert case.data['cases'] and not wrong, f'(prompt, got, expected): {wrong}'

@checks('manifest-janus')
def manifest(case):
    pytest.importorskip('transformers')
    cfg, vq = CONFIGS[case.data['name'].lower().replace('-', '_')]
    if (c := case.data.get('language_config')):
        names = 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads', 'num_key_value_heads', 'vocab_size', 'max_position_embeddings', 'rms_norm_eps'
        assert {k: getattr(llama_config(cfg), k) for k in names} == {k: c[k] for k in names} and cfg.rope_base == c['rope_theta']
    state = {k: torch.empty(shape, device='meta') for k, shape in case.data['state_dict'].items()}
    if 'n_parameters' in case.data: assert sum(v.numel() for k, v in state.items() if not k.endswith('codebook_used')) == case.data['n_parameters']
    parts = split_parts(state, vq.usage_window)
    with torch.device('meta'):
        load_strict(JanusPolicy(cfg), parts.policy, case.id, describe, assign=True)
        load_strict(VQModel(vq), {k: v.to('meta') for k, v in parts.tokenizer.items()}, case.id, describe, assign=True)
        want = import_transformers().JanusForConditionalGeneration(transformers_config(cfg, vq)).state_dict()
    whole = to_transformers(state) if is_official(state) else state
    assert {k: list(v.shape) for k, v in whole.items()} == {k: list(v.shape) for k, v in want.items()} # as transformers expects, to the last key
