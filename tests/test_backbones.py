"The run notebooks with the real models' names: small shapes, random weights, everything else as in a full run"
import copy
import json
import os
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT
from PIL import Image

from arpo_nb.features import LPIPSFeatures
from arpo_nb.janus import JanusConfig, JanusPolicy, SpecialIds
from arpo_nb.llamagen import GPT, GPTConfig
from arpo_nb.multiscale_vq import MultiScaleConfig, MultiScaleVQ
from arpo_nb.tokenizers import VQConfig, VQModel
from arpo_nb.var import VAR, VARConfig, randomise
from arpo_nb.vqgan import VQGAN, CINConfig, CINTransformer, VQGANConfig

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
    build = lambda model, weights: tuple(m.eval() for m in SMALL[model]())
    monkeypatch.setattr('arpo_nb.models.BUILDERS', ((list(SMALL), build),))
    monkeypatch.setattr('arpo_nb.models.LPIPSFeatures', lambda random: copy.deepcopy(lpips)) # of full size, so made once
    monkeypatch.setattr('arpo_nb.models.T5Features', TinyT5)
    monkeypatch.setattr('arpo_nb.models.model_files', lambda *args: [])
    monkeypatch.setattr('arpo_nb.plan.model_files', lambda *args: [])
    AcceleratorState._reset_state(True) # other tests of this process had another precision
    with patch.dict('arpo_nb.janus.CONFIGS', janus_pro_1b=(JANUS, None)): yield
    AcceleratorState._reset_state(True)


def run_cells(name, **params):
    "The cells of a notebook in this process, with other parameters"
    space = {}
    for cell in json.loads((ROOT/'nbs'/f'{name}.ipynb').read_text())['cells']:
        if cell['cell_type'] != 'code': continue
        exec(compile(''.join(cell['source']), name, 'exec'), space)
        if 'parameters' in cell['metadata'].get('tags', ()):
            assert params.keys() <= space.keys(), params.keys() - space.keys()
            space |= params
    plt.close('all')
    return space


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
    assert len(space['curves']['tuned']) == 2 and len(space['curves']['mle']) == 2 and (pictures/'run'/'summary.json').exists()


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


@pytest.mark.parametrize('model', ['vqgan_cin', 'llamagen_t2i_xl', 'janus_pro_1b'])
def test_run_eval(model, pictures):
    sees = [{'class': 'kite', 'count': 1}]
    (pictures/'geneval.jsonl').write_text('\n'.join(json.dumps(dict(tag='single_object', include=sees, prompt=f'a photo of {i} kites')) for i in range(3)))
    options = dict(inception='random', labels='random', reference=str(pictures/'reference')) if model == 'vqgan_cin' else dict(prompts=str(pictures/'geneval.jsonl'), scores='clip_b32', score_weights='random')
    if model == 'vqgan_cin':
        (pictures/'reference').mkdir()
        for i in range(8): Image.fromarray(np.random.default_rng(i).integers(256, size=(16, 16, 3), dtype=np.uint8)).save(pictures/'reference'/f'{i}.png')
    with pytest.warns(UserWarning) if model == 'vqgan_cin' else patch('os.sep', os.sep):
        space = run_cells('run_eval', model=model, base='random', n=5, size=16, batch_size=2, out_dir=str(pictures/'eval'), **options)
    kept = json.loads((pictures/'eval'/'eval.json').read_text())
    assert kept['metrics'].keys() == {'base', 'temperature 0.85'} and all(('frechet' if model == 'vqgan_cin' else 'clip_b32') in m for m in kept['metrics'].values())
    if model != 'vqgan_cin':
        folder = pictures/'eval'/'base_geneval'
        assert [len(list((folder/f'{i:05d}'/'samples').glob('*.png'))) for i in range(3)] == [2, 2, 1] and json.loads((folder/'00001'/'metadata.jsonl').read_text())['prompt'] == 'a photo of 1 kites'
