"Checkers of the VQGAN cases"
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from arpo_nb.models import vqgan
from arpo_nb.protocols import Streams
from arpo_nb.maths.sampling import filter_logits
from arpo_nb.models.vqgan import VQGAN, CINConfig, CINTransformer, Codebook, VQGANConfig, remap, split_state, taming_filters, truncate_uint8, unmap
from golden_cases import checks

def tokenizer_config(cfg):
    "Our configuration from the original's"
    d = cfg['ddconfig']
    assert not d['double_z'] and not d['dropout'] and d['in_channels'] == d['out_ch'] == 3
    return VQGANConfig(ch=d['ch'], ch_mult=tuple(d['ch_mult']), num_res_blocks=d['num_res_blocks'], attn_resolutions=tuple(d['attn_resolutions']),
                       resolution=d['resolution'], z_channels=d['z_channels'], codebook_size=cfg['n_embed'], embed_dim=cfg['embed_dim'], image_size=d['resolution'])

def transformer_config(cfg, n_classes):
    return CINConfig(**{k: cfg[k] for k in ('vocab_size', 'block_size', 'n_layer', 'n_head', 'n_embd')}, num_classes=n_classes)

def ours(x): return (x + 1)/2 # pixels of the cases are in [-1, 1]
def theirs(x): return 2*x - 1
def logp(logits, ids): return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]

@contextmanager
def replay(tokens=None):
    "Record the logits that `generate` samples from, and with `tokens` make it take those"
    seen, real = [], vqgan.sample_token
    def recorded(logits, *args, **kw):
        seen.append(logits)
        return real(logits, *args, **kw) if tokens is None else tokens[:, len(seen)-1]
    vqgan.sample_token = recorded
    try: yield seen
    finally: vqgan.sample_token = real

@checks('vqgan-tokenizer')
@torch.no_grad()
def tokenizer(case):
    cfg, tol = case.data['config'], case.data['tolerance']['float_abs']
    vq = VQGAN(tokenizer_config(cfg)).eval()
    vq.load_state_dict(case.weights())
    image, other = ours(case['in.image']), ours(case['in.other_image'])
    case.close(vq.encoder(case['in.image']), 'out.h', tol)
    z = vq.latents(image)
    case.close(z, 'out.prequant', tol)
    quant, loss, ids = vq.quantize(z, cfg['beta'], cfg['legacy'])
    case.close(quant, 'out.quant', tol)
    case.close(loss, 'out.loss', tol)
    case.equal(ids.flatten(), 'out.idx')
    case.equal(vq.encode(image).view_as(case['out.grid']), 'out.grid')
    recon, loss = vq(image, cfg['beta'], cfg['legacy'])
    case.close(theirs(recon), 'out.rec', 2*tol)
    case.close(loss, 'out.loss', tol)
    grid = tuple(case['out.other_grid'].shape[1:])
    case.equal(vq.encode(other).flatten(), 'out.other_idx')
    case.equal(vq.encode(other).view(-1, *grid), 'out.other_grid')
    case.close(theirs(vq.decode(vq.encode(other), clamp=False, grid=grid)), 'out.other_rec', 2*tol)
    codes, (h, w) = case['in.codes'], case['out.codes_quant'].shape[2:]
    case.close(vq.quantize.embedding(codes).transpose(1, 2).unflatten(2, (h, w)), 'out.codes_quant', tol)
    case.close(theirs(vq.decode(codes, clamp=False, grid=(h, w))), 'out.codes_dec', 2*tol)

@checks('vqgan-quantizer')
def quantizer(case):
    cfg, tol, w = case.data['config'], case.data['tolerance']['float_abs'], case.weights()
    book = Codebook(cfg['n_embed'], cfg['embed_dim'])
    with torch.no_grad(): book.embedding.weight.copy_(w['embedding.weight'])
    z, used = case['in.z'].clone().requires_grad_(), case['w.used']
    assert len(used) == cfg['n_used']
    for name, legacy in ('legacy', True), ('fixed', False):
        quant, loss, ids = book(z, cfg['beta'], legacy)
        case.close(loss, f'out.{name}.loss', tol)
        for g, of in zip(torch.autograd.grad(loss, (z, book.embedding.weight), retain_graph=True), ('z', 'codebook')): case.close(g, f'out.{name}.grad_{of}', tol)
        assert torch.equal(torch.autograd.grad((quant*case['in.co']).sum(), z)[0], case['in.co']), 'the gradient is not straight-through'
    b, d, h, wd = z.shape
    case.close(quant, 'out.quant', tol)
    case.equal(ids.flatten(), 'out.idx')
    case.equal(ids.view(b, h, wd), 'out.sane.idx')
    entry = lambda flat: book.embedding(flat.flatten()).view(b, h, wd, d).permute(0, 3, 1, 2)
    for name, unknown, n in ('zero', 0, len(used)), ('extra', len(used), len(used) + 1):
        new = remap(ids.flatten(), used, unknown)
        case.equal(new[:, None], f'out.remap_{name}.idx') # the original's shape
        case.close(entry(unmap(new, used)), f'out.remap_{name}.entry', tol)
        case.equal(torch.tensor(n), f'out.remap_{name}.n')
    case.equal(remap(ids, used).view(b, h, wd), 'out.remap_sane.idx')
    case.close(entry(case['in.codes']), 'out.entry', tol)
    case.close(book.embedding(case['in.codes']), 'out.entry_flat', tol)

@checks('vqgan-gpt')
def gpt(case):
    cfg, tol = case.data['config'], case.data['tolerance']['float_abs']
    policy = CINTransformer(transformer_config(cfg, cfg['n_classes'])).eval()
    policy.load_state_dict(split_state(case.weights())[0])
    labels, idx, states = case['in.labels'], case['in.idx'], []
    hooks = [b.register_forward_hook(lambda m, i, o: states.append(o)) for b in policy.blocks]
    logits = policy(idx, labels)
    for h in hooks: h.remove()
    for i, h in enumerate(states): case.close(h, f'out.h_block.{i}', tol)
    case.close(logits, 'out.logits', tol)
    case.close(logp(logits, idx), 'out.logp', tol)
    loss = F.cross_entropy(logits.flatten(0, 1), idx.flatten())
    case.close(loss, 'out.loss', tol)
    loss.backward()
    params = dict(policy.named_parameters())
    for name, _ in case.matching('out.grad.'): case.close(params[name].grad, f'out.grad.{name}', tol)
    streams = Streams.range(0, 0, len(labels))
    with replay(idx) as seen: policy.generate(labels, streams, greedy=True)
    case.close(torch.stack(seen, 1), 'out.cached_logits', tol)
    with replay() as seen: case.equal(policy.generate(labels, streams, greedy=True), 'out.greedy_idx')
    case.close(torch.stack(seen, 1), 'out.greedy_logits', tol)

@checks('vqgan-net2net')
@torch.no_grad()
def net2net(case):
    cfg, tol = case.data['config'], case.data['tolerance']['float_abs']
    assert cfg['permuter'] == 'identity' and cfg['pkeep'] == 1
    vq = VQGAN(tokenizer_config(cfg['first_stage'])).eval()
    policy = CINTransformer(transformer_config(cfg['transformer'], cfg['cond_stage']['n_classes'])).eval()
    for m, state in zip((policy, vq), split_state(case.weights())): m.load_state_dict(state)
    labels, image = case['in.labels'], ours(case['in.image'])
    case.close(vq.quantize(vq.latents(image))[0], 'out.quant', tol)
    ids = vq.encode(image)
    for name in ('z_indices', 'target'): case.equal(ids, f'out.{name}')
    case.equal(labels[:, None], 'out.c_indices')
    logits = policy(ids, labels)
    case.close(logits, 'out.logits', tol)
    case.close(F.cross_entropy(logits.flatten(0, 1), ids.flatten()), 'out.loss', tol)
    case.close(theirs(vq.decode(ids, clamp=False)), 'out.rec', 2*tol)
    streams = Streams.range(0, 0, len(labels))
    with replay() as seen: greedy = policy.generate(labels, streams, greedy=True)
    case.equal(greedy, 'out.greedy_idx')
    case.close(torch.stack(seen, 1), 'out.greedy_logits', tol)
    pixels = vq.decode(greedy, clamp=False)
    case.close(theirs(pixels), 'out.greedy_image', 2*tol)
    level, want = 255*pixels.permute(0, 2, 3, 1), case['out.greedy_uint8']
    off = (truncate_uint8(pixels).int() - want.int()).abs()
    assert (off <= ((level - level.round()).abs() < .02).int()).all(), f'out.greedy_uint8: off by up to {off.max()} levels' # only at the edge of an integer
    case.equal(policy.generate(labels, streams, greedy=True, given=ids[:, :ids.shape[1]//2]), 'out.half_idx')

@checks('vqgan-sampling')
def sampling(case):
    import warnings
    tol = case.data['tolerance']['float_abs']
    for c in case.data['cases']:
        i, ties = c.get('case', c.get('ties case')), 'ties case' in c
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            k, p = taming_filters(c['top_k'], c.get('top_p') if c.get('top_p') is not None else 1.)
        got = filter_logits(case['in.logits_ties' if ties else 'in.logits'], c.get('temperature', 1.), k, p)
        case.equal(got.isfinite(), f"out.{'ties_' * ties}filtered_keep.{i}")
        assert got.isfinite().sum(-1).tolist() == c['kept per row']
        if not ties: case.close(got.softmax(-1), f'out.prob.{i}', tol)

def check_state(got, case):
    "Same keys, shapes, dtypes and kinds as the recorded state dict"
    assert got == case.data['state_dict']
    about = case.data['about']
    assert len(got) == about['entries']
    size = lambda kind: sum(torch.Size(v['shape']).numel() for v in got.values() if v['kind'] == kind)
    assert size('parameter') == about['parameters'] and size('buffer') == about['buffer_elements']

def entries(module, prefix=''):
    names = {n for n, _ in module.named_parameters()}
    return {prefix + k: dict(shape=list(v.shape), dtype=str(v.dtype)[6:], kind='parameter' if k in names else 'buffer') for k, v in module.state_dict().items()}

@checks('manifest-vqgan')
def manifest_tokenizer(case):
    with torch.device('meta'): vq = VQGAN(tokenizer_config(case.data['about']['config']))
    known = vqgan.TOKENIZERS.get(case.path.stem.replace('imagenet_', ''))
    assert known is None or known == vq.cfg
    check_state(entries(vq), case)

@checks('manifest-cin')
def manifest_cin(case):
    cfg = case.data['about']['config']
    with torch.device('meta'): parts = CINTransformer(transformer_config(cfg['transformer'], cfg['cond_stage']['n_classes'])), VQGAN(tokenizer_config(cfg['first_stage']))
    assert (parts[0].cfg, vqgan.TOKENIZERS[vqgan.MODELS['vqgan_cin'][1]]) == (vqgan.MODELS['vqgan_cin'][0], parts[1].cfg)
    t = parts[0].cfg.block_size
    masks = {f'transformer.blocks.{i}.attn.mask': dict(shape=[1, 1, t, t], dtype='float32', kind='buffer') for i in range(parts[0].cfg.n_layer)} # dropped on loading
    check_state({**entries(parts[0], 'transformer.'), **entries(parts[1], 'first_stage_model.'), **masks}, case)
