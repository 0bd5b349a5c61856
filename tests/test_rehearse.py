"Rehearsals: three cells of the table, what stands in for what is run, and where a GPU may have to wait"
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from arpo_nb.config import preset
from arpo_nb.models.llamagen import GPT, GPTConfig
from arpo_nb.models.var import VAR, VARConfig
from arpo_nb.models.multiscale_vq import MultiScaleConfig, MultiScaleVQ
from arpo_nb.models.vqgan import CINConfig, CINTransformer
from arpo_nb.protocols import Streams
from arpo_nb.training.ledger import Ledger
from arpo_nb.training.rehearse import propose, rehearse

# file → what it asks a GPU for in the middle of a step; everything else is a mistake
ACCEPTED = dict(rewards='one range check of the pictures a reward sees, and one message of its statistics', own_rewards='whether scores are finite',
                steps='metrics and the norm of the gradient, once per optimiser step', saving='whether weights are finite, at a checkpoint',
                protocols='random numbers of the host', moments='whether features and state are finite', clip='constants of its preprocessing',
                trainer='metrics', inception='constants of its resize')


def tiny(method, **kw):
    model = 'toy_var' if method == 'var_grpo' else 'toy'
    return replace(preset(model, method), batch_size=4, num_generations=2, mini_batch_size=0, **kw)


@pytest.fixture(scope='module')
def cells(): return {m: rehearse(tiny(m)) for m in ('vapi', 'loofid', 'var_grpo')}


def test_phases_of_each_method(cells):
    assert {'encode', 'generate', 'decode', 'reward', 'update', 'backward', 'optimiser'} <= cells['vapi'].phases.keys()
    assert {'generate', 'score', 'reward class_score', 'reward loo_fid'} <= cells['loofid'].phases.keys()
    assert {'reference', 'reward brightness'} <= cells['var_grpo'].phases.keys()
    for r in cells.values(): assert sum(r.phases['backward'].flops.values()) > 0 and r.peak > 0


def test_only_accepted_lines_wait(cells):
    asked = {line.split('.py')[0] for r in cells.values() for line in r.syncs}
    assert asked <= ACCEPTED.keys(), asked - ACCEPTED.keys()


@pytest.mark.parametrize('more', [{}, dict(gradient_checkpointing=True), dict(mixed_precision='bf16', gradient_checkpointing=True)])
def test_stand_ins_cost_what_they_stand_for(monkeypatch, more):
    cfg = tiny('vapi', **more)
    short = rehearse(cfg)
    monkeypatch.setattr(Ledger, 'block', lambda self, unit: None)
    monkeypatch.setattr(Ledger, 'once', lambda self, f, name: f)
    whole = rehearse(cfg)
    for name in ('generate', 'decode', 'update', 'backward'):
        a, b = short.phases[name], whole.phases[name]
        assert sum(a.flops.values()) == pytest.approx(sum(b.flops.values()), rel=.01), name
        assert a.moved == pytest.approx(b.moved, rel=.03), name
        assert a.peak == pytest.approx(b.peak, rel=.02), name


def test_propose_keeps_the_step(cells):
    cfg = tiny('vapi')
    small, r = propose(cfg, cells['vapi'].peak)
    assert r.peak <= .9*cells['vapi'].peak and small.batch_size == cfg.batch_size
    with pytest.raises(MemoryError, match='whatever the pieces'): propose(cfg, 1e6)
