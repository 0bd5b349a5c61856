"""Golden cases: recorded results of other people's code, found under a folder and checked by kind.

A case is one of
- `NAME.case.json` with a `kind`, its tensors in the safetensors file that `file` names, or else in `NAME.safetensors`;
- `cases.json`, either with a `kind` of its own or with a list of cases that have one: the file itself, or its `cases`;
- any other `*.json` with a `kind`, or such a list;
- `manifests/NAME.json` with a `state_dict`: kind `manifest-` and the leading letters of NAME, in lower case.
Other files belong to these. Every kind needs a checker: write it in `golden_FAMILY.py` next to this file."""
import importlib, json, re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file

CHECKS = {}

def checks(*kinds):
    "Register a function of one `Case` as the checker of `kinds`"
    def register(f):
        for kind in kinds:
            if kind in CHECKS: raise ValueError(f'two checkers for kind {kind!r}')
            CHECKS[kind] = f
        return f
    return register

def close(got, want, tol, name):
    "Fail unless the shapes are equal and the numbers within `tol`"
    assert got.shape == want.shape, f'{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}'
    err = (got.double() - want.double()).abs().max().item()
    assert err <= tol, f'{name}: off by {err:.3g}, tolerance {tol:g}'

@dataclass
class Case:
    "One case: its kind, its description, and the folder its files are in"
    id: str
    kind: str|None
    data: dict # the case itself
    path: Path # the json file
    context: dict = None # the whole json file when it holds several cases

    @cached_property
    def tensors(self):
        "The tensors of the file that the case names"
        name = self.data.get('file') or (self.context or {}).get('file')
        usual = self.path.name.removesuffix('.json').removesuffix('.case') + '.safetensors'
        if not name and (self.path.parent/usual).exists(): name = usual
        return load_file(self.path.parent/name) if name else {}

    def weights(self):
        "Tensors named `w.*` without that prefix, in float32 where floating"
        return {k[2:]: v.float() if v.is_floating_point() else v for k, v in self.tensors.items() if k.startswith('w.')}

    def __getitem__(self, key): return self.tensors[key]
    def __contains__(self, key): return key in self.tensors
    def matching(self, prefix):
        "Pairs of the rest of the name and the tensor, for names that start with `prefix`"
        return [(k[len(prefix):], v) for k, v in self.tensors.items() if k.startswith(prefix)]

    def close(self, got, name, tol):
        "Fail unless `got` equals the tensor `name` within `tol`"
        close(got, self.tensors[name], tol, name)

    def equal(self, got, name):
        "Fail unless `got` equals the tensor `name` exactly"
        want = self.tensors[name]
        assert got.shape == want.shape, f'{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}'
        assert torch.equal(got.to(want.dtype), want), f'{name}: {(got != want).sum()} of {want.numel()} entries differ'

def _read(root, path):
    "The cases of one json file"
    data, name = json.loads(path.read_text()), str(path.relative_to(root).with_suffix('')).removesuffix('.case')
    if isinstance(data, list): data = dict(cases=data)
    if not isinstance(data, dict): data = {}
    if path.parent.name == 'manifests' and 'state_dict' in data:
        return [Case(name, 'manifest-' + re.match('[A-Za-z]*', path.stem)[0].lower(), data, path)]
    cases = data.get('cases') if isinstance(data.get('cases'), list) else []
    cases = [c if isinstance(c, dict) else {} for c in cases] # what has no kind fails
    if 'kind' not in data and (path.name == 'cases.json' or any('kind' in c for c in cases)):
        return [Case(f'{name}-{i}-{c.get("name") or c.get("kind")}', c.get('kind'), c, path, data) for i, c in enumerate(cases or [{}])]
    if 'kind' in data or path.name.endswith('.case.json'): return [Case(name, data.get('kind'), data, path)]
    return []

def discover(root):
    "Every case under a folder"
    if not root.is_dir(): raise FileNotFoundError(f'--golden {root}: no such folder')
    cases = [c for path in sorted(root.rglob('*.json')) for c in _read(root, path)]
    if not cases: raise ValueError(f'--golden {root}: no golden cases in this folder')
    return cases

def check(case):
    "Run the checker of a case's kind"
    for f in sorted(Path(__file__).parent.glob('golden_*.py')):
        if f.stem != 'golden_cases': importlib.import_module(f.stem)
    if case.kind not in CHECKS:
        raise LookupError(f'{case.path}: unknown kind {case.kind!r}; known: {", ".join(sorted(CHECKS))}')
    CHECKS[case.kind](case)
