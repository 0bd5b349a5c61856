"Captioned pictures through the trainer: a text-conditional policy, features stored with the pictures, broken records, resuming"
import numpy as np
import pytest
import torch
from PIL import Image

from arpo_nb.config import Config
from arpo_nb.llamagen import GPT, GPTConfig
from arpo_nb.models import load_data
from arpo_nb.protocols import System
from arpo_nb.tokenizers import VQConfig, VQModel
from arpo_nb.trainer import train


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
        np.save(d/f'{i}.npy', rng.normal(size=(3 + i, 8)).astype(np.float32))
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


def test_data_errors_come_first(folder, tmp_path):
    system = tiny()
    with pytest.raises(ValueError, match='captioned pictures'): load_data(Config(model='llamagen_t2i_tiny'), system)
    with pytest.raises(FileNotFoundError, match='no such file'): load_data(Config(model='llamagen_t2i_tiny', data=str(tmp_path/'nowhere')), system)
    with pytest.raises(ValueError, match='no features'): load_data(Config(model='llamagen_t2i_tiny', data=str(folder), text_features='stored'), system)
