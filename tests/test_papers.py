"What the papers and their code say, where a test says it shorter than a page"
import json
import warnings
from dataclasses import replace
from importlib.util import find_spec
from inspect import signature
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image

import arpo_nb.systems
from arpo_nb.config import Config, choose_baselines, in_vain, preset
from arpo_nb.models.janus import JanusConfig, JanusPolicy, SpecialIds
from arpo_nb.protocols import Batch, Streams
from arpo_nb.rewards import ReconstructionReward, WeightedSum
from arpo_nb.systems import load_data, load_system
from arpo_nb.training.rollout import encode_images, score_groups, teacher_forced
from arpo_nb.training.steps import make_reward
from arpo_nb.training.trainer import train

TINY = Config(model='toy', steps=3, batch_size=4, num_generations=2, save_steps=3)


def cells(name, last='', **params):
    "The code cells of a notebook with other parameters, run here up to the one that contains `last`"
    space = {}
    for cell in json.loads((ROOT/'nbs'/f'{name}.ipynb').read_text())['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] != 'code': continue
        exec(compile(source, name, 'exec'), space)
        if 'parameters' in cell['metadata'].get('tags', ()):
            assert params.keys() <= space.keys(), params.keys() - space.keys()
            space |= params
        if last and last in source: break
    return space


@pytest.fixture(scope='module')
def toy():
    "The toy with one step's images and samples"
    system = load_system('toy')
    images, labels = load_data(TINY, system).load(range(4))
    batch = Batch(labels, Streams.range(0, 0, 4), images)
    r = teacher_forced(system.policy, batch, encode_images(system.tokenizer, images), num_generations=3)
    return system, batch, r


def test_the_reconstruction_reward_sees_unclamped_pixels(toy):
    system, batch, r = toy
    raw = system.tokenizer.decode(r.tokens.flatten(0, 1), clamp=False).unflatten(0, (4, 3))
    assert ((raw < 0) | (raw > 1)).float().mean() > .05 # or the test says nothing
    for clamp in (False, True):
        got, _ = score_groups(make_reward(system, replace(TINY, clamp_reward=clamp)), system.tokenizer, r.tokens, batch)
        pixels = raw.clamp(0, 1) if clamp else raw
        want = -4*(pixels - batch.images[:, None]).square().mean((2, 3, 4))
        for a, b in zip(system.perceptual.features(pixels.flatten(0, 1)), system.perceptual.features(batch.images.repeat_interleave(3, 0))):
            want = want - (a - b).square().sum(1).mean((-2, -1)).view(4, 3)
        assert torch.allclose(got, want, atol=1e-5)


def test_other_rewards_still_see_the_screen(toy):
    system, batch, r = toy
    seen = []
    def look(images, batch, state): seen.append((images.min().item(), images.max().item())); return images.mean((2, 3, 4)), state
    score_groups(look, system.tokenizer, r.tokens, batch)
    score_groups(WeightedSum(dict(recon=(ReconstructionReward(), 1.), look=(look, 1.))), system.tokenizer, r.tokens, batch)
    assert len(seen) == 2 and all(low >= 0 and high <= 1 for low, high in seen)


def test_clamp_reward_is_in_vain_without_the_reward():
    assert any('clamp_reward' in v for v in in_vain(replace(TINY, method='mle', clamp_reward=True)))
    assert not any('clamp_reward' in v for v in in_vain(replace(TINY, clamp_reward=True)))


def test_context_noise_reaches_the_prior_alone(tmp_path):
    run = lambda xi: train(load_system('toy'), load_data(TINY, load_system('toy')), replace(TINY, method='mle', noise_rate=xi), tmp_path/str(xi), progress=False)
    clean, noisy = (run(xi)[0]['policy/prior_ce'] for xi in (0., .5))
    assert noisy > clean + .1
    assert preset('llamagen_t2i_xl', 'mle').noise_rate == 0. # clean unless asked for
    assert 'noise_rate' not in choose_baselines('prior_only')['prior_only']


def test_a_saturated_reward_is_one_warning(tmp_path):
    same = lambda images, batch, state=None: (torch.ones(images.shape[:2]), state)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        train(load_system('toy'), load_data(TINY, load_system('toy')), TINY, tmp_path, reward=same, progress=False)
    assert sum('all rewards are equal' in str(w.message) for w in said) == 1


def test_only_janus_knows_the_released_scoring(tmp_path):
    odd = replace(TINY, teacher_forcing='released_code')
    with pytest.raises(ValueError, match="teacher_forcing='released_code'"): train(load_system('toy'), load_data(TINY, load_system('toy')), odd, tmp_path, progress=False)
    with pytest.raises(ValueError, match='free-running'): Config(method='grpo', rewards='clip', teacher_forcing='released_code')


@pytest.fixture
def janus():
    pytest.importorskip('transformers')
    torch.manual_seed(0)
    cfg = JanusConfig(dim=32, n_layer=2, n_head=2, ffn_dim=48, text_vocab_size=60, max_positions=64, vocab_size=24, num_tokens=16, ids=SpecialIds(1, 2, 3, 4, 5))
    return JanusPolicy(cfg).eval()


@torch.no_grad()
def test_released_scoring_leaves_sampling_alone(janus):
    cond = janus.example_cond(2)
    before = janus.generate(cond, Streams.range(0, 0, 2))
    janus.teacher_forcing = 'released_code'
    assert torch.equal(janus.generate(cond, Streams.range(0, 0, 2)), before)


def test_mle_needs_no_perceptual_network(monkeypatch, tmp_path):
    asked, real = [], load_system
    def load(*args, **kw):
        asked.append(signature(real).bind(*args, **kw).arguments.get('perceptual', True))
        return real(*args, **kw)
    monkeypatch.setattr(arpo_nb.systems, 'load_system', load)
    for i, (want, more) in enumerate(((False, dict(method='mle')), (False, dict(overrides='perceptual_coef=0')), (True, {}))):
        asked.clear()
        cells('run_vapi', 'system = build()', baselines='none', steps=1, eval_images=0, out_dir=str(tmp_path/str(i)), **more)
        assert set(map(bool, asked)) == {want}, more


@pytest.mark.parametrize('given, want', [('default', 'brightness'), ('darkness', 'darkness')])
def test_a_sweep_is_of_the_reward_that_was_asked_for(given, want, tmp_path):
    space = cells('run_var', 'SWEEPS = ', rewards=given, sweeps='kl', arms='none', out_dir=str(tmp_path))
    swept = {n: c | changes for n, (cfg, changes) in space['todo'].items() if n.startswith('sweeps/') for c in [vars(cfg)]}
    assert len(swept) == 4 and {c['rewards'] for c in swept.values()} == {want}


def test_pictures_in_folders_named_by_numbers(tmp_path):
    for i in range(12):
        (tmp_path/str(i)).mkdir()
        Image.new('RGB', (8, 8), (i, 0, 0)).save(tmp_path/str(i)/'a.png')
    source = next(s for c in json.loads((ROOT/'nbs'/'run_eval.ipynb').read_text())['cells'] if 'if pictures:' in (s := ''.join(c['source'])))
    from arpo_nb.data.images import class_ids
    from arpo_nb.evaluation.metrics import image_files
    from arpo_nb.files import user_path
    space = dict(pictures=str(tmp_path), text=False, model='x', system=type('S', (), dict(num_classes=12)), class_ids=class_ids, image_files=image_files, torch=torch, user_path=user_path)
    exec(source[source.index('if pictures:'):], space)
    assert space['shown'].tolist() == [int(Path(f).parent.name) for f in image_files(str(tmp_path))]


def test_one_bicubic_resize_is_torchvisions():
    from arpo_nb.weights import import_torchvision
    try: import_torchvision()
    except ImportError: pytest.skip('torchvision is not installed')
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize
    import numpy as np
    from arpo_nb.data.image_io import center_crop, resize_crop
    rng = np.random.default_rng(0)
    for h, w in ((61, 90), (200, 77), (64, 64), (65, 131)):
        image = Image.fromarray(rng.integers(256, size=(h, w, 3), dtype=np.uint8))
        want = Compose([Resize(32, interpolation=InterpolationMode.BICUBIC), CenterCrop(32)])(image)
        assert np.array_equal(np.asarray(resize_crop(image, 32)), np.asarray(want)), (h, w)
    assert not np.array_equal(np.asarray(resize_crop(image, 32)), np.asarray(center_crop(image, 32)))


def test_class_prompts_have_no_article_and_synonyms_on_request():
    system = load_system('toy')
    asked = system.with_prompts(Batch(torch.tensor([8]), Streams.range(0, 0, 1)))
    assert asked.prompts == ['a photo of bag']
    assert preset('llamagen_l', 'loofid').class_names == 'short' and preset('llamagen_xl', 'ar_grpo').class_names == 'synonyms'
    if not find_spec('timm'): pytest.skip('timm is not installed')
    names = arpo_nb.systems.imagenet_synonyms()
    assert names[0] == 'tench, Tinca tinca' and names[999] == 'toilet tissue, toilet paper, bathroom tissue' and len(names) == 1000


def test_presets_read_the_papers():
    assert [preset(m, 'ar_grpo').batch_size for m in ('llamagen_xl', 'llamagen_t2i_xl')] == [4, 8]
    assert preset('var_d16', 'var_grpo').steps == 40_000 and preset('var_d16', 'var_grpo', 'updates').steps == 2500
    mine = preset('llamagen_l', 'loofid', 'per_gpu')
    assert mine.batch_size*mine.num_generations == 4*144 and mine.num_processes == 4
    from arpo_nb.config import LOOFID_ABLATIONS
    for name in ('mle_500', 'mle_5000'):
        row = replace(preset('llamagen_l', 'loofid'), **LOOFID_ABLATIONS[name])
        assert row.batch_size == 144 and row.update_dropout
    longer = replace(preset('llamagen_xxl'), **choose_baselines('tokenizer_longer')['tokenizer_longer'])
    assert (longer.method, longer.steps) == ('tokenizer', 10_000)


def test_the_perceptual_network_is_the_one_that_is_asked_for():
    from arpo_nb.config import uses_perceptual
    from arpo_nb.systems import model_files
    code = preset('janus_pro_1b', variant='released_code')
    assert uses_perceptual(code) == 'alex' and not uses_perceptual(replace(code, method='mle'))
    names = [n for n, _ in model_files('llamagen_xl', perceptual=uses_perceptual(code))]
    assert {'alexnet', 'lpips_alex'} < {*names} and 'vgg16' not in names


def test_the_papers_rows_are_all_papers():
    from arpo_nb.evaluation.metrics import paper_rows, rows_beside
    assert {r['paper'] for r in paper_rows()} == {'VA-π', 'LOO-FID', 'VAR-GRPO'}
    from arpo_nb.specs import find_model
    for model, paper, guidance in (('llamagen_xl', 'VA-π', 2.), ('llamagen_xxl', 'VA-π', 1.75), ('llamagen_l', 'LOO-FID', 1.5),
                                   ('llamagen_t2i_xl', 'VA-π', 7.5), ('var_d16', 'VAR-GRPO', 2.5)):
        theirs = find_model(model).sampling
        assert theirs[paper]['cfg_scale'] == guidance
        assert {r['paper'] for r in rows_beside(model, guidance, theirs) if r['guided']} == {paper}, model
        assert not any(r['guided'] for r in rows_beside(model, guidance + .1, theirs))
    assert find_model('llamagen_t2i_xl').sampling['VA-π']['top_k'] == 2000
    assert find_model('llamagen_t2i_xl').sampling['AR-GRPO'] == dict(cfg_scale=2., top_k=2000)
    assert find_model('llamagen_xl').sampling['AR-GRPO'] == dict(cfg_scale=2.)


def test_run_eval_takes_a_papers_sampler():
    space = cells('run_eval', 'system, sampling, speed = arms', paper='', guidance=1.5)
    assert space['sampling']['cfg_scale'] == 1.5
    with pytest.raises(ValueError, match="paper='VA-π'"): cells('run_eval', 'system, sampling, speed = arms', paper='VA-π')


def test_classes_of_the_panels():
    last = "picked = range(n)"
    assert list(cells('run_eval', last, n=40)['picked'])[:3] == [0, 1, 2]
    space = cells('run_eval', last, n=40, panel='8, sandal')
    assert space['picked'] == [8, 18, 28, 38, 5, 15, 25, 35] # two classes of ten, each tenth picture
    with pytest.raises(ValueError, match="no class 'dog'"): cells('run_eval', last, n=40, panel='dog')
