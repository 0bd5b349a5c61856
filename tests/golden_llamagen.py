"Checkers of the LlamaGen cases"
import re
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from arpo_nb.models import llamagen
from arpo_nb.models.llamagen import GPT, GPTConfig, gpt_config, rope_table, rotate
from arpo_nb.protocols import Streams
from arpo_nb.maths.sampling import filter_logits, guide
from arpo_nb.models.tokenizers import VQConfig, VQModel
from golden_cases import checks

RENAMED = dict(cls_token_num='cond_len', class_dropout_prob='cond_dropout', model_type='cond')

def build_gpt(case):
    "The case's transformer with its weights, in eval mode"
    cfg = {RENAMED.get(k, k): v for k, v in case.data['config'].items()}
    cfg['cond'] = dict(c2i='class', t2i='text')[cfg['cond']]
    policy = GPT(GPTConfig(**cfg)).eval()
    policy.load_state_dict(case.weights())
    assert policy.cfg.head_dim == case.data['derived']['head_dim'] and policy.cfg.ffn_dim == case.data['derived']['ffn_hidden']
    return policy

@contextmanager
def replay(policy, tokens):
    "Make `generate` take given tokens; yields the lists of raw logits and of the logits it would have sampled from"
    raw, final, real = [], [], llamagen.sample_token
    hook = policy.output.register_forward_hook(lambda m, i, o: raw.append(o.float().reshape(-1, o.shape[-1])))
    def forced(logits, *args, **kw):
        final.append(logits)
        return tokens[:, len(final)-1]
    llamagen.sample_token = forced
    try: yield raw, final
    finally: llamagen.sample_token = real; hook.remove()

def logp(logits, ids): return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]

def cached(policy, cond, idx, scale=1.):
    "Raw and final logits [*, T, V] of a cached decode along `idx`"
    with replay(policy, idx) as (raw, final):
        policy.generate(cond, Streams.range(0, 0, len(idx)), cfg_scale=scale, greedy=True)
    return torch.stack(raw, 1), torch.stack(final, 1)

def check_common(case, policy, cond, logits, null_logits, tol):
    "What class- and text-conditional cases share: logits, guidance, cache, greedy tokens; no `null_logits` without a null class"
    idx, n = case['in.idx'], len(case['in.idx'])
    case.close(logits, 'out.train_logits', tol)
    case.close(logp(logits, idx), 'out.token_logp', tol)
    case.close(cached(policy, cond, idx)[0], 'out.decode_logits', tol)
    if null_logits is not None: case.close(cached(policy, cond, idx, 2.)[0], 'out.decode_logits_pair', tol)
    for name, _ in case.matching('out.cfg_logits_s'):
        s = float(name)
        for got in (guide(logits, null_logits, s), *([cached(policy, cond, idx, s)[1]] if s > 1 else [])): # at 1 or less the sampler does not guide
            case.close(got, f'out.cfg_logits_s{name}', tol*max(s, 1))
            case.close(logp(got, idx), f'out.token_logp_cfg_s{name}', tol*max(s, 1))
    for name, _ in case.matching('out.greedy.cfg'):
        if name.endswith('no_mask'): continue
        scale, _, interval = name.partition('.interval')
        kw = dict(cfg_scale=float(scale), cfg_interval=int(interval or -1), greedy=True)
        case.equal(policy.generate(cond, Streams.range(0, 0, n), **kw), f'out.greedy.cfg{name}')
    case.close(policy.rope, 'out.rope_table', 1e-6)

def check_grads(case, model, tol):
    params = dict(model.named_parameters())
    for name, _ in case.matching('out.grad.'): case.close(params[name].grad, f'out.grad.{name}', tol)

def loss_of(logits, idx): return F.cross_entropy(logits.flatten(0, 1), idx.flatten(), reduction='none').view_as(idx)

@checks('llamagen-gpt-c2i')
def gpt_c2i(case):
    policy, tol = build_gpt(case), case.data['tolerance']
    cond, idx, drop = case['in.cond_ids'], case['in.idx'], case['in.force_drop_ids'].bool()
    null, acts = policy.null_cond(cond) if policy.cfg.cond_dropout else None, []
    assert null is None or (null == case.data['derived']['null_class_id']).all()
    hooks = [m.register_forward_hook(lambda m, i, o: acts.append(o)) for m in (policy.drop, *policy.layers, policy.norm)]
    logits = policy(idx, cond)
    for h in hooks: h.remove()
    names = ['embed', *(f'block{i}' for i in range(len(policy.layers))), 'final_norm']
    for name, act in zip(names, acts, strict=True): case.close(act, f'out.act.{name}', tol['logits_abs'])
    loss = loss_of(logits, idx).mean()
    case.close(loss[None], 'out.train_loss', tol['loss_abs'])
    loss.backward()
    check_grads(case, policy, tol['grad_abs'])
    with torch.no_grad():
        unguided = None if null is None else policy(idx, null)
        if null is not None:
            case.close(unguided, 'out.uncond_logits', tol['logits_abs'])
            case.close(logp(unguided, idx), 'out.token_logp_uncond', tol['logits_abs'])
            case.close(policy.prefix(torch.where(drop, null, cond)), 'out.embed.labels_forced_drop', tol['logits_abs'])
        check_common(case, policy, cond, logits.detach(), unguided, tol['logits_abs'])

@checks('llamagen-gpt-t2i')
def gpt_t2i(case):
    from arpo_nb.data.captions import left_pad
    policy, tol = build_gpt(case), case.data['tolerance']
    idx, drop, valid = case['in.idx'], case['in.force_drop_ids'].bool(), case['in.valid']
    cond = left_pad(case['in.t5_feats_right_padded'], case['in.t5_mask_right_padded'])
    case.equal(cond[0], 'out.left_padded_feats')
    case.equal(cond[1], 'out.left_padded_mask')
    null, everything = policy.null_cond(cond), (cond[0], torch.ones_like(cond[1]))
    size, prefix = case['out.train_attn_mask'].shape[-1], policy.cfg.cond_len
    case.equal(policy.mask(cond, size), 'out.train_attn_mask')
    logits = policy(idx, cond)
    losses = loss_of(logits, idx)
    case.close(losses.mean()[None], 'out.train_loss_plain', tol['loss_abs'])
    loss = (losses*valid[:, None]).sum()/(valid.sum()*idx.shape[1]).clamp(min=1)
    case.close(loss[None], 'out.train_loss_valid', tol['loss_abs'])
    loss.backward()
    check_grads(case, policy, tol['grad_abs'])
    with torch.no_grad():
        case.close(policy.prefix(cond), 'out.cond_prefix', tol['logits_abs'])
        dropped = torch.where(drop[:, None, None], null[0], cond[0])
        case.close(policy.prefix((dropped, cond[1])), 'out.cond_prefix_forced_drop', tol['logits_abs'])
        case.close(policy(idx, everything), 'out.train_logits_no_mask', tol['logits_abs'])
        case.close(cached(policy, everything, idx)[0], 'out.decode_logits_no_mask', tol['logits_abs'])
        for name, _ in case.matching('out.greedy.cfg'):
            if name.endswith('.no_mask'):
                got = policy.generate(everything, Streams.range(0, 0, len(idx)), cfg_scale=float(name.removesuffix('.no_mask')), greedy=True)
                case.equal(got, f'out.greedy.cfg{name}')
        if 'out.prefill_logits_all_positions' in case:
            states = policy.trunk(policy.prefix(cond), policy.rope[:prefix], policy.mask(cond, prefix))
            case.close(policy.head(states), 'out.prefill_logits_all_positions', tol['logits_abs'])
        check_common(case, policy, cond, logits.detach(), policy(idx, null), tol['logits_abs'])

@checks('llamagen-vq')
def vq(case):
    cfg, tol = dict(case.data['config']), case.data['tolerance']['abs']
    beta, ratio = cfg.pop('commit_loss_beta'), cfg.pop('entropy_loss_ratio')
    image = (case['in.image'] + 1)/2
    model = VQModel(VQConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in cfg.items()}, image_size=image.shape[-1]))
    model.load_state_dict(case.weights())
    assert model.cfg.downsample == case.data['derived']['downsample']
    shape, to_official = [n//model.cfg.downsample for n in image.shape[2:]], lambda pixels: 2*pixels - 1
    with torch.no_grad():
        h = model.encoder(case['in.image'])
        case.close(h, 'out.encoder_out', tol)
        case.close(model.quant_conv(h), 'out.prequant', tol)
        ids = model.encode(image)
        case.equal(ids.flatten(), 'out.indices')
        grid = lambda v: v.transpose(1, 2).unflatten(2, shape)
        codes = model.quantize.codes
        case.close(grid(codes[ids]), 'out.quantized', tol)
        case.close(to_official(model.decode(ids, clamp=False, grid=shape)), 'out.recon_from_indices', tol)
        embed = codes[case['in.code']]
        case.close(grid(embed), 'out.code_embed', tol)
        case.close(grid(embed).permute(0, 2, 3, 1), 'out.code_embed_channel_last', tol)
        case.close(embed.flatten(0, 1), 'out.code_embed_flat', tol)
        case.close(model.post_quant_conv(grid(embed)), 'out.decoder_in', tol)
        case.close(to_official(model.decode(case['in.code'], clamp=False, grid=shape)), 'out.code_pixels', tol)
    recon, losses = model.train()(image, beta=beta, entropy_ratio=ratio)
    case.close(to_official(recon), 'out.recon', tol)
    rec = F.mse_loss(to_official(recon), case['in.image'])
    total = rec + losses['vq'] + losses['commit'] + losses['entropy']
    for name, got in dict(rec_mse=rec, vq=losses['vq'], commit=losses['commit'], entropy=losses['entropy'], total=total,
                          codebook_usage=torch.tensor(losses['usage'])).items(): case.close(got.reshape(1), f'out.loss.{name}', tol)
    used = model.quantize.codebook_used
    case.equal(used[-ids.numel():], 'out.codebook_used_tail')
    assert not used[:-ids.numel()].any()
    total.backward()
    check_grads(case, model, tol)

@checks('llamagen-rope-2d')
def rope(case):
    for c in case.data['config']:
        table, tol = rope_table(c['grid'], c['head_dim'], c['base'], c['prefix_rows']), case.data['tolerance']['abs']
        # kinds of CPU round a frequency's power differently by an ulp, and a position multiplies that
        case.close(table, f'out.table.{c["key"]}', max(tol, c['grid']*torch.finfo(torch.float32).eps))
        x, off = case[f'in.x.{c["key"]}'], (table - case[f'out.table.{c["key"]}']).abs().max().item()
        turned = rotate(x, table[case[f'in.pos.{c["key"]}']])
        case.close(turned, f'out.rotated.{c["key"]}', 2*(tol + off*x.abs().max().item()))

@checks('llamagen-sampler')
def sampler(case):
    tol, ties = case.data['tolerance']['abs'], torch.tensor(case.data['tie_rows'])
    for c in case.data['cases']:
        i, want = c['case'], case[f'out.filtered.{c["case"]}']
        rows = torch.ones(len(want), dtype=torch.bool)
        if c['top_p'] < 1: rows[ties] = False # which of several equal logits survives depends on the sort
        got = filter_logits(case['in.logits'], c['temperature'], c['top_k'], c['top_p'])
        kept = want.isfinite()
        assert torch.equal(got.isfinite()[rows], kept[rows]), f'case {i}: different codes kept'
        assert torch.equal(got.isfinite().sum(1), torch.tensor(c['kept_per_row'])), f'case {i}: different number of codes kept'
        both = kept & got.isfinite()
        assert torch.allclose(got[both], want[both], rtol=1e-6, atol=tol), f'out.filtered.{i}'
        assert torch.allclose(got.softmax(-1)[rows], case[f'out.probs.{i}'][rows], rtol=0, atol=2*tol), f'out.probs.{i}'
        best = got.gather(-1, case[f'out.argmax.{i}'].clamp(max=got.shape[-1]-1)) # equal logits tie: any of them is the best
        assert torch.equal(best[rows, 0], got[rows].amax(-1)), f'out.argmax.{i}'
    for s, _ in case.matching('out.guided.s'):
        case.close(guide(case['in.cond'], case['in.uncond'], float(s)), f'out.guided.s{s}', tol*float(s))
    for name, _ in case.matching('out.guided_probs.s'):
        s, t, k, p = map(float, re.fullmatch(r'([\d.]+)\.T([\d.]+)\.k(\d+)\.p([\d.]+)', name).groups())
        got = filter_logits(guide(case['in.cond'], case['in.uncond'], s), t, int(k), p).softmax(-1)
        assert torch.equal(got > 0, case[f'out.guided_probs.s{name}'] > 0), f'{name}: different codes kept'
        case.close(got, f'out.guided_probs.s{name}', tol*s)

@checks('llamagen-image-io')
def image_io(case):
    from arpo_nb.data.image_io import center_crop, resize_pixels, ten_crop, to_tensor, to_uint8
    import PIL
    tol, levels = case.data['tolerance']['float_abs'], int(PIL.__version__ != case.data['libraries']['pillow'])
    for c in case.data['crops']:
        i, crop = c['case'], center_crop(Image.fromarray(case[f'in.image.{c["case"]}'].numpy()), c['target'])
        case.close(torch.from_numpy(np.array(crop)), f'out.crop.{i}', levels)
        case.close(2*to_tensor(crop) - 1, f'out.tensor.{i}', tol + levels/127.5)
    size = case['out.tencrop'].shape[-1]
    crops = ten_crop(center_crop(Image.fromarray(case['in.tencrop'].numpy()), int(size*1.1)), size)
    case.close(2*torch.stack([to_tensor(c) for c in crops]) - 1, 'out.tencrop', tol + levels/127.5)
    def compare(pixels, name):
        level = (2*pixels - 1)*127.5 + 128
        near = (level - level.round()).abs().permute(0, 2, 3, 1) < 1e-4
        off = (to_uint8(pixels).int() - case[name].int()).abs()
        assert (off <= near.int()).all(), f'{name}: off by up to {off.max()} levels'
    samples = (case['in.samples'] + 1)/2
    small = resize_pixels(samples, case['out.samples_resized'].shape[-1])
    case.close(2*small - 1, 'out.samples_resized', tol)
    compare(samples, 'out.uint8')
    compare(small, 'out.uint8_resized')
    compare((case['in.edge'] + 1)/2, 'out.edge_uint8')

@checks('llamagen-caption-cleaning')
def caption_cleaning(case):
    from arpo_nb.data.captions import clean_prompt
    wrong = [(c['text'], clean_prompt(c['text']), c['cleaned']) for c in case.data['cases'] if clean_prompt(c['text']) != c['cleaned']]
    assert not wrong, f'(text, got, expected): {wrong}'

def check_manifest(model, data):
    "Same keys, shapes, dtypes, parameter count and buffers as the recorded state dict"
    got = {k: dict(shape=list(v.shape), dtype=str(v.dtype).removeprefix('torch.')) for k, v in model.state_dict().items()}
    assert got == data['state_dict']
    names = set(dict(model.named_parameters()))
    assert sum(p.numel() for p in model.parameters()) == data['n_parameters']
    assert set(got) - names == set(data['buffers_in_state_dict'])

@checks('manifest-gpt')
def manifest_gpt(case):
    size, cond, _ = case.data['name'].removeprefix('GPT-').split('_')
    with torch.device('meta'): policy = GPT(gpt_config(size, case.data['image_size'], text=cond == 't2i'))
    assert list(policy.rope.shape) == case.data['rope_table_shape']
    assert (policy.cfg.head_dim, policy.cfg.ffn_dim, policy.num_tokens) == tuple(case.data[k] for k in ('head_dim', 'ffn_hidden', 'block_size'))
    check_manifest(policy, case.data)

@checks('manifest-vq')
def manifest_vq(case):
    keys = 'ch', 'encoder_ch_mult', 'decoder_ch_mult', 'z_channels', 'codebook_size', 'codebook_embed_dim'
    with torch.device('meta'): model = VQModel(VQConfig(**{k: case.data[k] for k in keys}))
    check_manifest(model, case.data)
