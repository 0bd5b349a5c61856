"Every method on every backbone, two steps each; and the page shows what came out"
import json
import re

import pytest
from conftest import ROOT

from arpo_nb.training.matrix import BACKBONES, CELLS, run_cell

GUIDED = dict(CELLS['AR-GRPO'], rollout_cfg_scale=2., logprob_cfg='guided')


def shown():
    "The table of the page: (method, backbone) to what stands there"
    cells = json.loads((ROOT/'nbs'/'61_matrix.ipynb').read_text())['cells']
    text = next(''.join(o['data']['text/markdown']) for c in cells for o in c.get('outputs', ()) if 'text/markdown' in o.get('data', {}))
    head, _, *rows = [[c.strip() for c in line.strip('|').split('|')] for line in text.splitlines()]
    return {(row[0], b): cell for row in rows for b, cell in zip(head[1:], row[1:], strict=True)}


@pytest.mark.parametrize('method', CELLS)
@pytest.mark.parametrize('backbone', BACKBONES)
def test_cell(backbone, method, tmp_path):
    run_cell(backbone, CELLS[method], tmp_path)
    assert shown()[method, backbone] == '✓'


@pytest.mark.parametrize('backbone', BACKBONES)
def test_guided(backbone, tmp_path):
    if backbone != 'VQGAN c-IN': run_cell(backbone, GUIDED, tmp_path)
    else:
        with pytest.raises(ValueError, match='no null class'): run_cell(backbone, GUIDED, tmp_path)
    assert bool(re.match('refused: .*no null class', shown()['guided free running', backbone])) == (backbone == 'VQGAN c-IN')


def test_table_is_complete(): assert shown().keys() == {(m, b) for m in (*CELLS, 'guided free running') for b in BACKBONES}
