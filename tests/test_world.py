"Files as they are in the world: links, devices, bombs, other people's pictures and texts, renamed and broken weights"
import errno
import io
import json
import os
import struct
import subprocess
import sys
import time
import warnings
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import save_file

from arpo_nb.data.captions import DiskFeatures, T5Features, TextImages, read_prompts
from arpo_nb.data.image_io import center_crop, open_picture, resize_crop, to_tensor
from arpo_nb.data.images import _label_ids, class_ids, folder_data, read_image
from arpo_nb.evaluation.geneval import arrange_geneval, read_prompts as read_geneval
from arpo_nb.evaluation.metrics import folder_reference, image_files, load_reference, read_picture, set_format
from arpo_nb.evaluation.sample_writer import settle, write_npz
from arpo_nb.files import BadFile, home_cache, inside, read_lines, read_npz, user_path
from arpo_nb.models.checkpoints import Refused, load_weights, read_state_dict
from arpo_nb.models.toy import read_idx
from arpo_nb.scores.clip import load_clip
from arpo_nb.scores.reward_factory import PCA


def picture(path, size=(9, 9), mode='RGB', color='red', **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **kw)
    return path


def said(f):
    "What is returned, and the warnings on the way"
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        out = f()
    return out, ' | '.join(str(x.message) for x in w)


# folders

def test_links_are_followed_and_counted(tmp_path):
    for c in range(10): picture(tmp_path/'elsewhere'/str(c)/f'{c}.png')
    root = tmp_path/'data'; root.mkdir()
    for c in range(1, 10): (root/str(c)).symlink_to(tmp_path/'elsewhere'/str(c))
    picture(root/'0'/'0.png'); (root/'0'/'linked.png').symlink_to(tmp_path/'elsewhere'/'1'/'1.png'); (root/'0'/'up').symlink_to(root)
    data, text = said(lambda: folder_data(root, 8, 10))
    assert data.labels.tolist() == [0, 0, *range(1, 10)] and 'read already' in text
    assert len(image_files(root)) == 11
    captions = tmp_path/'captions'; captions.symlink_to(tmp_path/'elsewhere')
    assert len(list(TextImages(captions, 8).sources)) == 1 and len(image_files(captions)) == 10


def test_hidden_folders_shift_nothing_and_holes_are_said(tmp_path):
    for name in '.ipynb_checkpoints', '__MACOSX', '0', '1', '2': (tmp_path/name).mkdir()
    picture(tmp_path/'0'/'a.png'); (tmp_path/'0'/'._a.png').write_bytes(b'x'); picture(tmp_path/'1'/'.ipynb_checkpoints'/'a-checkpoint.png'); picture(tmp_path/'stray.png')
    (tmp_path/'1'/'scan.tif').touch()
    assert class_ids(tmp_path, 3) == {'0': 0, '1': 1, '2': 2}
    data, text = said(lambda: folder_data(tmp_path, 8, 3))
    assert data.labels.tolist() == [0] and '2 of 3 class folders' in text and '1 .tif' in text and '2 (empty)' in text and '1 pictures lie beside' in text


def test_names_beside_numbers_shift_no_ids(tmp_path):
    for name in '0', '10', '2': picture(tmp_path/name/'a.png')
    (tmp_path/'lost+found').mkdir(); (tmp_path/'11').symlink_to(tmp_path/'nowhere'); picture(tmp_path/'2'/'b.jfif', format='JPEG'); picture(tmp_path/'0'/'bare', format='PNG')
    data, text = said(lambda: folder_data(tmp_path, 8, 12))
    assert data.labels.tolist() == [0, 10, 2, 2] and '1 links lead nowhere' in text and 'without an ending' in text
    (tmp_path/'extra').mkdir()
    with pytest.raises(ValueError, match='class folders extra; beside numbers'): class_ids(tmp_path, 4)


# pictures

def test_grey_of_16_bits_is_scaled(tmp_path):
    Image.fromarray(np.array([[0, 257, 32896, 65535]]*4, np.uint16)).save(tmp_path/'a.png')
    assert (255*read_image(tmp_path/'a.png', 4))[0, 0].round().tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize('turn', range(1, 9))
def test_every_reader_turns_as_the_camera_noted(tmp_path, turn):
    x = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    exif = Image.Exif(); exif[0x0112] = turn
    Image.fromarray(x).save(tmp_path/'a.png', exif=exif)
    from PIL import ImageOps
    want = np.array(ImageOps.exif_transpose(Image.open(tmp_path/'a.png')))
    assert np.array_equal(np.array(open_picture(tmp_path/'a.png')), want) and np.array_equal(read_picture(tmp_path/'a.png'), want)
    assert np.array_equal((255*read_image(tmp_path/'a.png', 8)).round().permute(1, 2, 0).numpy(), want)
    (tmp_path/'a.txt').write_text('x')
    record, = TextImages(tmp_path, 8)
    assert np.array_equal((255*record['image']).round().permute(1, 2, 0).numpy(), want)


def test_transparency_is_white_everywhere(tmp_path):
    path = picture(tmp_path/'a.png', mode='RGBA', color=(0, 0, 0, 0)); (tmp_path/'a.txt').write_text('x')
    record, = TextImages(tmp_path, 8)
    assert read_image(path, 8).min() == 1 and record['image'].min() == 1 and read_picture(path, 8).min() == 255
    with pytest.raises(ValueError, match='RGBA'): read_picture(path)


def test_a_strip_is_cropped_before_it_is_resized(tmp_path):
    picture(tmp_path/'a.png', (1, 65000))
    for crop in 'adm', 'bicubic': assert read_image(tmp_path/'a.png', 256, crop=crop).shape == (3, 256, 256)
    strip = Image.fromarray(np.random.default_rng(0).integers(0, 256, (7, 400, 3), dtype=np.uint8))
    for f, w in (center_crop, round(400*16/7)), (resize_crop, int(16*400/7)):
        left = (w - 16)//2 if f is center_crop else round((w - 16)/2)
        plain = strip.resize((w, 16), Image.Resampling.BICUBIC).crop((left, 0, left + 16, 16))
        assert np.abs(np.array(f(strip, 16), int) - np.array(plain, int)).max() <= 1


def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


@pytest.mark.parametrize('size', [(60000, 60000), (2, 2**30), (2, 60_000_000)])
def test_a_header_that_promises_too_much(tmp_path, size):
    (tmp_path/'a.png').write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', *size, 8, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b''))
    start = time.time()
    with pytest.raises(BadFile, match='a.png'): open_picture(tmp_path/'a.png')
    assert time.time() - start < 2


def test_no_outside_program_is_started(tmp_path):
    Image.new('RGB', (9, 9)).save(tmp_path/'x.png', 'EPS')
    for read in open_picture, read_picture, lambda p: read_image(p, 8):
        with pytest.raises(ValueError, match='no picture in PNG, JPEG, WEBP, BMP'): read(tmp_path/'x.png')


def test_mixed_formats_are_warned_of(tmp_path):
    picture(tmp_path/'a.png'); picture(tmp_path/'b.png', format='JPEG')
    formats, text = said(lambda: set_format(image_files(tmp_path)))
    assert formats == 'JPEG and PNG' and '1 JPEG and 1 PNG pictures in one set' in text


# what data names

@pytest.mark.parametrize('name', ['/etc/hostname', '../secret.png', '/dev/zero', 'pipe', 'C:\\x.png'])
def test_metadata_leads_nowhere_else(tmp_path, name):
    (tmp_path/'d').mkdir(); picture(tmp_path/'secret.png'); os.mkfifo(tmp_path/'d'/'pipe'); picture(tmp_path/'d'/'sub'/'good.png')
    lines = [dict(file_name=name, text='bad'), dict(file_name='sub\\good.png', text='good')]
    (tmp_path/'d'/'metadata.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    got, text = said(lambda: [r['text'] for r in TextImages(tmp_path/'d', 8)])
    assert got == ['good'] and 'metadata.jsonl, line 1' in text


def test_archives_do_not_unfold_without_end(tmp_path):
    import gzip
    (tmp_path/'x').write_bytes(gzip.compress(b'\0\0\x08\x03' + struct.pack('>III', 60000, 28, 28*100) + bytes(10**8)))
    with pytest.raises(BadFile, match='over 200 times'): read_idx(tmp_path/'x')
    np.savez_compressed(tmp_path/'x.npz', a=np.zeros(20_000_000))
    with pytest.raises(BadFile, match='array a'): read_npz(tmp_path/'x.npz')


def test_npz_headers_are_compared_with_their_bytes(tmp_path):
    import zipfile
    with zipfile.ZipFile(tmp_path/'r.npz', 'w') as z:
        for name, shape in dict(mu=(2**40,), sigma=(2**40, 2**40)).items():
            f = io.BytesIO(); np.lib.format.write_array_header_1_0(f, dict(descr='<f8', fortran_order=False, shape=shape)); z.writestr(f'{name}.npy', f.getvalue())
    with pytest.raises(BadFile, match='promises an array'): load_reference(tmp_path/'r.npz')


@pytest.mark.parametrize('sigma', [np.diag([1., -1]), np.diag([1., np.inf]), np.array([[1., 2], [2, 1]])])
def test_impossible_references_are_refused(tmp_path, sigma):
    np.savez(tmp_path/'r.npz', mu=np.zeros(2), sigma=sigma)
    with pytest.raises(BadFile, match='r.npz'): load_reference(tmp_path/'r.npz')


# text

TEXT = 'eine Möwe\u2028am Meer\nzwei'
@pytest.mark.parametrize('coding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-32'])
@pytest.mark.parametrize('end', ['\n', '\r\n', '\r'])
def test_texts_of_other_machines(tmp_path, coding, end):
    (tmp_path/'p.txt').write_bytes(TEXT.replace('\n', end).encode(coding))
    assert read_prompts(tmp_path/'p.txt') == TEXT.split('\n')
    (tmp_path/'p.jsonl').write_bytes(end.join(json.dumps(dict(Prompt=t), ensure_ascii=False) for t in TEXT.split('\n')).encode(coding))
    assert read_prompts(tmp_path/'p.jsonl') == TEXT.split('\n')


def test_latin_1_is_refused_with_its_line(tmp_path):
    (tmp_path/'p.txt').write_bytes('ok\nMöwe'.encode('latin-1'))
    with pytest.raises(BadFile, match='p.txt, line 2: not UTF-8'): read_prompts(tmp_path/'p.txt')


def test_sidecars_and_tables(tmp_path):
    for name in 'a.PNG', 'b.png', 'c.png': picture(tmp_path/'side'/name, format='PNG')
    (tmp_path/'side'/'a.TXT').write_text('one\ntwo'); (tmp_path/'side'/'b.caption').write_bytes('\ufeffthree'.encode('utf-8')); (tmp_path/'side'/'c.json').write_text('{"Caption": "four"}')
    assert [r['text'] for r in TextImages(tmp_path/'side', 8, captions='first')] == ['one', 'three', 'four']
    assert [r['text'] for r in TextImages(tmp_path/'side', 8, captions='turn', start=1 << 40, endless=False)][0] == 'two'
    picture(tmp_path/'t'/'sub'/'a.png'); (tmp_path/'t'/'metadata.csv').write_text('\ufefffile_name,text\r\nsub\\a.png,"a, b"\r\n', encoding='utf-8')
    assert [r['text'] for r in TextImages(tmp_path/'t', 8)] == ['a, b']


def test_what_a_list_leaves_out_is_said(tmp_path):
    for name in 'a.png', 'b.png': picture(tmp_path/name)
    (tmp_path/'metadata.jsonl').write_text('{"file_name": "a.png", "text": "x"}\n{"file_name": "a.png", "text": "y"}'); (tmp_path/'metadata.csv').touch()
    got, text = said(lambda: [r['text'] for r in TextImages(tmp_path, 8)])
    assert got == ['x', 'y'] and '1 of 2 pictures are not in it' in text and 'metadata.csv beside it is not' in text


def test_content_decides_what_a_text_is(tmp_path):
    for ending in 'txt', 'json', 'jsonl':
        (tmp_path/f'a.{ending}').write_text('{"text": "a"}\n{"text": "b"}\n')
        assert read_prompts(tmp_path/f'a.{ending}') == ['a', 'b']


def test_a_bad_caption_in_a_shard_is_named(tmp_path):
    import tarfile
    png = picture(tmp_path/'a.png').read_bytes()
    with tarfile.open(tmp_path/'x.tar', 'w') as tar:
        for name, data in {'a.png': png, 'a.txt': b'M\xf6we', '../b.png': png, '../b.txt': b'up'}.items():
            info = tarfile.TarInfo(name); info.size = len(data); tar.addfile(info, io.BytesIO(data))
    got, text = said(lambda: [r['text'] for r in TextImages(tmp_path/'x.tar', 8)])
    assert got == ['up'] and 'x.tar, a, line 1: not UTF-8' in text


def test_emptied_prompts_are_counted():
    class Words:
        def __call__(self, texts, **kw): return dict(input_ids=torch.ones(len(texts), 2, dtype=int), attention_mask=torch.ones(len(texts), 2, dtype=int))
    class Net(torch.nn.Module):
        def forward(self, input_ids, attention_mask): return dict(last_hidden_state=torch.ones(*input_ids.shape, 3))
    encode = T5Features(Net(), Words(), length=2)
    _, text = said(lambda: encode(['IMG_20230101.jpg', 'a cat']))
    assert encode.emptied == 1 and 'leaves nothing' in text


def test_labels_that_are_names():
    assert _label_ids(['n02123045', 'n01440764'], 1000, 'x').tolist() == [281, 0] and said(lambda: _label_ids(['dog', 'cat'], 10, 'x'))[0].tolist() == [1, 0]
    with pytest.raises(ValueError, match='column y'): _label_ids(['cat', None], 10, 'column y')


# weights

def net(): return torch.nn.Linear(2, 2)


def test_content_decides_not_the_ending(tmp_path):
    m = net()
    save_file(m.state_dict(), tmp_path/'a.pt'); torch.save(m.state_dict(), tmp_path/'b.safetensors')
    for p in tmp_path.iterdir(): assert torch.equal(load_weights(net(), p).weight, m.weight)


@pytest.mark.parametrize('bad', ['nan', 'inf', 'huge', 'int', 'bool', 'complex', 'meta', 'expanded', 'nothing'])
def test_impossible_weights_are_refused_by_name(tmp_path, bad):
    w = torch.ones(2, 2)
    w = dict(meta=w.to('meta'), expanded=torch.zeros(1).expand(10**12), nothing=w*-torch.inf, nan=w*torch.nan, inf=w*torch.inf, huge=w*1e30, int=w.int(), bool=w.bool(), complex=w.cfloat())[bad]
    torch.save(dict(weight=w, bias=torch.zeros(2)), tmp_path/'a.pt')
    with pytest.raises(ValueError, match='weight'): load_weights(net(), tmp_path/'a.pt')


def test_averaged_weights_by_option(tmp_path):
    a, b = net(), net()
    torch.save(dict(ema=a.state_dict()), tmp_path/'a.pt'); torch.save(dict(model=b.state_dict(), ema=a.state_dict()), tmp_path/'b.pt')
    torch.save(dict(trainer=dict(var_wo_ddp=b.state_dict(), vae_local=dict(x=torch.ones(1)))), tmp_path/'var.pth')
    with pytest.raises(ValueError, match='a.pt#ema'): load_weights(net(), tmp_path/'a.pt')
    got, text = said(lambda: load_weights(net(), tmp_path/'b.pt'))
    assert torch.equal(got.weight, b.weight) and 'b.pt#ema' in text and torch.equal(load_weights(net(), f'{tmp_path}/b.pt#ema').weight, a.weight)
    assert torch.equal(load_weights(net(), tmp_path/'var.pth').weight, b.weight)


def test_content_decides_what_a_reference_is(tmp_path):
    from arpo_nb.maths.moments import as_reference
    np.savez(tmp_path/'a.npz', mu=np.zeros(2), sigma=np.eye(2)); os.rename(tmp_path/'a.npz', tmp_path/'a.pt')
    torch.save(dict(mu=torch.zeros(2), sigma=torch.eye(2)), tmp_path/'b.npz')
    for name in 'a.pt', 'b.npz': assert as_reference(tmp_path/name).mean.shape == (2,)
    np.save(tmp_path/'c.npy', np.full((3, 2), np.nan))
    with pytest.raises(BadFile, match='c.npy'): as_reference(tmp_path/'c.npy')


class Runs(torch.nn.Module):
    def forward(self, x:torch.Tensor): return x


def test_code_is_refused_as_code(tmp_path):
    import pickle
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'executed'),)
    torch.save(dict(a=Evil()), tmp_path/'zip.pt'); (tmp_path/'old.pt').write_bytes(pickle.dumps(dict(a=Evil()), 4))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore'); torch.jit.script(Runs()).save(tmp_path/'jit.pt')
    for name in 'zip.pt', 'old.pt', 'jit.pt':
        with pytest.raises(ValueError, match='could run code'): read_state_dict(tmp_path/name)
    with pytest.raises(BadFile, match='not one of OpenAI'): load_clip(net(), tmp_path/'jit.pt')
    assert not (tmp_path/'executed').exists()


@pytest.mark.parametrize('index', ['[]', '{}', '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"weight": "../b.safetensors"}}', '{"weight_map": {"other": "b.safetensors"}}', '{"weight_map": {"weight": "/etc/passwd"}}', '{"weight_map": {"weight": "' + 'x'*5000 + '"}}', '\ud800'])
def test_nonsense_in_an_index(tmp_path, index):
    save_file(net().state_dict(), tmp_path/'b.safetensors')
    (tmp_path/'m.index.json').write_text(index, encoding='utf-8', errors='surrogatepass')
    with pytest.raises((ValueError, OSError), match='m.index.json'): read_state_dict(tmp_path/'m.index.json')


# other people's files

def test_nothing_foreign_is_removed(tmp_path):
    mine = tmp_path/'mine'; mine.mkdir(); (mine/'diary.txt').write_text('x'); picture(mine/'000000.png')
    prompts = [dict(prompt='a cat', tag='single_object', include=[{'class': 'cat', 'count': 1}])]
    samples = tmp_path/'samples'; picture(samples/'000000.png')
    with pytest.raises(FileExistsError): arrange_geneval(prompts, samples, mine, 1)
    with pytest.raises(FileExistsError): settle(mine, dict(n=1))
    for _ in range(2): arrange_geneval(prompts, samples, tmp_path/'ours', 1)
    (tmp_path/'ours'/'note.txt').write_text('x'); arrange_geneval(prompts, samples, tmp_path/'ours', 1)
    assert (tmp_path/'ours'/'note.txt').exists() and sorted(p.name for p in mine.iterdir()) == ['000000.png', 'diary.txt']
    np.savez(tmp_path/'theirs.npz', a=np.ones(1)); before = (tmp_path/'theirs.npz').read_bytes()
    with pytest.raises(FileExistsError): write_npz(samples, tmp_path/'theirs.npz', 1)
    with pytest.raises(FileExistsError): folder_reference(samples, tmp_path/'theirs.npz', None)
    with pytest.raises(FileExistsError): PCA(*[torch.ones(1)]*4).save(tmp_path/'theirs.npz')
    assert (tmp_path/'theirs.npz').read_bytes() == before
    assert write_npz(samples, n=1) == write_npz(samples, n=1)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    picture(tmp_path/'s'/'000000.png')
    def full(*a, **k): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr('arpo_nb.evaluation.sample_writer.npy_format.write_array_header_1_0', full)
    with pytest.raises(OSError, match='is full'): write_npz(tmp_path/'s', n=1)
    assert not list(tmp_path.glob('.*'))


# machines

def test_home_is_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    picture(tmp_path/'d'/'0'/'a.png'); (tmp_path/'p.txt').write_text('x'); torch.save(net().state_dict(), tmp_path/'w.pt')
    assert len(folder_data('~/d', 8, 1)) == 1 and read_prompts('~/p.txt') == ['x'] and read_state_dict('~/w.pt') and len(image_files('~/d')) == 1
    monkeypatch.setattr(os.path, 'expanduser', lambda p: p) # as where the user has no entry and HOME is not set
    with pytest.raises(ValueError, match='no home folder'): user_path('~/d')
    assert home_cache('x').is_absolute()


@pytest.mark.parametrize('seed', [2**32, 2**63 - 1])
def test_seeds_up_to_63_bits(tmp_path, seed):
    from arpo_nb.scores.maniqa import random_corners
    assert random_corners(300, 300, seed=seed) == random_corners(300, 300, seed=seed) != random_corners(300, 300, seed=seed - 1)
    from test_run_life import CFG, go
    from dataclasses import replace
    assert len(go(tmp_path, replace(CFG, steps=1, seed=seed, update_dropout=True))) == 1


def test_home_in_every_argument(tmp_path, monkeypatch):
    from arpo_nb.evaluation.geneval import official_command
    from arpo_nb.evaluation.sample_writer import image_path, missing_samples
    from arpo_nb.maths.moments import as_reference
    from arpo_nb.models.janus import text_tokenizer_file
    monkeypatch.setenv('HOME', str(tmp_path))
    picture(tmp_path/'s'/'000000.png'); (tmp_path/'tokenizer.json').write_text('{}'); np.savez(tmp_path/'r.npz', mu=np.zeros(2), sigma=np.eye(2))
    assert missing_samples('~/s', 2) == [1] and image_path('~/s', 0).exists() and text_tokenizer_file('~') == tmp_path/'tokenizer.json'
    assert as_reference('~/r.npz').mean.shape == (2,) and not any('~' in w for w in official_command('~/s', '~/o', '~/geneval', 'python', '~/models'))


def test_several_captions_by_option(tmp_path):
    from dataclasses import replace
    from arpo_nb.config import Config
    with pytest.raises(ValueError, match="captions='both': choose one of whole, first, turn"): Config(captions='both')
    picture(tmp_path/'a.png'); (tmp_path/'metadata.jsonl').write_text(json.dumps(dict(file_name='a.png', text=['one', 'two'])))
    from arpo_nb.systems import load_data
    from arpo_nb.protocols import System
    class Pixels: image_size = 8
    system = System('x', torch.nn.Linear(1, 1), Pixels(), encode_prompts=lambda texts: (torch.ones(len(texts), 1, 1), torch.ones(len(texts), 1)))
    cfg = Config(data=str(tmp_path), captions='first')
    batch = next(load_data(cfg, system).batches(1, 0, 0, 1))
    assert batch.prompts == ['one']
    with pytest.raises(ValueError, match='no usable record'): load_data(replace(cfg, captions='whole'), system)


def test_files_of_features_are_opened_as_files(tmp_path):
    from arpo_nb.maths.moments import read_file
    for kind in 'pt', 'safetensors':
        os.mkfifo(tmp_path/f'x.{kind}')
        with pytest.raises(ValueError, match='a FIFO'): read_file(tmp_path/f'x.{kind}')


def test_config_json_of_janus_is_read_as_a_file_of_the_world(tmp_path):
    from arpo_nb.models.janus import silently_wrong
    save_file(net().state_dict(), tmp_path/'model.safetensors')
    for bad in b'', b'[]', b'\xff':
        (tmp_path/'config.json').write_bytes(bad)
        with pytest.raises(BadFile, match='config.json'): silently_wrong(tmp_path)


def test_small_files_are_whole_or_not_there(tmp_path):
    from matplotlib.figure import Figure
    from arpo_nb.evaluation.plots import save_figure
    from arpo_nb.files import write_json
    write_json(tmp_path/'a.json', dict(a=1))
    with pytest.raises(TypeError): write_json(tmp_path/'a.json', dict(a=object()))
    assert json.loads((tmp_path/'a.json').read_text()) == dict(a=1)
    fig = Figure(figsize=(1, 1)); save_figure(fig, tmp_path/'a.png'); before = (tmp_path/'a.png').read_bytes()
    fig.savefig = lambda f, **kw: (f.write(b'half'), 1/0)
    with pytest.raises(ZeroDivisionError): save_figure(fig, tmp_path/'a.png')
    assert (tmp_path/'a.png').read_bytes() == before and len(list(tmp_path.iterdir())) == 2
    for page in (ROOT/'nbs').glob('run_*.ipynb'):
        for cell in json.loads(page.read_text())['cells']:
            code = ''.join(cell['source'])
            assert cell['cell_type'] != 'code' or not ('savefig(' in code or '.write_text(' in code), page.name


SPOKEN = """
import sys
from arpo_nb.training.launch import arpo
for words in (['train', '--help'], ['train', '--model', 'toy', '--dry-run'], ['models', 'toy'], ['weights', '--list']):
    try: arpo(words)
    except SystemExit as e: assert not e.code, (words, e.code)
"""


def test_the_command_lines_speak_ascii():
    env = {**os.environ, 'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONIOENCODING': 'ascii', 'PYTHONCOERCECLOCALE': '0', 'PYTHONPATH': str(ROOT)}
    done = subprocess.run([sys.executable, '-c', SPOKEN], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and 'clip_l14' in done.stdout, done.stderr[-500:]
