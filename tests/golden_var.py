"Checkers of the VAR cases"
import json
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from arpo_nb.models.multiscale_vq import MultiScaleConfig, MultiScaleQuantizer, MultiScaleVQ, phi_table
from arpo_nb.protocols import Streams
from arpo_nb.maths.sampling import draw, filter_logits, guide
from arpo_nb.maths.scalewise import block_causal_mask, scale_index
from arpo_nb.models.var import VAR, VARConfig, generate_smooth, replay, smooth_weights, var_config
from golden_cases import checks, close

RENAMED = dict(vocab_size='codebook_size')
VQ_KEYS = {'z_channels', 'ch', 'ch_mult', 'num_res_blocks', 'patch_nums', 'quant_resi', 'share_quant_resi', 'using_znorm', 'codebook_size', 'image_size'}
VAR_KEYS = {'vocab_size', 'z_channels', 'num_classes', 'depth', 'embed_dim', 'num_heads', 'attn_l2_norm', 'shared_aln', 'patch_nums', 'mlp_ratio', 'norm_eps'}
NOT_OURS = {'in_channels', 'first_l', 'L', 'null_class'} # fixed by the rest, checked where they appear

def tuples(cfg): return {k: tuple(v) if isinstance(v, list) else v for k, v in cfg.items()}

def vq_config(cfg):
    "The case's settings, all of them understood"
    cfg = {RENAMED.get(k, k): v for k, v in tuples(cfg).items()}
    assert cfg.keys() <= VQ_KEYS | VAR_KEYS | NOT_OURS, cfg.keys() - VQ_KEYS
    assert cfg.get('in_channels', 3) == 3
    cfg = {k: v for k, v in cfg.items() if k in VQ_KEYS}
    side = cfg['patch_nums'][-1]*2**(len(cfg.get('ch_mult', (1,)*5)) - 1)
    return MultiScaleConfig(**{**cfg, 'image_size': cfg.get('image_size', side)})

def part(weights, prefix): return {k[len(prefix):]: v for k, v in weights.items() if k.startswith(prefix)}

def maps(case, prefix, n): return torch.cat([case[f'{prefix}{k}'] for k in range(n)], 1)

def tol(case): return case.data['tolerance']['float_abs']

def check_quantizer(case, q, f=None):
    "Ids, reconstructions and transformer inputs of a quantiser"
    n, t = len(q.sizes), tol(case)
    for k, p in enumerate(q.patch_nums): assert q.sizes[k] == p*p
    if f is not None: 
        ids = q.encode(f)
        for k, got in enumerate(ids.split(q.sizes, 1)): case.equal(got, f'out.idx.{k}')
    ids = maps(case, 'out.idx.' if 'out.idx.0' in case else 'in.idx.', n)
    for k, got in enumerate(q.f_hats(q.embedding(ids))):
        if f'out.fhat.{k}' in case: case.close(got, f'out.fhat.{k}', t)
    for k, got in enumerate(q.f_hats(q.embedding(ids), grow=True)):
        if f'out.fhat_exp.{k}' in case: case.close(got, f'out.fhat_exp.{k}', t)
    if 'out.var_input' in case: case.close(q.inputs(ids), 'out.var_input', t)
    return ids

@checks('var-quantizer')
@torch.no_grad()
def quantizer(case):
    q, f_hat = MultiScaleQuantizer(vq_config(case.data['config'])), 0.
    q.load_state_dict(case.weights())
    check_quantizer(case, q, case['in.f'])
    steps = maps(case, 'in.step_idx.', len(q.sizes))
    for k, ids in enumerate(steps.split(q.sizes, 1)):
        f_hat, seen = q.step(k, f_hat, q.embedding(ids))
        case.close(f_hat, f'out.step_fhat.{k}', tol(case))
        if seen is not None: case.close(seen.transpose(1, 2).unflatten(2, (q.patch_nums[k+1], -1)), f'out.step_next.{k}', tol(case))
        else: assert f'out.step_next.{k}' not in case
    case.close(q.inputs(steps), 'out.step_var_input', tol(case))
    table = case.path.parent/'phi_index_table.json'
    if table.exists(): check_phi_table(json.loads(table.read_text()))

def check_phi_table(data):
    assert phi_table(4, 10) == data['official (K=4, S=10)']
    for name, want in data['table'].items():
        phis, scales = (int(w.split()[0]) for w in name.split(','))
        assert phi_table(phis, scales) == want, name

@checks('var-tokenizer', 'var-tokenizer-encode', 'var-tokenizer-decode')
@torch.no_grad()
def tokenizer(case):
    model, t = MultiScaleVQ(vq_config(case.data['config'])).eval(), tol(case)
    wrong = model.load_state_dict(case.weights(), strict=False)
    half = dict(encode=('decoder.', 'post_quant_conv.'), decode=('encoder.', 'quant_conv.')).get(case.kind.rpartition('-')[2], ())
    assert not wrong.unexpected_keys and all(k.startswith(half) for k in wrong.missing_keys), wrong
    if 'in.image' in case:
        images = (case['in.image'] + 1)/2
        case.close(model.encoder(case['in.image']), 'out.z', t)
        case.close(model.latents(images), 'out.f', t)
        case.equal(model.encode(images), 'out.idx') if 'out.idx' in case else None
        ids = check_quantizer(case, model.quantize, case['out.f'])
        assert torch.equal(model.encode(images), ids)
    else: ids = check_quantizer(case, model.quantize)
    pixels = lambda f_hat: 2*model.decode_latents(f_hat) - 1
    codes = model.quantize.embedding(ids)
    for k, f_hat in enumerate(model.quantize.f_hats(codes)):
        if f'out.rec_all.{k}' in case: case.close(pixels(f_hat), f'out.rec_all.{k}', t)
    if 'out.rec_last' in case:
        case.close(2*model.decode(ids) - 1, 'out.rec_last', t)
        case.close(2*model.decode_probs(F.one_hot(ids, model.codebook_size).float()) - 1, 'out.rec_last', t)
    if 'out.rec_exp_last' in case: case.close(pixels(model.quantize.f_hats(codes, grow=True)[-1]), 'out.rec_exp_last', t)
    if 'in.fhat' in case:
        case.close(2*model.decode_latents(case['in.fhat'], clamp=False) - 1, 'out.dec_raw', t)
        case.close(pixels(case['in.fhat']), 'out.img_from_fhat', t)

def build(cfg, weights, quantize):
    "The case's transformer"
    assert cfg.keys() <= VAR_KEYS | VQ_KEYS | NOT_OURS, cfg.keys() - VAR_KEYS
    policy = VAR(VARConfig(**{k: v for k, v in tuples(cfg).items() if k in VAR_KEYS}), quantize).eval()
    policy.load_state_dict(part(weights, 'var.'))
    assert policy.num_tokens == cfg.get('L', policy.num_tokens) and policy.sizes[0] == cfg.get('first_l', 1)
    assert (policy.null_cond(torch.arange(2)) == cfg['null_class']).all()
    assert all(m.eps == cfg['norm_eps'] for m in (*policy.blocks, policy.head_nm)) # too small to show in the numbers
    return policy

def greedy(policy, cond, t):
    "Greedy run at VAR's guidance t: ids, guided logits and f_hat of every scale"
    ids, logits, codes = [], [], policy.quantizer.embedding
    def choose(k, l):
        logits.append(l), ids.append(l.argmax(-1))
        return codes(ids[-1])
    last = policy.decode(cond, choose, 1 + t)
    return ids, logits, policy.quantizer.f_hats(codes(torch.cat(ids, 1))), last

@checks('var-transformer')
def transformer(case):
    cfg, w, t = case.data['config'], case.weights(), tol(case)
    q = MultiScaleQuantizer(vq_config(cfg))
    q.load_state_dict(part(w, 'vae.quantize.'))
    policy, labels = build(cfg, w, q), case['in.labels']
    n, null = len(q.sizes), policy.null_cond(labels)
    tokens, acts = maps(case, 'in.idx.', n), []
    case.close(q.inputs(tokens), 'in.x', t)
    close((policy.attn_bias_for_masking[0, 0] == 0).float(), case['out.mask_allowed'].float(), 0, 'mask of the file')
    close(block_causal_mask(policy.sizes).float(), case['out.mask_allowed'].float(), 0, 'our mask')
    case.equal(scale_index(policy.sizes), 'out.level')
    with torch.no_grad(): case.close(policy.embed(tokens, policy.class_emb(labels)), 'out.h_in', t)
    hooks = [b.register_forward_hook(lambda m, i, o: acts.append(o.detach())) for b in policy.blocks]
    logits = policy(tokens, labels)
    for h in hooks: h.remove()
    case.close(logits.detach(), 'out.logits', t)
    for i, (b, act) in enumerate(zip(policy.blocks, acts, strict=True)):
        case.close(act, f'out.h_block.{i}', t)
        if policy.cfg.attn_l2_norm: case.close(b.attn.q_scale().flatten().detach(), f'out.qk_scale.{i}', t)
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction='none').view_as(tokens)
    case.close(loss.detach(), 'out.loss_per_pos', t)
    close(loss.mean().detach().reshape(case['out.loss_mean'].shape), case['out.loss_mean'], t, 'loss_mean')
    params = dict(policy.named_parameters())
    names = [k for k, _ in case.matching('out.grad.')]
    for k, g in zip(names, torch.autograd.grad(loss.mean(), [params[k] for k in names], allow_unused=True)): case.close(g, f'out.grad.{k}', t)
    with torch.no_grad():
        case.close(policy(tokens, null), 'out.logits_null', t)
        runs = {k.partition('.idx')[0] for k, _ in case.matching('out.ar_cfg') if '.idx.' in k}
        assert runs
        for run in sorted(runs): check_run(case, policy, labels, run)

def check_run(case, policy, labels, run):
    "A recorded greedy run: by the sampler, by replay, and by teacher forcing"
    t, name, n, s = tol(case), f'out.ar_cfg{run}', len(policy.sizes), float(run)
    per_scale = lambda x: x.split(policy.sizes, 1)
    tokens = maps(case, f'{name}.idx.', n)
    ids, guided, f_hats, last = greedy(policy, labels, s)
    if s or f'{name}.logits.0' in case:
        for k in range(n):
            case.equal(ids[k], f'{name}.idx.{k}')
            case.close(guided[k], f'{name}.logits.{k}', t*(1 + s))
            case.close(f_hats[k], f'{name}.fhat.{k}', t)
    case.close(last, f'{name}.fhat.{n-1}', t)
    assert torch.equal(policy.generate(labels, Streams.range(0, 0, len(labels)), cfg_scale=1 + s, top_k=1), tokens)
    null = policy.null_cond(labels)
    for half, cond in ('', labels), ('_null', null):
        raw, once = replay(policy, tokens, cond), policy(tokens, cond)
        case.close(once, f'{name}.tf_logits{half}', t)
        for k, got in enumerate(per_scale(raw)): case.close(got, f'{name}.logits{half or "_cond"}.{k}', t)
    ramp = torch.tensor([s*k/(n - 1) for k in range(n)])
    if 'out.cfg_t' in case and s == 1.5: case.close(ramp, 'out.cfg_t', 1e-6)
    scale = 1 + ramp[scale_index(policy.sizes)][:, None]
    if f'{name}.tf_guided' in case: case.close(guide(policy(tokens, labels), policy(tokens, null), scale), f'{name}.tf_guided', t*(1 + s))
    seen = policy.quantizer.inputs(tokens).split(policy.sizes[1:], 1)
    for k, x in enumerate(seen): case.close(x.transpose(1, 2).unflatten(2, (policy.quantizer.patch_nums[k+1], -1)), f'{name}.next.{k}', t)

@checks('var-generate')
@torch.no_grad()
def label_to_image(case):
    cfg, w, t = case.data['config'], case.weights(), tol(case)
    assert cfg['top_k'] == 1, f"top_k={cfg['top_k']}: drawn with torch's random numbers, which nothing here repeats; only greedy cases can be checked"
    how, streams = dict(top_k=1, top_p=cfg.get('top_p') or 1., cfg_scale=1 + cfg['cfg']), Streams.range(0, 0, len(case['in.labels']))
    vq = MultiScaleVQ(vq_config(cfg['vae'])).eval()
    vq.load_state_dict(part(w, 'vae.'))
    policy, labels = build(cfg['var'], w, vq.quantize), case['in.labels']
    ids, logits, f_hats, last = greedy(policy, labels, cfg['cfg'])
    for k in range(len(ids)):
        case.equal(ids[k], f'out.idx.{k}')
        case.close(logits[k], f'out.logits.{k}', t*(1 + cfg['cfg']))
        if f'out.fhat.{k}' in case: case.close(f_hats[k], f'out.fhat.{k}', t)
    case.close(last, 'out.fhat_last', t)
    tokens = policy.generate(labels, streams, **how)
    assert torch.equal(tokens, torch.cat(ids, 1))
    if cfg.get('more_smooth'): case.close(generate_smooth(policy, labels, streams, **how), 'out.fhat_last', t) # a mixture of one code
    case.close(vq.decode(tokens), 'out.image', t)
    for name in [k.removesuffix('_idx') for k, _ in case.matching('out.') if k.endswith('_idx')]:
        cond = torch.full((len(case[f'out.{name}_idx']),), policy.cfg.num_classes if name == 'null' else int(name.removeprefix('label')))
        got = torch.cat(greedy(policy, cond, 0.)[0], 1)
        case.equal(got, f'out.{name}_idx')
        case.close(vq.decode(got), f'out.{name}_image', t)

@checks('var-sampling')
def sampling(case):
    logits, t = case['in.logits'], tol(case)
    for c in case.data['cases']:
        keep = filter_logits(case['in.logits_ties' if 'ties case' in c else 'in.logits'], top_k=c['top_k'], top_p=c.get('top_p') or 1.)
        if 'kept per row' in c: assert keep.isfinite().sum(-1).flatten().tolist() == c['kept per row'], c
        if 'ties case' in c: case.equal(keep.isfinite(), f"out.ties_filtered_keep.{c['ties case']}")
        elif 'case' in c:
            i, p = c['case'], keep.softmax(-1)
            case.equal(keep.isfinite(), f'out.filtered_keep.{i}')
            case.close(p, f'out.prob.{i}', t)
            drawn = draw(keep, torch.linspace(0, 1 - 2**-24, 64).expand(*keep.shape[:-1], 64))
            assert (p.gather(-1, drawn) > 0).all() and (p.gather(-1, case[f'out.rng_idx.{i}'][..., None]) > 0).all()
        else:
            k, rho = c['smooth scale'], c['smooth scale']/(c['of scales'] - 1)
            assert abs(rho - c['ratio']) < 1e-9
            w = smooth_weights(keep, case[f'in.smooth_exp_noise.{k}'], rho)
            case.close(w, f'out.smooth_weights.{k}', t)
            case.close(w @ case['in.codebook'], f'out.smooth_embed.{k}', t)

def compare(model, case):
    "Keys, shapes and kinds of a published file"
    want = case.data['state_dict']
    got = model.state_dict()
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    params = dict(model.named_parameters())
    for k, v in got.items():
        assert list(v.shape) == want[k]['shape'] and str(v.dtype) == f"torch.{want[k]['dtype']}", k
        assert (k in params) == (want[k]['kind'] == 'parameter'), k
    assert sum(p.numel() for p in params.values()) == case.data['about']['parameters']

@checks('manifest-vae')
def manifest_vae(case):
    cfg = tuples(case.data['about']['config'])
    assert cfg.pop('quant_conv_ks') == 3
    assert vq_config(cfg) == MultiScaleConfig()
    with torch.device('meta'): model = MultiScaleVQ(MultiScaleConfig())
    compare(model, case)
    for name, n in case.data['about']['parts'].items(): assert sum(p.numel() for p in getattr(model, name).parameters()) == n

@checks('manifest-var')
def manifest_var(case):
    about, cfg = case.data['about'], var_config(case.data['about']['file'].partition('.')[0])
    c = tuples(about['config'])
    got = dict(depth=cfg.depth, embed_dim=cfg.width, num_heads=cfg.heads, head_dim=cfg.width//cfg.heads, resolution=16*cfg.patch_nums[-1],
               **{k: getattr(cfg, k) for k in ('mlp_ratio', 'norm_eps', 'attn_l2_norm', 'shared_aln', 'num_classes', 'vocab_size', 'z_channels', 'patch_nums')})
    assert {k: c[k] for k in got} == got
    with torch.device('meta'): model = VAR(cfg, MultiScaleQuantizer(MultiScaleConfig(patch_nums=cfg.patch_nums, image_size=got['resolution'])))
    assert model.num_tokens == c['tokens']
    compare(model, case)
