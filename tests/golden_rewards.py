"Checkers of the reward networks: CLIP's and HPSv2's preprocessing, tokens and score formulas, the aesthetic head, MANIQA"
import json, warnings
from functools import lru_cache
from importlib.util import find_spec

import numpy as np, pytest, torch

from golden_cases import checks, close

def image_of(case):
    "The case's 8-bit image, [1, 3, H, W] in [0, 1]"
    image = case[case.data['image']]
    assert image.shape == (case.data['height'], case.data['width'], 3)
    return image.permute(2, 0, 1)[None]/255

def number(got, want, tol, name): assert abs(got - want) <= tol, f'{name}: {got}, expected {want}, tolerance {tol:g}'

@checks('preprocess')
def preprocess(case):
    from arpo_nb.scores.classifier import resnet_input
    from arpo_nb.scores.clip import CLIP_MEAN, CLIP_STD, centre_crop, clip_preprocess, hps_preprocess, shortest_side
    x, d = image_of(case), case.data
    stats = (case.context or {}).get('conventions', {})
    if stats: assert tuple(stats['clip_mean']) == CLIP_MEAN and tuple(stats['clip_std']) == CLIP_STD
    got = dict(hps=hps_preprocess(x)[0], open_clip=clip_preprocess(x)[0], resnet50_v2=resnet_input(x)[0])
    for name, y in got.items():
        if name not in d: continue
        assert y.shape == (3, 224, 224)
        case.close(y[:, ::8, ::8], d[name]['expected'], 2e-6)
        number(y.double().sum().item(), d[name]['sum'], 1e-7*y.numel(), f'{name} sum')
    if 'hps' not in d: return
    pixels = got['hps']*torch.tensor(CLIP_STD)[:, None, None] + torch.tensor(CLIP_MEAN)[:, None, None]
    rows, columns = ((pixels.abs() > 1e-5).any(0).any(i).nonzero() for i in (1, 0)) # the bars are black
    box = {'resized_to': [len(rows), len(columns)], 'pad_left_top': [columns[0].item(), rows[0].item()]}
    for name, v in box.items(): assert v == d['hps'][name], f'hps {name}: {v}, expected {d["hps"][name]}'
    for name, v in dict(min=pixels.min(), max=pixels.max()).items(): number(v.item(), d['hps'][name], 1e-6, f'hps {name}')
    cost = d.get('differences', {})
    plain = hps_preprocess(x, antialias=False)[0]*torch.tensor(CLIP_STD)[:, None, None] + torch.tensor(CLIP_MEAN)[:, None, None]
    if 'hps_without_antialias_max_abs_in_0_1' in cost: number((plain - pixels).abs().max().item(), cost['hps_without_antialias_max_abs_in_0_1'], 1e-5, 'hps_without_antialias_max_abs_in_0_1')
    eight, floats = (255*centre_crop(shortest_side(x, eight_bit=e), 224)[0].double() for e in (True, False))
    for name, v in dict(open_clip_pil_vs_float_tensor_antialias_max_levels=(eight - floats).abs().max(), open_clip_pil_vs_float_tensor_mean_levels=(eight - floats).abs().mean(),
                        open_clip_pil_vs_float_tensor_rounded_max_levels=(eight - floats.round().clamp(0, 255)).abs().max()).items():
        if name in cost: number(v.item(), cost[name], 1e-3, name)

@checks('tokenizer')
def tokenizer(case):
    if not find_spec('open_clip'): pytest.skip('open_clip is not installed')
    from arpo_nb.scores.clip import tokenize
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        tokens = tokenize(case.data['texts'], case.data['context_length'])
    assert tokens.shape == (len(case.data['texts']), case.data['context_length'])
    for text, got, want in zip(case.data['texts'], tokens.tolist(), case.data['expected']):
        assert got == want + [case.data['pad']]*(len(got) - len(want)), f'expected tokens of {text[:40]!r} are {want}, got {got}'

NAMES = dict(cosine='cosine', hps_score='cosine', hps_benchmark_times_100='percent', torchmetrics_clip_score='torchmetrics', original_clipscore_2_5='clipscore')

@checks('score')
def score(case):
    from arpo_nb.scores.clip import cosine_scores
    image, text = (torch.tensor(case.data[f'{k}_features'], dtype=torch.float64) for k in ('image', 'text'))
    for name, want in case.data['expected'].items():
        want = torch.tensor(want, dtype=torch.float64)
        if name == 'all_pairs_cosine': got = cosine_scores(image[:, None], text[None])
        else: got = cosine_scores(image, text, NAMES[name])
        close(got, want, 1e-12*max(1., want.abs().max().item()), name)

@checks('aesthetic_v2')
def aesthetic_v2(case):
    from arpo_nb.scores.clip import AestheticHead, affine_score
    e, w, b, want = case['embeddings'], case['collapsed_weight'], case['collapsed_bias'], {k: torch.tensor(v, dtype=torch.float64) for k, v in case.data['expected'].items()}
    got = affine_score(e, w, b)
    close(got, want['score_collapsed_f64'], 1e-12*max(1., got.abs().max().item()), 'score_collapsed_f64')
    close(got, want['score_five_layers_f32'], 1e-5, 'score_five_layers_f32')
    close(e.double() @ w + b, want['score_if_embedding_not_normalised'], 1e-9, 'score_if_embedding_not_normalised')
    number(w.norm().item(), case.data['collapsed_weight_norm'], 1e-10, 'collapsed_weight_norm')
    for got, limit in zip((b - w.norm(), b + w.norm()), case.data['score_range_on_the_unit_sphere']): number(got.item(), limit, 1e-9, 'score_range_on_the_unit_sphere')
    shapes = {k: list(v.shape) for k, v in AestheticHead().state_dict().items()}
    assert shapes == case.data['head_file']['state_dict'], 'head_file: names or shapes differ'
    head = AestheticHead().eval()
    assert torch.allclose(head(e).double(), affine_score(e, *head.collapse()), atol=1e-5)

def formula_image(height, width, variant):
    "[3, H, W] 8-bit image by the cases' formula, as whole numbers"
    i, j, c = np.ogrid[:height, :width, :3]
    return torch.from_numpy((i*(3 + c) + 2*j*(c + 1) + i*j//(7 + c) + 40*variant*(c + 1)) % 256).permute(2, 0, 1)

def formula_weights(keys_and_shapes, recipe):
    "MANIQA's weights by the cases' recipe; buffers are left out"
    state = {}
    for n, (key, shape) in enumerate(sorted(keys_and_shapes.items())):
        if key in recipe['buffers']: continue
        u = np.random.RandomState(recipe['base'] + n).random_sample(shape) - .5
        if key == 'fc_score.3.bias': u = np.full(shape, .5)
        elif key.startswith('vit.head.'): u *= .02
        elif key.endswith('relative_position_bias_table') or key in ('vit.cls_token', 'vit.pos_embed'): u *= .4
        elif len(shape) == 1: u = 1 + .2*u if 'norm' in key and key.endswith('weight') else .1*u
        else: u *= 2*np.sqrt(3/np.prod(shape[1:]))
        state[key] = torch.from_numpy(u).float()
    return state

@lru_cache(1)
def maniqa_net(text):
    "A case's network, its weights those of the recipe, and these weights"
    from arpo_nb.scores.maniqa import MANIQA
    d = json.loads(text)
    net = MANIQA(**d['config'])
    shapes = {k: list(v.shape) for k, v in net.state_dict().items()}
    assert shapes == d['keys_and_shapes'], 'keys_and_shapes: names or shapes differ'
    assert sum(p.numel() for p in net.parameters()) == d['parameters']
    weights = formula_weights(d['keys_and_shapes'], d['weights_recipe'])
    wrong = net.load_state_dict(weights, strict=False)
    assert not wrong.unexpected_keys and set(wrong.missing_keys) == set(d['weights_recipe']['buffers'])
    return net, weights

@lru_cache(8)
def maniqa_score(text, height, width, variant, kind):
    "A picture's score: in float32 or float64, or in float32 with every weight moved by up to half an ulp, by a seed"
    from arpo_nb.scores.maniqa import MANIQAReward
    net, weights = maniqa_net(text)
    if isinstance(kind, int):
        gen = torch.Generator().manual_seed(kind)
        moved = {k: (w.double()*(1 + (torch.rand(w.shape, generator=gen) - .5)*2**-23)).float() for k, w in weights.items()}
        net.load_state_dict(moved, strict=False)
    reward = MANIQAReward(net.double() if kind == 'float64' else net)
    try: return reward.score(formula_image(height, width, variant)[None]/255)[0].item()
    finally: net.float().load_state_dict(weights, strict=False)

MANIQA_TOL = 3e-3 # Leaving out any part of the network costs more.
MOVED = 3 # scores with moved weights, of which the spread is estimated
# The formula's weights amplify rounding: moving every weight by half an ulp moves the score by a hundredth, and so does the
# order in which a processor adds. A recorded float32 score is therefore compared with ours in float32 and, where they lie
# apart, with ours in float64, by how far float32 scores spread around that. Of the variants of 224 × 224, measured:
MANIQA_EXACT = {(224, 224, 0): (2.66811917, .0031), (224, 224, 1): (2.24255249, .0169), (224, 224, 2): (2.51240443, .0041),
                (224, 224, 3): (1.60320887, .0092)}
MANIQA_BASE = 11500 # of the recipe

def maniqa_exact(text, image):
    "The score in float64, and the root mean square of float32 scores around it"
    known = MANIQA_EXACT.get((image['height'], image['width'], image['variant']))
    if known and json.loads(text)['weights_recipe']['base'] == MANIQA_BASE: return known
    exact = maniqa_score(text, **image, kind='float64')
    around = [maniqa_score(text, **image, kind=k) - exact for k in ('float32', *range(MOVED))]
    return exact, np.sqrt(np.mean(np.square(around)))

@checks('maniqa')
def maniqa(case):
    if not find_spec('timm'): pytest.skip('timm is not installed')
    text = json.dumps({k: case.data[k] for k in ('config', 'keys_and_shapes', 'parameters', 'weights_recipe')}, sort_keys=True)
    for i, image in enumerate(case.data['images']):
        got = maniqa_score(text, **image, kind='float32')
        for name in ('expected_score', 'second_implementation_score'):
            assert len(case.data[name]) == len(case.data['images'])
            if abs(got - case.data[name][i]) <= MANIQA_TOL: continue
            exact, spread = maniqa_exact(text, image)
            for score in (got, case.data[name][i]): number(score, exact, 4*spread, f'{name} {i}')
