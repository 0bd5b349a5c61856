"Captioned pictures through the trainer: a text-conditional policy, features stored with the pictures, broken records, resuming"
import json
import os
from dataclasses import replace

import numpy as np
import doors # its server has torch already
import pytest
import torch
from PIL import Image

from arpo_nb.config import Config
from arpo_nb.training.processes import free_port
from arpo_nb.models.llamagen import GPT, GPTConfig
from arpo_nb.systems import load_data
from arpo_nb.protocols import System
from arpo_nb.data.captions import DiskFeatures, TextData
from arpo_nb.models.tokenizers import VQConfig, VQModel
from arpo_nb.training.trainer import train


def tiny():
    torch.manual_seed(0)
    policy = GPT(GPTConfig(dim=32, n_layer=1, n_head=2, vocab_size=16, block_size=16, multiple_of=32, cond='text', cond_len=120, caption_dim=8))
    vq = VQModel(VQConfig(ch=8, encoder_ch_mult=(1, 2), decoder_ch_mult=(1, 2), num_res_blocks=1, z_channels=8, codebook_size=16, codebook_embed_dim=4, num_groups=4, image_size=8, usage_window=16))
    return System('llamagen_t2i_tiny', policy, vq)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    d = tmp_path/'captioned'; d.mkdir()
    for i in range(10):
        Image.fromarray(rng.integers(256, size=(9, 11, 3), dtype=np.uint8)).save(d/f'{i}.png')
        (d/f'{i}.txt').write_text(f'picture {i}')
        np.save(d/f'{i}.npy', rng.normal(size=(3 + i if i < 9 else 130, 8)).astype(np.float32)) # the last is longer than 120 rows
    (d/'4.png').write_bytes(b'not a picture')
    return d


def test_resumed_on_captions_is_the_same(folder, tmp_path):
    cfg = Config(model='llamagen_t2i_tiny', data=str(folder), text_features=str(folder), steps=6, batch_size=4, num_generations=2, learning_rate=1e-2, save_steps=1, perceptual_coef=0., noise_rate=.5)
    whole = tiny()
    rows = train(whole, load_data(cfg, whole), cfg, tmp_path/'whole', progress=False)
    class Stop(Exception): pass
    parts, data = tiny(), load_data(cfg, tiny())
    batches = data.batches
    def few(*args, **kwargs):
        for i, b in enumerate(batches(*args, **kwargs)):
            if i == 3: raise Stop
            yield b
    data.batches = few
    with pytest.raises(Stop): train(parts, data, cfg, tmp_path/'parts', progress=False)
    again = tiny()
    rows2 = train(again, load_data(cfg, again), cfg, tmp_path/'parts', progress=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.policy.parameters(), again.policy.parameters()))
    assert [r['policy/prior_ce'] for r in rows] == [r['policy/prior_ce'] for r in rows2]
    assert [r['data/skipped'] for r in rows] == [0, 1, 1, 2, 2, 3] and [r['data/truncated'] for r in rows] == [0, 0, 1, 1, 2, 2] # nine good records an epoch


def test_the_first_loss_is_named(folder, tmp_path):
    cfg = Config(model='llamagen_t2i_tiny', data=str(folder), text_features=str(folder), steps=3, batch_size=4, num_generations=2, perceptual_coef=0.)
    with pytest.warns(UserWarning) as found: train(tiny(), load_data(cfg, tiny()), cfg, tmp_path/'out', progress=False)
    said = [str(w.message) for w in found]
    assert sum("skipped record '4': UnidentifiedImageError" in s for s in said) == 1
    assert sum("features of key='9': 130 tokens, cut to 120" in s for s in said) == 1


def test_data_errors_come_first(folder, tmp_path):
    system = tiny()
    with pytest.raises(ValueError, match='captioned pictures'): load_data(Config(model='llamagen_t2i_tiny'), system)
    with pytest.raises(FileNotFoundError, match='no such file'): load_data(Config(model='llamagen_t2i_tiny', data=str(tmp_path/'nowhere')), system)
    with pytest.raises(ValueError, match='no features'): load_data(Config(model='llamagen_t2i_tiny', data=str(folder), text_features='stored'), system)


def _worker(rank, cfg, out, port):
    os.environ.update(WORLD_SIZE='2', RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    train(tiny(), load_data(cfg, tiny()), cfg, out, progress=False)


def two_of(args): torch.multiprocessing.start_processes(_worker, args, nprocs=2, start_method='forkserver')


def test_two_processes_see_the_captions_of_one(folder, tmp_path):
    (folder/'4.png').unlink() # a broken record is skipped by one of them, and from there on their order differs from one's
    cfg = Config(model='llamagen_t2i_tiny', data=str(folder), text_features=str(folder), steps=4, batch_size=4, num_generations=2, learning_rate=1e-2, save_steps=3, perceptual_coef=0., noise_rate=.5)
    one = train(tiny(), load_data(cfg, tiny()), cfg, tmp_path/'one', progress=False)
    two_of((replace(cfg, num_processes=2), tmp_path/'two', free_port()))
    two = [json.loads(line) for line in (tmp_path/'two'/'metrics.jsonl').read_text().splitlines()]
    for a, b in zip(one, two, strict=True):
        for k in ('reward/mean', 'policy/prior_ce', 'policy/entropy', 'optim/grad_norm'): assert a[k] == pytest.approx(b[k], rel=1e-3), k
        assert (a['data/skipped'], a['data/truncated']) == (b['data/skipped'], b['data/truncated'])
    assert two[-1]['data/truncated'] == 1


def test_skips_of_all_processes_are_summed(folder, tmp_path):
    for i in (0, 1): (folder/f'{i}.png').write_bytes(b'not a picture') # one for each process
    cfg = Config(model='llamagen_t2i_tiny', data=str(folder), text_features=str(folder), steps=1, batch_size=4, num_generations=2, num_processes=2, perceptual_coef=0.)
    two_of((cfg, tmp_path/'two', free_port()))
    row, = map(json.loads, (tmp_path/'two'/'metrics.jsonl').read_text().splitlines())
    assert row['data/skipped'] == 3 and row['data/truncated'] == 0 # the first of each, and the broken 4.png of the fixture


@pytest.mark.parametrize('rank', [0, 1])
def test_each_process_resumes_in_a_later_epoch(folder, rank):
    (folder/'4.png').unlink() # nine records: an epoch ends in the middle of a step
    stream = lambda *steps, **at: list(TextData(folder, 8, DiskFeatures(folder)).batches(4, 0, *steps, rank, 2, **at))
    whole = stream(0, 8)
    again = stream(6, 8, position=int(whole[5].streams.index[-1, 0]) + 1)
    assert [b.prompts for b in again] == [b.prompts for b in whole[6:]] and whole[6].streams.index[0, 0] >> 40 == 2
