"Run every golden case: `pytest tests/test_golden.py`, or `--golden DIR` for another folder of the same format"
import json
from pathlib import Path

import pytest, torch
from golden_cases import Case, check, discover

def test_golden(golden_case): check(golden_case)

def test_unknown_kind_fails(tmp_path):
    (tmp_path/'x.case.json').write_text(json.dumps(dict(kind='nobody-knows')))
    (tmp_path/'y.case.json').write_text('{}')
    for case in discover(tmp_path):
        with pytest.raises(LookupError, match='unknown kind'): check(case)

def test_folder_without_cases_fails(tmp_path):
    with pytest.raises(ValueError, match='no golden cases'): discover(tmp_path)
    with pytest.raises(FileNotFoundError): discover(tmp_path/'missing')

@pytest.mark.parametrize('name', ['gpt_c2i_gqa', 'gpt_t2i_8', 'vq_widen2', 'sampler', 'rope2d', 'image_io'])
def test_a_wrong_number_fails(name):
    "Every checker notices when any one of the float outputs it compares is shifted"
    root = Path(__file__).parent/'golden'/'llamagen'
    case, = [c for c in discover(root) if c.id == name]
    names = [k for k, v in case.tensors.items() if k.startswith('out.') and 'sampled' not in k]
    for k in names:
        bad = Case(case.id, case.kind, case.data, case.path)
        v = case.tensors[k]
        bad.tensors = {**case.tensors, k: ~v if v.dtype == torch.bool else v + 3}
        with pytest.raises(AssertionError): check(bad)
