"Checker of GenEval's decisions on given detections"
import hashlib

import pytest

from arpo_nb.evaluation.geneval import CLASSES, COLORS, Found, iou, judge, keep_found, read_prompts, relations, summarize
from golden_cases import checks

def verdict(c, constants, name):
    "Compare one picture's kept boxes and verdict"
    color, found = {}, {}
    for cls, rows in c['detections'].items():
        found[cls] = [Found(tuple(r[:4]), r[4]) for r in rows]
        color |= {id(f): r[5] for f, r in zip(found[cls], rows)}
    overlap = c.get('max_overlap', constants['max_overlap'])
    least = constants['counting_threshold' if c['metadata']['tag'] == 'counting' else 'threshold']
    kept = {cls: len(k) for cls, f in found.items() if (k := keep_found(f, least, overlap, constants['max_objects_per_class']))}
    assert kept == c['kept_per_class'], f'{name} kept_per_class {kept}'
    rules = dict(threshold=constants['threshold'], counting_threshold=constants['counting_threshold'], max_overlap=overlap, max_objects=constants['max_objects_per_class'], position_threshold=constants['position_threshold'])
    right, why = judge(c['metadata'], found, lambda f, cls: color[id(f)], **rules)
    assert right == c['correct'], f'{name} correct {right} {why}'
    assert right == (not why)

@checks('geneval_logic')
def geneval_logic(case):
    d = case.data
    k = d['constants']
    assert k['colours'] == COLORS, 'colours'
    for c in [*d['cases'], *d['overlap_suppression_cases']]: verdict(c, k, c['name'])
    for i, c in enumerate(d['iou']): assert iou(c['a'], c['b']) == pytest.approx(c['iou'], abs=1e-12), f'iou {i}'
    for i, c in enumerate(d['relative_position']): assert relations(c['a'], c['b'], k['position_threshold']) == set(c['relations']), f'relative_position {i}'
    s = d['summary']
    rows = [dict(tag=t, correct=j < s['correct_per_tag'][t]) for t, n in s['images_per_tag'].items() for j in range(n)]
    got, want = summarize(rows), s['expected']
    assert got['tasks'] == pytest.approx(want['per_tag']), 'per_tag'
    assert got['overall'] == pytest.approx(want['overall'], abs=1e-12), 'overall'
    assert got['image_accuracy'] == pytest.approx(want['image_accuracy'], abs=1e-12), 'image_accuracy'
    if 'benchmark_prompts' in d: benchmark(case.path.parent/d['benchmark_prompts']['file'], d['benchmark_prompts'])

def benchmark(path, want):
    "The published prompts are read, and all can be judged"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == want['sha256'], 'sha256'
    prompts = read_prompts(path)
    assert len(prompts) == want['prompts'], 'prompts'
    assert {t: sum(p['tag'] == t for p in prompts) for t in want['per_tag']} == want['per_tag'], 'per_tag of the prompts'
    assert {r['class'] for p in prompts for r in p['include']} <= set(CLASSES)
