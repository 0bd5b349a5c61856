"Evaluation: every result of the golden cases is compared, memory stays within bounds, run_eval from end to end"
import copy
import json
import subprocess
import sys
from threading import get_ident

import numpy as np
import pytest
import torch
from conftest import ROOT
from golden_cases import Case, check, discover
from safetensors.torch import load_file, save_file
from doors import ENV, notebook, ok, papermill, refused

CASES = discover(ROOT/'tests'/'golden'/'evaluation')
BY_NAME = {c.data.get('name', c.kind): c for c in CASES}

def changed(case, path, change):
    "The case with one of its numbers changed"
    data = copy.deepcopy(case.data)
    at = data
    for k in path[:-1]: at = at[k]
    at[path[-1]] = change(at[path[-1]])
    return Case(case.id, case.kind, data, case.path, case.context)

def one_more(x): return [one_more(x[0]), *x[1:]] if isinstance(x, list) else (not x) if isinstance(x, bool) else (1.5 if x == 'nan' else x + (1 if isinstance(x, int) else max(.01, abs(x)/20)))

NUMBERS = [(name, (k,)) for name, keys in {
    'tiny_d2': ['trace_ref', 'mean_term', 'fid_symmetric_eigh_f64', 'fid_eigvals_of_product_f64', 'fid_nuclear_norm_f64', 'fid_adm_f64_features', 'fid_adm_f32_features'],
    'near_duplicate_d64': ['fid_symmetric_eigh_f64', 'fid_nuclear_norm_f64'], 'illcond_d64': ['fid_nuclear_norm_f64', 'fid_adm_f32_features'],
    'three_unequal_splits': ['is_adm_f32', 'is_f64_logsoftmax', 'per_split_f64', 'is_if_bias_were_added_f64'],
    'mild_d16': ['precision_f32', 'recall_f32', 'precision_adm_tf_cpu', 'recall_adm_tf_cpu'],
    'resize_64_to_299': ['sum', 'mean'], 'inception_img64': ['pool_norm', 'spatial_norm', 'logits_norm', 'pooled_768_norm', 'pool_first4']}.items() for k in keys]
NUMBERS += [('top5', ('expected', k)) for k in ('top1', 'top5', 'per_item_top5')] + [('quantise', ('expected', 'llamagen_127.5x_plus_128_truncated'))]
NUMBERS += [('geneval_logic', ('summary', 'expected', k)) for k in ('overall', 'image_accuracy')] + [('geneval_logic', ('iou', 1, 'iou'))]
NUMBERS += [('geneval_logic', (group, i, 'correct')) for group, i in (('cases', 0), ('cases', 8), ('overlap_suppression_cases', 0))]

@pytest.mark.parametrize('name, path', NUMBERS, ids=lambda x: x if isinstance(x, str) else '.'.join(map(str, x)))
def test_a_shifted_result_fails(name, path):
    with pytest.raises(AssertionError): check(changed(BY_NAME[name], path, one_more))

@pytest.mark.parametrize('name, key', [('well_d16', 'well_d16.mu_ref'), ('well_d16', 'well_d16.sigma_sample'), ('mild_d16', 'mild_d16.radii_ref_f64'), ('mild_d16', 'mild_d16.radii_sample_adm'),
    ('resize_64_to_299', 'resized64_stride9'), ('resize_64_to_299', 'resized64_last_row'), ('inception_img64', 'inception.img64.spatial_hwc'), ('inception_img64', 'inception.img64.logits_without_bias')])
def test_a_shifted_tensor_fails(name, key):
    case = BY_NAME[name]
    bad = Case(case.id, case.kind, case.data, case.path, case.context)
    bad.tensors = {**case.tensors, key: case.tensors[key].clone()}
    bad[key].view(-1)[0] += 10
    with pytest.raises(AssertionError): check(bad)

PEAK = '''
import resource, sys, torch
from arpo_nb.evaluation.evaluate import precision_recall
torch.set_num_threads(1)
real, fake = torch.randn(2_000, 64), torch.randn(10_000, 64)
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
precision_recall(real, fake, half=sys.argv[1] == 'half')
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)
'''

def test_distances_are_computed_in_tiles():
    "10,000 × 10,000 distances would be 400 MB at a time, with a copy for the sort 800; tiles of 2,000 rows are 16"
    done = subprocess.run([sys.executable, '-c', PEAK, 'full'], capture_output=True, text=True, env=ENV, check=True)
    assert int(done.stdout) < 150_000, f'{int(done.stdout)/1e3:.0f} MB'

def test_archives_are_streamed(tmp_path):
    "120 MB of images pass through 16 MB"
    code = '''
import resource, sys
from arpo_nb.evaluation.metrics import image_chunks
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(sum(len(x) for x in image_chunks(sys.argv[1], 64)), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)
'''
    np.savez(tmp_path/'big.npz', arr_0=np.zeros((2500, 128, 128, 3), np.uint8))
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path/'big.npz')], capture_output=True, text=True, env=ENV, check=True)
    n, peak = map(int, done.stdout.split())
    assert n == 2500 and peak < 60_000, f'{peak/1e3:.0f} MB'

@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)

class Seen:
    "The toy's tokenizer, and the threads that asked it"
    def __init__(self, tokenizer, reentrant): self.tokenizer, self.reentrant, self.threads = tokenizer, reentrant, []
    def decode(self, tokens):
        self.threads.append(get_ident())
        return self.tokenizer.decode(tokens)

def test_two_batches_in_flight_are_the_same_batches(two_threads):
    "Bit for bit what one thread makes one after the other, in its order, and by two threads where all is reentrant"
    from arpo_nb.evaluation.evaluate import evaluate, generate_images
    from arpo_nb.models.toy import build_toy, toy_metric
    (policy, vq), net = build_toy(), toy_metric()
    policy.eval()
    net.features = net.features[:200]
    def made(threads, n=30, reentrant=True, **kw):
        torch.set_num_threads(threads)
        tokenizer = Seen(vq, reentrant)
        pictures = torch.cat([x for x, _ in generate_images(policy, tokenizer, torch.arange(n) % 10, 5, batch_size=12, **kw)])
        assert torch.get_num_threads() == threads and not any('forward' in vars(m) for m in policy.modules())
        return pictures, {*tokenizer.threads}
    (alone, one), (both, two) = made(1), made(2)
    assert torch.equal(both, alone) and one == {get_ident()} and get_ident() not in two and len(two) > 1
    assert made(2, n=2, reentrant=False)[1] == {get_ident()} # who does not say so is asked by one
    warm = dict(temperature=.8, top_k=20, cfg_scale=1.5)
    assert torch.equal(made(2, 24, **warm)[0], made(1, 24, **warm)[0])
    rows = []
    for threads in 1, 2:
        torch.set_num_threads(threads)
        rows.append(evaluate(policy, vq, net, 10, n=30, batch_size=20, progress=False))
    assert rows[0] == pytest.approx(rows[1], rel=1e-12)

def test_rewards_of_pieces_in_flight_are_the_same_rewards(two_threads):
    "Two threads decode and score pieces of half the size, bit for bit those of one thread; who keeps a state is asked by one"
    from arpo_nb.models.toy import build_toy, toy_judge
    from arpo_nb.protocols import Batch, Streams
    from arpo_nb.rewards import ReconstructionReward
    from arpo_nb.training.rollout import Clock, score_groups
    vq, images, tokens = build_toy()[1].eval(), torch.rand(6, 3, 32, 32), torch.randint(256, (6, 2, 64))
    batch, asked = Batch(torch.zeros(6, dtype=torch.long), Streams.range(0, 0, 6), images), []
    class Counted(ReconstructionReward):
        def __call__(self, images, batch, state=None):
            asked.append(get_ident())
            return super().__call__(images, batch)[0], (state or 0) + 1
    def scored(threads, size, kind=ReconstructionReward):
        torch.set_num_threads(threads)
        tokenizer, clock = Seen(vq, True), Clock()
        tokenizer.decode = lambda t, clamp: tokenizer.threads.append(get_ident()) or vq.decode(t, clamp=clamp)
        return *score_groups(kind(toy_judge()), tokenizer, tokens, batch, decode_batch_size=size, clock=clock), {*tokenizer.threads}, clock.seconds
    one, two = scored(1, 4), scored(2, 8)
    assert torch.equal(one[0], two[0]) and one[2] == {get_ident()} and get_ident() not in two[2]
    assert one[3].keys() == two[3].keys() == {'decode', 'reward'}
    assert torch.allclose(one[0], scored(1, 8)[0], atol=1e-5)
    assert scored(2, 4, Counted)[1] == 3 and {*asked} == {get_ident()}

def test_an_error_in_flight_is_raised_once_and_leaves_the_threads(two_threads):
    from arpo_nb.evaluation.evaluate import generate_images
    from arpo_nb.models.toy import build_toy
    policy, vq = build_toy()
    with pytest.raises(ValueError, match='cond: ids'): [*generate_images(policy.eval(), vq, torch.tensor([0, 1, 2, 3, 4, 99]), 0, batch_size=2)]
    assert torch.get_num_threads() == 2 and not any('forward' in vars(m) for m in policy.modules())
    first = generate_images(policy, vq, torch.arange(60) % 10, 0, batch_size=4)
    next(first), first.close() # nobody wants the rest
    assert torch.get_num_threads() == 2

def test_run_eval(tmp_path):
    (tmp_path/'tuned').mkdir()
    base = load_file(ROOT/'arpo_nb/assets/policy.safetensors')
    save_file({k: v*1.02 for k, v in base.items()}, tmp_path/'tuned'/'policy.safetensors')
    small = dict(n=40, batch_size=20, out_dir=tmp_path/'out', checkpoint=tmp_path/'tuned'/'policy.safetensors')
    ok(papermill('run_eval', tmp_path/'e.ipynb', **small))
    kept = json.loads((tmp_path/'out'/'eval.json').read_text())
    assert set(kept['metrics']) == {'base', 'tuned'} == set(kept['protocol']) and kept['paper_rows'] == [] and kept['torch']
    for name in kept['metrics']:
        assert {'frechet', 'inception_score', 'precision', 'recall', 'top1', 'n', 'warnings'} <= set(kept['metrics'][name]) and kept['metrics'][name]['n'] == 40
        assert {'reference_sha256', 'cfg_scale', 'top_k', 'top_p', 'temperature', 'size', 'seed', 'weights', 'network'} <= set(kept['protocol'][name])
    assert (tmp_path/'out'/'samples.png').exists() and len(list((tmp_path/'out'/'tuned').glob('*.png'))) == 40
    ok(notebook('run_eval', **small))
    assert json.loads((tmp_path/'out'/'eval.json').read_text())['metrics'] == kept['metrics']
    other = notebook('run_eval', **{**small, 'top_k': 5})
    assert other.returncode != 0 and 'another run' in other.stderr

def test_run_eval_on_prompts(tmp_path):
    (tmp_path/'p.jsonl').write_text('\n'.join(json.dumps(dict(tag='single_object', include=[{'class': c, 'count': 1}], prompt=f'a photo of a {c}')) for c in ('bag', 'ankle boot')))
    ok(notebook('run_eval', n=20, prompts=tmp_path/'p.jsonl', detector='classifier', out_dir=tmp_path/'out'))
    kept = json.loads((tmp_path/'out'/'eval.json').read_text())['metrics']['base']
    assert kept['detector'] == 'classifier of toy' and kept['geneval'] == kept['single_object'] > .5
    assert len(list((tmp_path/'out'/'base_geneval'/'00001'/'samples').glob('*.png'))) == 10

@pytest.mark.parametrize('params, message', [(dict(model='toyy'), "did you mean 'toy'"), (dict(checkpoint='gone.pt'), 'no such file'), (dict(part='head'), 'choose policy or tokenizer'), (dict(labels='sorted'), 'choose balanced, random, seen or unseen'),
    (dict(model='llamagen_b', weights='random', inception='random', reference='gone.npz', batch_size=8), 'no such file'),
    (dict(detector='classifier'), "GenEval's format"), (dict(scores='clipp'), "no score 'clipp'")], ids=lambda x: str(next(iter(x.values()))) if isinstance(x, dict) else '')
def test_bad_requests_fail_at_once(tmp_path, monkeypatch, params, message):
    assert message in refused('run_eval', tmp_path, monkeypatch, **{'n': 10, 'out_dir': tmp_path/'out', **params})
    assert not list(tmp_path.rglob('*.png'))
