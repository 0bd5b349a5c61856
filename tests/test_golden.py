"Run every golden case: `pytest tests/test_golden.py`, or `--golden DIR` for another folder of the same format"
import copy, json, re
from pathlib import Path

import pytest, torch
from golden_cases import Case, check, discover

GOLDEN = Path(__file__).parent/'golden'

def test_golden(golden_case): check(golden_case)

def test_unknown_kind_fails(tmp_path):
    (tmp_path/'x.case.json').write_text(json.dumps(dict(kind='nobody-knows')))
    (tmp_path/'y.case.json').write_text('{}')
    for case in discover(tmp_path):
        with pytest.raises(LookupError, match='unknown kind'): check(case)

@pytest.mark.parametrize('name', ['cases.json', 'others.json'])
def test_cases_in_a_bare_list_run(tmp_path, name):
    (tmp_path/name).write_text(json.dumps([dict(kind='nobody-knows'), dict(kind='llamagen-caption-cleaning', cases=[dict(text=' A cat', cleaned='a dog')])]))
    unknown, known = discover(tmp_path)
    with pytest.raises(LookupError, match='unknown kind'): check(unknown)
    with pytest.raises(AssertionError, match='a dog'): check(known)
    (tmp_path/'cases.json').write_text('[1]')
    with pytest.raises(LookupError, match='unknown kind None'): check(discover(tmp_path)[0])

def test_folder_without_cases_fails(tmp_path):
    with pytest.raises(ValueError, match='no golden cases'): discover(tmp_path)
    with pytest.raises(FileNotFoundError): discover(tmp_path/'missing')

@pytest.mark.parametrize('name', ['gpt_c2i_gqa', 'gpt_t2i_8', 'vq_widen2', 'sampler', 'rope2d', 'image_io', 'label_to_image', 'quantizer', 'sampling_filters'])
def test_a_wrong_number_fails(name):
    "Every checker notices when any one of the float outputs it compares is shifted"
    case, = [c for family in ('llamagen', 'vqgan') for c in discover(GOLDEN/family) if c.id == name]
    names = [k for k, v in case.tensors.items() if k.startswith('out.') and 'sampled' not in k]
    for k in names:
        bad = Case(case.id, case.kind, case.data, case.path)
        v = case.tensors[k]
        bad.tensors = {**case.tensors, k: ~v if v.dtype == torch.bool else v + 3}
        with pytest.raises(AssertionError): check(bad)

@pytest.mark.parametrize('name', ['quant_phi_per_scale', 'vqvae_small', 'transformer_plain_attn', 'sampling_filters'])
def test_a_wrong_number_fails_var(name):
    "Every output of the VAR cases is compared: move one number of it, and the checker notices"
    case, = [c for c in discover(GOLDEN/'var') if c.id == name]
    draws = [k for k in case.tensors if 'rng_idx' in k] # of torch's own generator
    for k in [k for k in case.tensors if k.startswith('out.') and k not in draws]:
        bad = Case(case.id, case.kind, case.data, case.path)
        bad.tensors = {**case.tensors, k: case.tensors[k].clone()}
        first = bad[k].view(-1)[:1]
        first.copy_(1 - first if bad[k].dtype in (torch.uint8, torch.int64) else first + .1)
        with pytest.raises(AssertionError): check(bad)

def shifted(x):
    "A number, or the first number of a nested list, moved by a tenth"
    if isinstance(x, list): return [shifted(x[0]), *x[1:]]
    return .1 if isinstance(x, str) else x + .1

def leaves(d, path=()):
    "Paths of the numbers and lists in nested dicts"
    for k, v in d.items():
        if isinstance(v, dict): yield from leaves(v, (*path, k))
        elif not isinstance(v, str): yield (*path, k)

def changed(case, path):
    "The case with a shift in what `path` leads to"
    data = copy.deepcopy(case.data)
    at = data
    for k in path[:-1]: at = at[k]
    at[path[-1]] = shifted(at[path[-1]])
    return Case(case.id, case.kind, data, case.path, case.context)

NUMBERS = dict( # results that a case keeps outside `expected`
    full_tiny_d4=['reward_ema_40_digits', 'fid_full_40_digits', 'fid_full', 'fid_batch', 'ema_m2_new_trace', 'ema_m2_new_frobenius'],
    composite_reward=['rewards', 'if_each_term_were_normalised_separately'],
    product_overflow=['sum_log_ratio', 'token_mean_ratio'],
    k3=['wrong_sign_token_mean'],
    k3_is_unbiased_for_one_token=['exact_kl_theta_ref', 'expectation_of_k3_under_theta', 'expectation_of_k1_under_theta', 'expectation_if_sign_were_reversed'],
    entropy_extremes=['uniform_H_hat', 'one_hot_H_hat'],
    corruption_kernel=['transition_matrix_K5_xi0_4', 'entropy_of_one_row_nats'],
    channels=['pure_red', 'pure_green', 'pure_blue', 'white', 'black'],
    aesthetic_v2=['collapsed_weight_norm', 'score_range_on_the_unit_sphere'],
    maniqa=['expected_score', 'second_implementation_score'])

def results(case):
    "Paths of the results in a case's json"
    found = {k: case.data[k] for k in ('expected', 'variants', 'hps', 'open_clip', 'resnet50_v2', 'differences') if k in case.data}
    return [*leaves(found), *((k,) for k in NUMBERS.get(case.data.get('name', case.kind), []))]

METRICS = discover(GOLDEN/'metrics')

@pytest.mark.parametrize('case', [c for c in METRICS if results(c)], ids=lambda c: c.id)
def test_a_shifted_result_fails(case):
    "Every result in the json is compared: shift any one, and the failure names it"
    for path in results(case)[:1 if case.kind == 'maniqa' else None]: # a big network: once is enough
        name = path[min(1, len(path) - 1)]
        with pytest.raises(AssertionError, match=re.escape(name)): check(changed(case, path))

@pytest.mark.parametrize('case', [c for c in METRICS if c.data.get('file')], ids=lambda c: c.id)
def test_a_shifted_tensor_fails(case):
    "So is every tensor, and every input matters"
    unused = {'reward_first_order'} | ({'ema_mu', 'ema_m2'} if case.data.get('alpha') == 1 else set()) # α = 1 forgets the past
    for k in case.tensors.keys() - unused:
        bad = Case(case.id, case.kind, case.data, case.path, case.context)
        bad.tensors = {**case.tensors, k: case.tensors[k].clone()}
        bad[k].view(-1)[0] += .1 if bad[k].is_floating_point() else 100
        with pytest.raises(AssertionError): check(bad)
