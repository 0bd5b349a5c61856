"""Whatever happens to a file, its loader reads it or says what is wrong with it: the file's name, a kind of error of ours, in bounded time.
And where the format holds sums or counts (SEALED), what is read is what was written, or something is said.

`ARPO_MUTATIONS=500 pytest tests/test_mutations.py` tries 500 mutations of each loader's file; they are the same every time, others with ARPO_SEED=N."""
import io
import json
import os
import resource
import struct
import tarfile
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings, strategies as st
from PIL import Image
from safetensors.torch import save_file

from arpo_nb.data.captions import DiskFeatures, TextImages, read_prompts
from arpo_nb.data.image_io import open_picture
from arpo_nb.evaluation.geneval import read_folder, read_prompts as read_geneval
from arpo_nb.evaluation.metrics import image_chunks, load_reference
from arpo_nb.evaluation.sample_writer import settle
from arpo_nb.models.checkpoints import read_state_dict
from arpo_nb.models.toy import read_idx
from arpo_nb.scores.reward_factory import PCA

COUNT, SEED = int(os.environ.get('ARPO_MUTATIONS', 20)), os.environ.get('ARPO_SEED')
OURS = ValueError, OSError, KeyError # of which BadFile and Refused are the first
PROMPT = dict(prompt='a cat', tag='single_object', include=[{'class': 'cat', 'count': 1}])


def saved(write):
    f = io.BytesIO(); write(f)
    return f.getvalue()


def picture(kind): return saved(lambda f: Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(f, kind))


def shard():
    def write(f):
        with tarfile.open(fileobj=f, mode='w') as tar:
            for name, data in {'a.png': picture('PNG'), 'a.txt': b'a cat', 'b.png': picture('PNG'), 'b.json': b'{"caption": "a dog"}'}.items():
                info = tarfile.TarInfo(name); info.size = len(data); tar.addfile(info, io.BytesIO(data))
    return saved(write)


def table():
    import pyarrow as pa, pyarrow.parquet as pq
    return saved(lambda f: pq.write_table(pa.table(dict(image=[picture('PNG')]*3, text=['a', 'b', 'c'])), f))


def tensors(): return dict(weight=torch.ones(4, 4), bias=torch.zeros(4))


def safetensors(d):
    with tempfile.TemporaryDirectory() as t:
        save_file(d, Path(t)/'x')
        return (Path(t)/'x').read_bytes()


def stream(path): return list(TextImages(path, 8))
def whole(path): return list(image_chunks(path, 4))


MOMENTS = dict(mu=np.zeros(3), sigma=np.eye(3), features=np.ones((4, 3), np.float32), network='x', source='y', n=4)
LOADERS = dict( # name of the file, its bytes, and what reads it
    png=('a.png', picture('PNG'), open_picture), jpeg=('a.jpg', picture('JPEG'), open_picture), webp=('a.webp', picture('WEBP'), open_picture), bmp=('a.bmp', picture('BMP'), open_picture),
    tar=('a.tar', shard(), stream), parquet=('a.parquet', table(), stream),
    lines=('a.txt', 'a cat\nMöwe\n'.encode(), read_prompts), jsonl=('a.jsonl', b'{"text": "a cat"}\n"a dog"\n', read_prompts),
    json=('a.json', b'[{"text": "a cat"}, "a dog"]', read_prompts), csv=('a.csv', b'n,text\n1,"a, b"\n2,c\n', read_prompts),
    geneval=('a.jsonl', json.dumps(PROMPT).encode(), read_geneval), geneval_folder=('00000/metadata.jsonl', json.dumps(PROMPT).encode(), lambda p: list(read_folder(p.parent.parent))),
    features=('a.npz', saved(lambda f: np.savez(f, k=np.ones((3, 4)))), lambda p: DiskFeatures(p).rows('k')),
    reference=('a.npz', saved(lambda f: np.savez(f, **MOMENTS)), load_reference), images=('a.npz', saved(lambda f: np.savez(f, np.zeros((5, 4, 4, 3), np.uint8))), whole),
    pca=('a.safetensors', safetensors(dict(mean=torch.zeros(3), basis=torch.eye(3)[:, :2].contiguous(), variances=torch.ones(2), of=torch.ones(2))), PCA.load),
    torch_zip=('a.pt', saved(lambda f: torch.save(tensors(), f)), read_state_dict), torch_old=('a.pt', saved(lambda f: torch.save(tensors(), f, _use_new_zipfile_serialization=False)), read_state_dict),
    safetensors=('a.safetensors', safetensors(tensors()), read_state_dict), index=('a.index.json', b'{"weight_map": {"weight": "b.safetensors", "bias": "b.safetensors"}}', read_state_dict),
    idx=('a-idx3', b'\0\0\x08\x02' + struct.pack('>II', 3, 4) + bytes(12), read_idx), settings=('samples.json', b'{"n": 4}', lambda p: settle(p.parent, dict(n=4))))

SEALED = {'png', 'parquet', 'features', 'reference', 'images', 'torch_zip', 'index', 'settings'}
COUNTED = {'tar'} # what holds no sum of its members' bytes still tells how many there are
MEMORY = 1 << 31 # bytes that reading any of these may take on top of what is there


@pytest.fixture(autouse=True)
def little_memory():
    "A loader that believes a header of terabytes gets a MemoryError, which is none of ours"
    now = int(Path('/proc/self/statm').read_text().split()[0])*os.sysconf('SC_PAGE_SIZE')
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_the_limit_holds():
    with pytest.raises(MemoryError): np.ones(MEMORY)


NONSENSE = [b'', b'\0', b'\xff'*8, b'null', b'-1', b'1e999', b'NaN', b'[]', b'{}', b'"', b'[[[['*50, b'\xed\xa0\x80', b'\r\n', b'99999999999999999999', b'../', b'/dev/zero', '\u2028'.encode(), b'\x7f\xff\xff\xff']
where = st.floats(0, 1, exclude_max=True)
change = st.one_of(st.tuples(st.just('flip'), where, st.integers(1, 255)), st.tuples(st.just('cut'), where, st.just(0)), st.tuples(st.just('insert'), where, st.sampled_from(NONSENSE)),
                   st.tuples(st.just('replace'), where, st.sampled_from(NONSENSE)), st.tuples(st.just('drop'), where, st.integers(1, 40)), st.tuples(st.just('double'), where, st.integers(1, 40)))


def mutate(raw, changes):
    for kind, at, what in changes:
        i = int(at*len(raw))
        if kind == 'flip' and raw: raw = raw[:i] + bytes([raw[i] ^ what]) + raw[i+1:]
        elif kind == 'cut': raw = raw[:i]
        elif kind == 'insert': raw = raw[:i] + what + raw[i:]
        elif kind == 'replace': raw = raw[:i] + what + raw[i+len(what):]
        elif kind == 'drop': raw = raw[:i] + raw[i+what:]
        elif kind == 'double': raw = raw[:i+what] + raw[i:]
    return raw


def plain(x):
    "What was read as something that compares by value; a reference's own sum of its file aside"
    if isinstance(x, dict): return {k: plain(v) for k, v in x.items() if k != 'sha256'}
    if isinstance(x, (list, tuple)): return [plain(v) for v in x]
    if isinstance(x, Image.Image): return x.size, x.tobytes()
    if isinstance(x, (torch.Tensor, np.ndarray)): return str(x.dtype), tuple(x.shape), np.asarray(x).tobytes()
    return plain(vars(x)) if hasattr(x, '__dict__') else x


def test_what_is_compared():
    a = [dict(image=torch.ones(2), key='0')]
    assert plain(a) == plain([dict(image=torch.ones(2), key='0')]) != plain([dict(image=torch.ones(1, 2), key='0')])
    assert plain(picture_of(1)) != plain(picture_of(2)) and plain(picture_of(1)) == plain(picture_of(1))


def picture_of(value): return Image.fromarray(np.full((2, 2, 3), value, np.uint8))


@pytest.mark.parametrize('name', LOADERS)
def test_read_or_refused_by_name(name, tmp_path):
    file, good, load = LOADERS[name]
    path = tmp_path/file
    path.parent.mkdir(parents=True, exist_ok=True)
    if name == 'index': save_file(tensors(), tmp_path/'b.safetensors')
    if name == 'geneval_folder': (path.parent/'samples').mkdir(); Image.new('RGB', (4, 4)).save(path.parent/'samples'/'00000.png')
    path.write_bytes(good)
    first = plain(load(path)) # the file itself is read

    @(seed(int(SEED)) if SEED else lambda f: f)
    @settings(max_examples=COUNT, derandomize=not SEED, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(change, min_size=1, max_size=3))
    def check(changes):
        path.write_bytes(mutate(good, changes))
        start = time.process_time()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            try: got = plain(load(path))
            except OURS as e: assert path.name in str(e) or str(path.parent) in str(e), f'unnamed: {type(e).__name__}: {e}'
            else:
                said = [w for w in said if path.name in str(w.message) or str(w.message).startswith('data: skipped')]
                assert got == first or said or name not in SEALED, 'silent'
                assert name not in COUNTED or said or len(got) == len(first), 'silent'
        assert time.process_time() - start < 5
    check()
