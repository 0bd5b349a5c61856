"The run notebooks with the real models' names: small shapes, random weights, everything else as in a full run"
import copy
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT
from PIL import Image
from doors import ENV, run_cells as cells

from arpo_nb.scores.classifier import load_resnet50
from arpo_nb.scores.features import LPIPSFeatures
from arpo_nb.models import llamagen
from arpo_nb.models.janus import JanusConfig, JanusPolicy, SpecialIds
from arpo_nb.models.llamagen import GPT, GPTConfig
from arpo_nb.models.multiscale_vq import MultiScaleConfig, MultiScaleVQ
from arpo_nb.protocols import Streams
from arpo_nb.models.tokenizers import VQConfig, VQModel
from arpo_nb.models.var import VAR, VARConfig, randomise
from arpo_nb.models.vqgan import VQGAN, CINConfig, CINTransformer, VQGANConfig
from arpo_nb.specs import families

JANUS = JanusConfig(dim=32, n_layer=2, n_head=4, n_kv_head=2, ffn_dim=48, text_vocab_size=60, max_positions=64, vocab_size=24, num_tokens=16, ids=SpecialIds(1, 2, 3, 4, 5))


def vq16(): return VQModel(VQConfig(ch=8, encoder_ch_mult=(1, 1, 2), decoder_ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=8, codebook_size=24, codebook_embed_dim=4, num_groups=4, image_size=16))

def var():
    vq = MultiScaleVQ(MultiScaleConfig(ch=8, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=8, codebook_size=24, patch_nums=(1, 2, 4), num_groups=4, image_size=16))
    torch.nn.init.normal_(vq.quantize.embedding.weight)
    return randomise(VAR(VARConfig(depth=2, embed_dim=32, num_heads=2, z_channels=8, patch_nums=(1, 2, 4), vocab_size=24), vq.quantize)), vq

SMALL = dict(vqgan_cin=lambda: (CINTransformer(CINConfig(block_size=16, n_layer=2, n_head=2, n_embd=32, vocab_size=24, num_classes=20)),
                                VQGAN(VQGANConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, attn_resolutions=(4,), resolution=16, z_channels=8, codebook_size=24, embed_dim=6, image_size=16))),
             llamagen_t2i_xl=lambda: (GPT(GPTConfig(dim=32, n_layer=2, n_head=2, vocab_size=24, block_size=16, multiple_of=32, cond='text', cond_len=8, caption_dim=8)), vq16()),
             janus_pro_1b=lambda: (JanusPolicy(JANUS), vq16()), var_d16=var)


class TinyT5:
    "Features that depend on the prompt, in T5's place"
    def __init__(self, *args, **kwargs): pass
    def __call__(self, prompts):
        feats = torch.stack([torch.randn(8, 8, generator=torch.Generator().manual_seed(len(p))) for p in prompts])
        return feats, torch.ones(len(prompts), 8, dtype=torch.long)


@pytest.fixture(scope='module')
def lpips(): return LPIPSFeatures(random=True)


@pytest.fixture(autouse=True)
def small(monkeypatch, lpips):
    plt.switch_backend('agg')
    small = {n: replace(families()[n], build=lambda weights=None, n=n: tuple(m.eval() for m in SMALL[n]())) for n in SMALL}
    known = {**families(), **small}
    monkeypatch.setattr('arpo_nb.specs.families', lambda: known)
    monkeypatch.setattr('arpo_nb.systems.LPIPSFeatures', lambda net, random, path: copy.deepcopy(lpips)) # of full size, so made once
    monkeypatch.setattr('arpo_nb.systems.T5Features', TinyT5)
    monkeypatch.setattr('arpo_nb.systems.check_hub_model', lambda *args: None) # it would ask for the T5 whose place that takes
    monkeypatch.setattr('arpo_nb.systems.model_files', lambda *args: [])
    monkeypatch.setattr('arpo_nb.training.plan.model_files', lambda *args: [])
    AcceleratorState._reset_state(True) # other tests of this process had another precision
    with patch.dict('arpo_nb.models.janus.CONFIGS', janus_pro_1b=(JANUS, None)): yield
    AcceleratorState._reset_state(True)


def run_cells(name, **params):
    names = cells(name, **params)
    plt.close('all')
    return names


@pytest.fixture
def pictures(tmp_path):
    "Two class folders that are captioned as well"
    rng = np.random.default_rng(0)
    for i in range(8):
        d = tmp_path/'data'/'ab'[i % 2]
        d.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(20, 24, 3), dtype=np.uint8)).save(d/f'{i}.png')
        (d/f'{i}.txt').write_text(f'a picture of {"colours "*i}')
    (tmp_path/'prompts.txt').write_text('\n'.join(f'a picture of {"colours "*i}' for i in range(8)))
    return tmp_path

SIZES = 'batch_size=4,num_generations=2,mini_batch_size=0,micro_batch_size=0,num_iterations=1,decode_batch_size=8'
COMMON = dict(weights='random', steps=2, eval_images=0)


@pytest.mark.parametrize('model', ['vqgan_cin', 'llamagen_t2i_xl', 'janus_pro_1b', 'var_d16'])
def test_run_vapi(model, pictures):
    space = run_cells('run_vapi', model=model, data=str(pictures/'data'), out_dir=str(pictures/'run'), baselines='mle', overrides=SIZES, **COMMON)
    assert len(space['curves']['tuned']) == 2 and len(space['curves']['mle']) == 2
    said = json.loads((pictures/'run'/'summary.json').read_text())['understanding']
    assert said.keys() == ({'tuned', 'mle'} if model == 'janus_pro_1b' else set()) and all(c['worst'] <= c['mean'] and c['worst'] != 0 for c in said.values())


@pytest.mark.parametrize('model', ['vqgan_cin', 'llamagen_t2i_xl', 'janus_pro_1b'])
def test_run_loofid(model, pictures):
    data = 'default' if model == 'vqgan_cin' else str(pictures/'prompts.txt')
    space = run_cells('run_loofid', model=model, data=data, out_dir=str(pictures/'run'), arms='none', overrides=f'{SIZES},rewards=brightness+loo_fid,rollout_cfg_scale=1.0', **COMMON)
    assert len(space['curves']['tuned']) == 2 and 'reward/loo_fid/ema_fid' in space['curves']['tuned'][0]
    if model != 'vqgan_cin':
        with pytest.raises(FileNotFoundError, match='got a folder'): run_cells('run_loofid', model=model, data=str(pictures/'data'), out_dir=str(pictures/'other'), overrides=f'{SIZES},rewards=brightness', **COMMON)


def test_run_var(tmp_path):
    "Nothing but the run itself unless asked for; what one of several runs lacks is found before the first; given steps win; nothing is drawn that was not measured"
    ask = dict(model='var_d16', rewards='brightness', overrides=SIZES, **COMMON)
    assert list(run_cells('run_var', out_dir=str(tmp_path/'plain'), **ask)['runs']) == ['.']
    for arm, lack, more in (('vapi', "data='default'", {}), ('painting', 'clip_l14', {}), ('loofid', 'num_processes=8', dict(overrides='', num_processes=8))):
        with pytest.raises(RuntimeError, match=f'(?s)arms/{arm}: .*{lack}'): run_cells('run_var', out_dir=str(tmp_path/arm), arms=f'half_labels, {arm}', **ask | dict(weights='default') | more)
        assert not list((tmp_path/arm).rglob('metrics.jsonl'))
    with patch.dict('arpo_nb.config.VAR_EXPERIMENTS', painting=dict(rewards='brightness', prompt='a painting', steps=625)):
        space = run_cells('run_var', out_dir=str(tmp_path/'more'), arms='painting', sweeps='kl', **ask)
    assert {c.steps for c in space['runs'].values()} == {2} and space['runs']['arms/painting'].prompt == 'a painting'
    assert [f.keys() for f in space['table']['kl'].values()] == [{'reward'}]*4 and space['label'] is None


def kites(folder, n=3, **changes):
    "Prompts in GenEval's format"
    path = folder/'geneval.jsonl'
    path.write_text('\n'.join(json.dumps(dict(tag='single_object', include=[{'class': 'kite', 'count': 1} | changes], prompt=f'a photo of {i} kites')) for i in range(n)))
    return str(path)

def random_pictures(folder, n, seed=0):
    folder.mkdir(parents=True)
    for i in range(n): Image.fromarray(np.random.default_rng(seed + i).integers(256, size=(16, 16, 3), dtype=np.uint8)).save(folder/f'{i}.png')
    return str(folder)

@pytest.mark.parametrize('model', ['vqgan_cin', 'llamagen_t2i_xl', 'janus_pro_1b', 'var_d16'])
def test_run_eval(model, pictures, monkeypatch):
    monkeypatch.setattr('arpo_nb.scores.classifier.load_resnet50', lambda path: load_resnet50('random'))
    monkeypatch.setattr(torch, 'compile', lambda f, mode: f)
    options = dict(vqgan_cin=dict(inception='random', labels='random', reference=random_pictures(pictures/'reference', 8)), var_d16=dict(reference='none', labels='unseen', classifier=True, guidance=2.5, dtype='bfloat16'))
    text = dict(prompts=kites(pictures), scores='clip_b32', score_weights='random', dtype='bfloat16', compile=model.startswith('llamagen'))
    with pytest.warns(UserWarning) if model == 'vqgan_cin' else patch('os.sep', os.sep):
        space = run_cells('run_eval', model=model, weights='random', n=5, size=16, batch_size=2, out_dir=str(pictures/'eval'), **options.get(model, text))
    kept = json.loads((pictures/'eval'/'eval.json').read_text())
    measured = dict(vqgan_cin='frechet', var_d16='top5').get(model, 'clip_b32')
    assert kept['metrics'].keys() == {'base', 'temperature 0.85'} and all(measured in m for m in kept['metrics'].values())
    settings = json.loads((pictures/'eval'/'base'/'samples.json').read_text())
    assert settings['dtype'] == ('float32' if model == 'vqgan_cin' else 'bfloat16') and isinstance(settings.get('compile', ''), str) and ('compile' in settings) == model.startswith('llamagen')
    if 'frechet' not in kept['metrics']['base']: assert space['net'] is None
    if model == 'var_d16': assert space['beside'] == space['rows'] and [r['row'] for r in space['rows']][0] == 'VAR-d16' and len(space['rows']) == 4 and len(space['classes'].unique()) == 5
    if 'clip_b32' == measured:
        folder = pictures/'eval'/'base_geneval'
        assert [len(list((folder/f'{i:05d}'/'samples').glob('*.png'))) for i in range(3)] == [2, 2, 1] and json.loads((folder/'00001'/'metadata.jsonl').read_text())['prompt'] == 'a photo of 1 kites'


@pytest.mark.parametrize('model', ['vqgan_cin', 'janus_pro_1b'])
def test_run_eval_of_a_run(model, pictures):
    "What a run leaves takes the place of the base's policy, whose tokenizer and prompts stay"
    run_cells('run_vapi', model=model, data=str(pictures/'data'), out_dir=str(pictures/'run'), baselines='none', overrides=f'{SIZES},learning_rate=0.1', **COMMON)
    asked = dict(reference='none', classifier=False) if model == 'vqgan_cin' else dict(prompts=kites(pictures))
    space = run_cells('run_eval', model=model, weights='random', checkpoint=str(pictures/'run'/'checkpoint'), n=4, size=16, batch_size=2, out_dir=str(pictures/'eval'), **asked)
    pixels = [np.stack([np.asarray(Image.open(p)) for p in sorted((pictures/'eval'/arm).glob('*.png'))]) for arm in ('base', 'tuned')]
    assert list(space['results']) == ['base', 'tuned'] and len(pixels[0]) == 4 and (pixels[0] != pixels[1]).any()


def test_compiled_steps_have_plain_weights():
    "Inductor cannot lower MKL's packed products"
    policy, seen = SMALL['llamagen_t2i_xl']()[0].eval(), []
    def wrap(step):
        def wrapped(*args):
            seen.append(any('forward' in m.__dict__ for m in policy.modules()))
            return step(*args)
        return wrapped
    cond, streams = TinyT5()(['a', 'b b']), Streams.range(0, 0, 2)
    assert torch.equal(policy.generate(cond, streams, compile=wrap), policy.generate(cond, streams)) and len(seen) == policy.num_tokens - 1 and not any(seen)


@pytest.mark.parametrize('half', [False, True])
@pytest.mark.parametrize('model', SMALL)
@torch.no_grad()
def test_packed_weights_draw_the_same_tokens(model, half, monkeypatch):
    "Also in half precision, and a head that says so gives float32"
    torch.manual_seed(0)
    policy, packs = SMALL[model]()[0].eval(), []
    cond = policy.example_cond(4) if hasattr(policy, 'example_cond') else torch.arange(4)
    by_hand = model in ('vqgan_cin', 'janus_pro_1b') # they do not rearrange for so few tokens
    for p in policy.parameters(): torch.nn.init.normal_(p, std=.3) # fresh heads may be zero
    def drawn(packer):
        monkeypatch.setattr(llamagen, 'packer', packer)
        with torch.autocast('cpu', torch.bfloat16, enabled=half), llamagen.packed_weights(policy, 4) if by_hand else nullcontext():
            return policy.generate(cond, Streams.range(0, 0, 4), cfg_scale=1. if model == 'vqgan_cin' else 2.)
    def onednn(layer, rows):
        if isinstance(layer, torch.nn.Linear): packs.append(layer); return llamagen._onednn
    plain = drawn(lambda *_: None)
    assert torch.equal(drawn(onednn), plain) and len(packs) >= 8 and len(plain.unique()) > 4
    assert not any('forward' in vars(m) for m in policy.modules())
    head = policy.head if isinstance(policy.head, torch.nn.Linear) else None # others make float32 of what it gives
    with torch.autocast('cpu', torch.bfloat16, enabled=half), llamagen.packed_weights(policy, 4):
        assert head is None or 'forward' in vars(head) and head(torch.randn(4, head.in_features)).dtype == torch.float32


def test_run_eval_makes_another_folders_reference(tmp_path):
    options = dict(model='vqgan_cin', weights='random', n=5, size=16, batch_size=5, inception='random', out_dir=str(tmp_path/'eval'))
    first, other, again = (run_cells('run_eval', reference=r, **options)['real'] for r in (random_pictures(tmp_path/'a', 8), random_pictures(tmp_path/'b', 6, 9), str(tmp_path/'b')))
    assert (first.source, first.n, other.source, other.n) == ('a', 8, 'b', 6) and not torch.equal(first.mu, other.mu) and again.sha256 == other.sha256


def test_run_eval_on_real_pictures(tmp_path):
    for i in range(10): random_pictures(tmp_path/'real'/f'class_{i}', 2, i)
    space = run_cells('run_eval', model='toy', n=12, batch_size=6, pictures=str(tmp_path/'real'), out_dir=str(tmp_path/'eval'))
    assert space['results']['pictures']['n'] == 20 and space['results']['pictures'].keys() == space['results']['base'].keys() and space['shown'].tolist() == [i//2 for i in range(20)]
    for name in 'ab': random_pictures(tmp_path/'few'/name, 1)
    with pytest.raises(ValueError, match='2 sub-folders'): run_cells('run_eval', model='toy', n=12, pictures=str(tmp_path/'few'), out_dir=str(tmp_path/'x'))


REFUSED = [(dict(n=3), 'more than k=3'), (dict(n=0), 'n=0'), (dict(labels='sorted'), 'balanced, random, seen or unseen'), (dict(labels='unseen', class_split=1.), 'leaves none'), (dict(dtype='float16'), 'float32 or bfloat16'),
           (dict(model='toy_var', compile=True), 'does not take compile'), (dict(prompts='', detector='.'), "GenEval's format"), (dict(model='vqgan_cin', weights='random', inception='random', reference='wrong.npz'), 'mu of 9 dimensions'),
           (dict(model='llamagen_t2i_xl', weights='random', prompts={}, detector='.'), 'evaluate_images.py'), (dict(model='llamagen_t2i_xl', weights='random', prompts=dict(count=0)), 'count 0'),
           (dict(checkpoint='run/checkpoint', labels='seen', class_split=.5), 'class_split=0.3 and seed=4')]

@pytest.mark.parametrize('params, message', REFUSED, ids=[m for _, m in REFUSED])
def test_run_eval_refuses_before_sampling(params, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez('wrong.npz', mu=np.zeros(9), sigma=np.eye(9), network='random Inception 0')
    (tmp_path/'run'/'checkpoint').mkdir(parents=True)
    (tmp_path/'run'/'config.json').write_text('{"class_split": 0.3, "seed": 4}')
    (tmp_path/'run'/'checkpoint'/'model.safetensors').write_bytes((ROOT/'arpo_nb/assets/policy.safetensors').read_bytes())
    if isinstance(params.get('prompts'), dict): params = params | dict(prompts=kites(tmp_path, **params['prompts']))
    with pytest.raises((ValueError, FileNotFoundError), match=message): run_cells('run_eval', **{'model': 'toy', 'n': 10, **params})
    assert not list(tmp_path.rglob('*.png'))


def test_samples_of_two_processes(tmp_path):
    "torchrun draws and packs what one process draws, and run_eval measures it without drawing"
    options = ['--model', 'toy', '--images', '9', '--batch-size', '4']
    def draw(out, *more, start=('-m', 'torch.distributed.run', '--nproc_per_node', '2', '-m')):
        done = subprocess.run([sys.executable, *start, 'arpo_nb.evaluation.sample_writer', *options, '--out', str(tmp_path/out), *more], capture_output=True, text=True, env=ENV, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout
    said = draw('base', '--npz')
    assert 'process 0 of 2: 5 images' in said and 'process 1 of 2: 4 images' in said
    packed = np.load(tmp_path/'base.npz')['arr_0']
    draw('temperature_0.85', '--temperature', '.85', start=('-m',))
    written = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('0*.png')}
    run_cells('run_eval', model='toy', n=9, out_dir=str(tmp_path))
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob('0*.png')} == written and len(written) == 18
    run_cells('run_eval', model='toy', n=9, out_dir=str(tmp_path/'alone'))
    assert (packed == np.stack([np.array(Image.open(tmp_path/'alone'/'base'/f'{i:06d}.png')) for i in range(9)])).all()
