"Rehearsals: three cells of the table, what stands in for what is run, and where a GPU may have to wait"
import ast
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from arpo_nb.config import preset
from arpo_nb.models.llamagen import GPT, GPTConfig
from arpo_nb.models.multiscale_vq import MultiScaleConfig, MultiScaleVQ
from arpo_nb.models.var import VAR, VARConfig
from arpo_nb.models.vqgan import CINConfig, CINTransformer
from arpo_nb.training.ledger import Ledger, Phase
from arpo_nb.training import steps
from arpo_nb.training import plan as planning
from arpo_nb.training import rehearse as rehearsing
from arpo_nb.training.plan import Plan, check_memory, fitted, make_plan, memory_bounds, network_bytes
from arpo_nb.training.rehearse import Rehearsal, _Stage, build, load_rehearsals, propose, rehearse

ROOT = Path(__file__).parents[1]

# function → what it asks a GPU for in the middle of a step; everything else is a mistake
ACCEPTED = {'protocols.Streams.uniform': 'random numbers are drawn on the host, and copied',
            'protocols.System.with_prompts': 'names of classes, once a step',
            'rewards.check_images': 'one range check of the pictures that a reward sees',
            'rewards._check_scores': 'one message: whether scores are finite and differ',
            'rewards.WeightedSum.__call__': 'one message: mean and spread of a reward',
            'rewards.LOOFIDReward.__call__': 'the distance, for the log',
            'rewards.luminance': 'three weights',
            'own_rewards._finite': 'whether scores are finite',
            'moments.Reference.to': 'the reference, once', 'moments.Reference.fingerprint': 'once',
            'moments.check_features': 'whether features are finite', 'moments.check_state': 'whether a state is',
            'steps.mean_over_processes': 'metrics, in one message', 'steps._gradient_norm': 'before it is clipped'}


def title(node):
    "A function's name, with the class that it is patched into"
    grown = any(getattr(d, 'id', '') == 'patch' for d in node.decorator_list)
    return f'{ast.unparse(node.args.args[0].annotation)}.{node.name}' if grown else node.name


def asker(line):
    "'file.py:12' to 'file.Class.function'; other people's files stay what they are"
    name, number = line.split(':')
    found = list((ROOT/'arpo_nb').rglob(name))
    if len(found) != 1: return line
    def inside(node): return getattr(node, 'lineno', 0) <= int(number) <= getattr(node, 'end_lineno', 0)
    named = [n for n in ast.walk(ast.parse(found[0].read_text()))
             if isinstance(n, ast.ClassDef | ast.FunctionDef) and inside(n)]
    return '.'.join([found[0].stem, *(title(n) for n in sorted(named, key=lambda n: n.lineno))])


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
    asked = {asker(line) for r in cells.values() for line in r.syncs}
    assert asked == ACCEPTED.keys()


def test_a_new_question_is_seen(monkeypatch):
    compare = steps.compare
    def curious(rewards, *args):
        if rewards.max().item() > 0: pass
        return compare(rewards, *args)
    monkeypatch.setattr(steps, 'compare', curious)
    assert 'steps.judge' in {asker(line) for line in rehearse(tiny('vapi')).syncs}


@pytest.mark.parametrize('method, more', [('vapi', {}), ('vapi', dict(gradient_checkpointing=True)), ('var_grpo', {}),
    ('vapi', dict(mixed_precision='bf16', gradient_checkpointing=True, micro_batch_size=1)),
    ('loofid', dict(logps_chunk=64)), ('loofid', dict(logps_chunk=64, mixed_precision='bf16'))]) # states in eight pieces
def test_stand_ins_cost_what_they_stand_for(monkeypatch, method, more):
    cfg = replace(tiny(method, **more), mini_batch_size=2)
    short = rehearse(cfg)
    monkeypatch.setattr(Ledger, 'block', lambda self, unit, about='': None)
    monkeypatch.setattr(Ledger, 'once', lambda self, f, name, about='': f)
    monkeypatch.setattr(_Stage, '_micro_batch', lambda self, run: run)
    monkeypatch.setattr(_Stage, '_norm', lambda self, *args: self.go_norm(*args))
    monkeypatch.setattr(_Stage, '_step', lambda self, run, *args: run(*args))
    monkeypatch.setattr(_Stage, '_zero_grad', lambda self, opt, *args, **kw: type(opt).zero_grad(opt, *args, **kw))
    whole = rehearse(cfg)
    for name in {'generate', 'score', 'decode', 'update', 'backward', 'optimiser'} & whole.phases.keys():
        a, b = short.phases[name], whole.phases[name]
        assert sum(a.flops.values()) == pytest.approx(sum(b.flops.values()), rel=.01), name
        for x, y in ((a.moved, b.moved), (a.peak, b.peak)): assert x == pytest.approx(y, rel=.02), name


def test_a_policy_under_guidance_scores_twice():
    "Its head is no network's"
    plain = tiny('loofid', rollout_cfg_scale=2.)
    once, twice = (sum(rehearse(cfg).phases['score'].flops.values()) for cfg in (plain, replace(plain, logprob_cfg='guided')))
    assert twice == pytest.approx(2*once, rel=.01)


@pytest.mark.parametrize('shards', [1, 2])
def test_what_was_seen_serves_another_number_of_devices(shards):
    one = tiny('vapi', micro_batch_size=1)
    two, parts, records = replace(one, num_processes=2), build(one), {}
    rehearse(one if shards == 1 else two, parts=parts, records=records, shards=shards)
    known = rehearse(two, parts=parts, records=records, shards=shards)
    new = rehearse(two, parts=parts, shards=shards)
    assert known.peak == pytest.approx(new.peak, rel=.01) and known.checkpoint == new.checkpoint
    for name, phase in new.phases.items(): assert known.phases[name].flops == phase.flops, name
    assert known.phases['optimiser'].kinds['optimiser state'] == new.phases['optimiser'].kinds['optimiser state']


def test_what_was_seen_serves_smaller_pieces():
    "Weights in half precision are held once, however many passes stand in for each other"
    cfg, records = tiny('loofid', mixed_precision='bf16'), {}
    rehearse(cfg, records=records)
    small = replace(cfg, micro_batch_size=1) # sampling is stood in for, scoring is not
    known, new = rehearse(small, records=records), rehearse(small)
    for name, phase in new.phases.items(): assert known.phases[name].peak == pytest.approx(phase.peak, rel=.01), name


@pytest.mark.parametrize('method', ['var_grpo', 'loofid'])
def test_a_head_that_is_a_module_is_whole_for_a_sharded_policy(method):
    "VAR's is entered after a `hidden` that was stood in for"
    cfg = replace(tiny(method, num_processes=2), model='toy_var')
    assert rehearse(cfg, shards=2).phases['update'].peak > 0


@pytest.mark.parametrize('method, before', [('vapi', 'loofid'), ('loofid', 'vapi'), ('mle', 'vapi')])
def test_what_another_run_saw_is_what_this_one_would_see(method, before):
    "Networks are remembered by what they are, whatever they were a part of"
    records, cfg = {}, tiny(method)
    rehearse(tiny(before), records=records)
    known, new = rehearse(cfg, records=records), rehearse(cfg)
    assert known.phases.keys() == new.phases.keys() and records['networks']
    for name, phase in new.phases.items():
        assert known.phases[name].work == phase.work and known.phases[name].peak == pytest.approx(phase.peak, rel=.01), name


@pytest.mark.parametrize('shards', [1, 2])
def test_a_checkpoint_has_weights_and_two_moments(shards):
    "Of this process: its part, and a counter for each parameter"
    cfg = tiny('vapi', num_processes=shards)
    weights = 4*sum(p.numel() for p in build(cfg)[0].policy.parameters())
    assert rehearse(cfg, shards=shards).checkpoint == pytest.approx(3*weights/shards, rel=.01)


def test_workers_of_the_table_end_with_their_parent():
    "Nobody is left behind who computes for no one"
    code = """
        import os, sys, time
        sys.path.insert(0, sys.argv[1])
        from rehearse import begin
        if os.fork() == 0:
            begin(os.getppid())
            print('works', flush=True)
        time.sleep(60)"""
    parent = subprocess.Popen([sys.executable, '-c', textwrap.dedent(code), str(ROOT/'scripts')], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == 'works\n'
    parent.kill()
    assert parent.communicate(timeout=20)[0] == '' # which waits for whoever holds the pipe


def test_a_shape_that_only_its_arguments_say():
    cfg = replace(preset('var', 'var_grpo'), weights='random', model_args='depth=3,embed_dim=64,num_heads=2')
    policy = build(cfg)[0].policy
    assert len(policy.blocks) == 3 and policy.head.weight.is_meta and policy.head.in_features == 64


def test_propose_keeps_the_step(cells):
    cfg = tiny('vapi')
    small, r = propose(cfg, cells['vapi'].peak)
    assert r.peak <= .9*cells['vapi'].peak and small.batch_size == cfg.batch_size
    with pytest.raises(MemoryError, match='whatever the pieces'): propose(cfg, 1e6)


def test_auto_finds_pieces_for_a_real_model():
    cfg = preset('llamagen_b', 'mle')
    assert fitted(cfg, memory=(80e9, 'the GPU')) == cfg
    small = fitted(cfg, memory=(5e9, 'the GPU'))
    changed = {k for k in vars(cfg) if getattr(cfg, k) != getattr(small, k)}
    assert changed == {'decode_batch_size'} and rehearse(small).peak <= .9*5e9 < rehearse(cfg).peak


def test_a_plan_builds_its_rewards_once(monkeypatch):
    calls, cfg = [], replace(preset('llamagen_b', 'ar_grpo'), rewards='aesthetic', weights='random')
    def rehearse_quickly(cfg, **how):
        calls.append(how)
        return Rehearsal(cfg, 1, dict(update=Phase(peak=5, kinds=dict(a=5))), Counter(), [], 0)
    monkeypatch.setattr(rehearsing, 'rehearse', rehearse_quickly)
    plan = make_plan(cfg)
    assert plan.peak == 5 and calls[0]['parts'][1] is plan.reward


def graph_breaks(f, *args):
    "Traced by torch.compile on tensors without content"
    torch._dynamo.reset()
    with torch.no_grad(): found = torch._dynamo.explain(f)(*args)
    return found.graph_break_count, [str(b.reason) for b in found.break_reasons]


def one_token(model):
    "A function that draws one token, or for VAR one picture, and what it is called with"
    n, ids = 2, torch.zeros(2, dtype=torch.long)
    if model == 'llamagen':
        p = GPT(GPTConfig(dim=64, n_layer=2, n_head=2, block_size=16, vocab_size=64)).eval()
        return p.step, ids, torch.tensor([3]), torch.ones(1, 1, 1, 16, dtype=torch.bool), p.new_cache(n, 16)
    if model == 'vqgan':
        p = CINTransformer(CINConfig(vocab_size=64, num_classes=10, block_size=17, n_layer=2, n_head=2, n_embd=64)).eval()
        return lambda x, c: p.head(p.trunk(x, c, 3)), ids[:, None], p.new_cache(n)
    if model == 'var':
        sides = (1, 2, 4)
        vq = MultiScaleVQ(MultiScaleConfig(patch_nums=sides, image_size=64)).eval()
        p = VAR(VARConfig(depth=2, embed_dim=64, num_heads=2, patch_nums=sides), vq.quantize).eval()
        return lambda cond: p.decode(cond, lambda k, l: p.quantizer.embedding(l.argmax(-1)), 1.5), ids
    pytest.importorskip('transformers')
    from arpo_nb.models.janus import Cache, JanusConfig, JanusPolicy
    p = JanusPolicy(JanusConfig(dim=64, n_layer=2, n_head=2, ffn_dim=64, text_vocab_size=100_100, num_tokens=16, vocab_size=64)).eval()
    (prompt, valid), cache = p.example_cond(n, 8), Cache(24)
    with torch.no_grad(): p.trunk(p.language_model.embed_tokens(prompt), valid.bool(), cache, padded=False)
    cache.start = 8
    return lambda x, v: p.head(p.trunk(x, v, cache, padded=False)[:, -1]), torch.zeros(n, 1, 64), torch.ones(n, 9, dtype=torch.bool)


@pytest.mark.parametrize('model', ['llamagen', 'vqgan', 'var', 'janus'])
def test_sampling_traces_without_a_break(model): assert graph_breaks(*one_token(model)) == (0, [])


TABLE = load_rehearsals(ROOT/'results')


def of_table(name, n):
    "The configuration of a cell"
    cell = TABLE[name][str(n)]
    cfg = replace(preset(*name.split()), num_processes=n, batch_size=cell['batch_size'], mini_batch_size=cell['mini_batch_size'])
    return replace(cfg, **cell['changed'])


@pytest.mark.parametrize('name, n', [('toy vapi', 1), ('toy loofid', 8), ('toy_var var_grpo', 64)])
def test_the_table_is_of_this_code(name, n):
    "Three cells, rehearsed again"
    cell, r = TABLE[name][str(n)], rehearse(of_table(name, n), shards=TABLE[name][str(n)]['shards'])
    assert r.peak == pytest.approx(cell['bytes'], rel=.01) and r.checkpoint == cell['checkpoint']


@pytest.mark.parametrize('name', ['llamagen_b vapi', 'llamagen_xxl vapi', 'llamagen_l loofid', 'toy loofid', 'toy_var var_grpo'])
def test_bounds_hold_on_the_table(name):
    "What a plan goes by without a rehearsal: the sum of everything, and what is always there"
    fits = {n: cell for n, cell in TABLE[name].items() if 'why' not in cell}
    system, reward = build(preset(*name.split()))
    networks = network_bytes(system, reward)
    for n, cell in fits.items():
        least, most = memory_bounds(of_table(name, int(n)), system, networks, cell['shards'])
        assert least <= cell['bytes'] <= most, n
    assert fits


def test_a_run_that_could_not_be_rehearsed_is_not_refused(monkeypatch):
    cfg = tiny('vapi')
    monkeypatch.setattr(Plan, 'memory', property(lambda self: len(3)))
    plan = make_plan(cfg)
    with pytest.warns(UserWarning, match='nobody knows whether it fits, .*TypeError'): check_memory(plan, cfg, (sum(plan.bounds)/2, 'the GPU'))


def test_what_a_notebook_holds_is_not_there_for_the_run(monkeypatch):
    cfg = tiny('vapi')
    plan = make_plan(cfg)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    for held in (0, plan.peak):
        gpu = dict(mem_get_info=(2*plan.peak - held - 1, 2*plan.peak), memory_reserved=held, memory_allocated=held)
        for name, value in gpu.items(): monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
        if not held: check_memory(plan, cfg)
        else:
            with pytest.raises(MemoryError, match='the GPU has .* GB left'): check_memory(plan, cfg)


def test_networks_of_rewards_are_counted_once():
    cfg = preset('llamagen_b', 'loofid')
    held = make_plan(replace(cfg, rewards='clip+aesthetic+hps+loo_fid', weights='random')).networks
    assert {'reward clip', 'reward aesthetic', 'reward hps', 'reward loo_fid'} <= held.keys()
    assert held['reward clip'] > 1.5e9 > 1e7 > held['reward aesthetic'] # its head; the network is CLIPScore's
    assert held['reward hps'] > 3e9 and held['reward loo_fid'] > 8e7
