"""Our HPSv2 score against the hpsv2 package's own path, on random weights; skipped where the package cannot be imported.

As a test it uses a tiny network in the shape of the package's ViT-H-14. `python tests/test_hpsv2.py [images]` compares and times the real
size on the CPU (about 7 GB of memory). The wheel of hpsv2 1.2.0 lacks the vocabulary file of its tokenizer; open_clip's is identical, so copy
open_clip/bpe_simple_vocab_16e6.txt.gz into hpsv2/src/open_clip/."""
import sys, tempfile, time, warnings
from pathlib import Path
from unittest.mock import patch

import numpy as np, pytest, torch
from PIL import Image

SIZES = [(256, 256), (384, 384), (200, 152), (150, 201)]
PROMPTS = ['a photo of a goldfish', 'an oil painting of a lighthouse at night']
TINY = dict(embed_dim=16, vision_cfg=dict(image_size=224, layers=2, width=64, head_width=32, patch_size=32), text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=2))


def package():
    "hpsv2.img_score, or None"
    try:
        from arpo_nb.weights import import_torchvision
        import_torchvision()
        import hpsv2.img_score
        return hpsv2.img_score
    except (ImportError, FileNotFoundError): return None


def compare(theirs, arch, n, seed=0):
    "Scores of both on `n` images with the same random weights, with the seconds each took: build, read, score"
    from hpsv2.src import open_clip as old
    from arpo_nb.scores.clip import CLIPScorer, build_clip, hps_preprocess
    torch.manual_seed(seed)
    ours = build_clip('hps_v2.1', 'random', arch)
    rng = np.random.default_rng(seed)
    pictures = [Image.fromarray(rng.integers(0, 256, (*(SIZES[i % len(SIZES)] if arch else (256, 256)), 3), dtype=np.uint8)) for i in range(n)]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(n)]
    with tempfile.TemporaryDirectory() as d, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.save({'state_dict': {k: v.half() for k, v in ours.state_dict().items()}}, file := Path(d)/'hps.pt') # half precision, as published
        del ours
        sizes = {'ViT-H-14': arch} if arch else {}
        with patch.dict(old.factory._MODEL_CONFIGS, sizes), patch.dict(theirs.model_dict, clear=True):
            model, _, preprocess = old.create_model_and_transforms('ViT-H-14', None, precision='amp', device='cpu', light_augmentation=True, aug_cfg={}, output_dict=True,
                                                                   with_score_predictor=False, with_region_predictor=False)
            theirs.model_dict.update(model=model, preprocess_val=preprocess)
            with patch.object(theirs, 'device', 'cpu'):
                t = time.perf_counter()
                theirs.score([], PROMPTS[0], cp=str(file)) # reads the weights, as every call does
                read = time.perf_counter() - t
                t = time.perf_counter()
                want = np.empty(n)
                for p in PROMPTS:
                    mine = [i for i in range(n) if prompts[i] == p]
                    want[mine] = theirs.score([pictures[i] for i in mine], p, cp=str(file))
                slow = time.perf_counter() - t - len(PROMPTS)*read
            theirs.model_dict.clear()
            del model
        scorer = CLIPScorer(build_clip('hps_v2.1', file, arch), hps_preprocess, chunk_size=8)
    tensors = [torch.from_numpy(np.array(p)).permute(2, 0, 1)[None]/255 for p in pictures]
    t = time.perf_counter()
    if arch: got = torch.cat([scorer.score(x, [p]) for x, p in zip(tensors, prompts)]) # sizes differ
    else: got = scorer.score(torch.cat(tensors), prompts)
    fast = time.perf_counter() - t
    return got.double().numpy(), want, dict(package_reads=read, package_scores=slow, ours_scores=fast)


def test_agrees_with_the_package():
    theirs = package()
    if theirs is None: pytest.skip('hpsv2 is not installed, or its wheel lacks the vocabulary file')
    got, want, _ = compare(theirs, TINY, 8)
    assert np.ptp(want) > 1e-3 and np.abs(got - want).max() < 1e-6


if __name__ == '__main__':
    n = int((sys.argv + [16])[1])
    got, want, seconds = compare(package(), None, n)
    print(f'{n} images of 256 px, ViT-H-14, float32, CPU, {torch.get_num_threads()} threads')
    print(f'largest difference {np.abs(got - want).max():.2e}, scores {want.min():.4f} to {want.max():.4f}')
    print({k: round(v, 2) for k, v in seconds.items()}, f'ratio {seconds["package_scores"]/seconds["ours_scores"]:.2f} without reading weights')
