"LoRA through every family and the whole life of a run: trained, saved, resumed, averaged, handed on, planned, refused"
import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_contract import POLICIES, jitter
from test_run_life import CFG, go, same_weights, tiny

from arpo_nb import adapters
from arpo_nb.adapters import add_lora, check_reached, merge_adapter, whole_tensors
from arpo_nb.config import Config, preset
from arpo_nb.protocols import Streams
from arpo_nb.systems import load_shapes, load_system
from arpo_nb.training.engines import PolicyCopy, named_tensors
from arpo_nb.training.export import export, push
from arpo_nb.training.launch import run
from arpo_nb.training.plan import disk_estimate, make_plan, network_bytes
from arpo_nb.training.rehearse import rehearsed
from arpo_nb.training.saving import snapshots
from arpo_nb.training.sharding import check_layout
from arpo_nb.training.trainer import state_bytes

try: adapters.import_peft()
except ImportError as e: pytest.skip(str(e), allow_module_level=True)

LORA = replace(CFG, lora_rank=2, lora_alpha=4)


def spread(policy, std=.2):
    "Adapters that do something"
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad: p.normal_(std=std, generator=torch.Generator().manual_seed(1))
    return policy


def full():
    "The tiny system with a head that says something"
    system = tiny()
    torch.nn.init.normal_(system.policy.output.weight, std=.3)
    return system


@pytest.mark.parametrize('name', POLICIES)
def test_adapters_act_wherever_a_policy_is_entered(name, tmp_path):
    "Scores, drawn tokens and gradients; folded in, the same policy under the published names"
    torch.manual_seed(0)
    make, cond = POLICIES[name]
    plain = jitter(make())
    policy = spread(add_lora(copy.deepcopy(plain), 2))
    ids, streams = torch.randint(policy.vocab_size, (4, policy.num_tokens)), Streams.range(0, 0, 4)
    score = lambda p: p.head(p.hidden(ids, cond))
    best = policy.generate(cond, streams, top_k=1)
    seen = policy.head(policy.hidden(best, cond)) # the cache and the teacher-forced pass are one policy
    assert (seen.amax(-1) - seen.gather(-1, best[..., None])[..., 0]).max() < 1e-3
    assert not torch.equal(best, plain.generate(cond, streams, top_k=1))
    free = [p for p in policy.parameters() if p.requires_grad]
    opt = torch.optim.SGD(free, 1e-9, momentum=.9)
    score(policy).square().sum().backward(); opt.step(); check_reached(policy, opt)
    want = score(policy).detach()
    adapters.save_adapter(policy, tmp_path)
    merged = merge_adapter(plain, tmp_path)
    assert torch.allclose(score(merged), want, atol=1e-4) and merged.state_dict().keys() == make().state_dict().keys()
    whole = dict(whole_tensors(policy))
    assert all(torch.allclose(v, whole[k], atol=1e-6) for k, v in merged.state_dict().items())


def test_a_run_moves_adapters_alone_and_is_resumed_to_the_bit(tmp_path):
    cfg, system, before = replace(LORA, steps=4, beta=.1, ema_decay=.5, keep_every=3, lora_dropout=.1), full(), full()
    rows = go(tmp_path/'x', cfg, system)
    names = {n.replace('.base_layer', ''): p for n, p in system.policy.named_parameters() if 'lora_' not in n}
    assert all(torch.equal(names[n], p) for n, p in before.policy.named_parameters()) and len(names) == len(list(before.policy.parameters()))
    assert rows[0]['policy/kl'] == pytest.approx(0, abs=1e-6) and rows[-1]['policy/kl'] > 1e-3 # to the policy without them
    assert rows[0]['policy/ratio_deviation_first'] == 0 < rows[1]['policy/ratio_deviation_first'] # B = 0, then dropout shows
    class Power(Exception): pass
    def cut(step, row, system):
        if step == 3: raise Power
    with pytest.raises(Power): go(tmp_path/'y', cfg, full(), callbacks=[cut])
    again = full(); more = go(tmp_path/'y', cfg, again)
    assert same_weights(system.policy, again.policy) and [r['loss'] for r in rows] == [r['loss'] for r in more]
    for part in ('', 'ema/'):
        a, b = (load_file(tmp_path/d/'checkpoint'/f'{part}adapter_model.safetensors') for d in 'xy')
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    kept = {str(p.relative_to(tmp_path/'x')) for p in (tmp_path/'x').rglob('*') if p.is_file()}
    assert {'checkpoint/adapter_config.json', 'checkpoint/ema/adapter_model.safetensors', 'snapshots/000003/adapter_model.safetensors'} <= kept
    assert not any('policy.safetensors' in k or 'ema.safetensors' in k for k in kept)
    n = sum(p.numel() for p in system.policy.parameters() if p.requires_grad)
    assert 4*n <= (tmp_path/'x'/'checkpoint'/'model.safetensors').stat().st_size < 4*n + 2000 # the base is in no checkpoint


def test_the_reference_is_the_start_and_its_average_follows(tmp_path):
    "KL against a policy without adapters is the KL against a frozen copy; an average of them moves alone"
    cfg = replace(LORA, beta=.1, steps=2)
    rows = go(tmp_path/'x', cfg, full())
    system = full(); add_lora(system.policy, 2, 4, seed=cfg.seed)
    import arpo_nb.training.trainer as trainer
    copied = trainer._frozen_copy(system.policy)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(trainer, 'BasePolicy', lambda policy: copied) # B = 0 in it
        assert [r['policy/kl'] for r in go(tmp_path/'y', cfg, system)] == pytest.approx([r['policy/kl'] for r in rows], rel=1e-5)
    moved = go(tmp_path/'z', replace(cfg, ref_policy='ema', ref_decay=.5), full())
    assert moved[1]['policy/kl'] != rows[1]['policy/kl']
    kept = [load_file(tmp_path/'z'/'checkpoint'/f'{n}.safetensors').keys() for n in ('reference', 'model')]
    assert {f'model.{k}' for k in kept[0]} == {*kept[1]}


def test_begin_at_kept_adapters_and_not_at_what_is_none(tmp_path):
    go(tmp_path/'lora', replace(LORA, keep_every=1, steps=1), full()); go(tmp_path/'whole', replace(CFG, steps=1, keep_every=1), full())
    with pytest.warns(UserWarning, match='moments start at zero'):
        rows = go(tmp_path/'next', replace(LORA, steps=2, resume_from_checkpoint=str(snapshots(tmp_path/'lora')[0])), full())
    assert [r['step'] for r in rows] == [1]
    for cfg, at, why in ((LORA, tmp_path/'whole', 'has whole weights, and this run trains an adapter'), (CFG, tmp_path/'lora', 'has an adapter, and this run trains whole weights')):
        for folder in (at, snapshots(at)[0]):
            with pytest.raises(ValueError, match=why): go(tmp_path/'no', replace(cfg, resume_from_checkpoint=str(folder)), full())
            shutil.rmtree(tmp_path/'no')


def test_adapters_that_come_along_are_trained_and_others_refused(tmp_path):
    mine = full(); add_lora(mine.policy, 3, target='wo')
    go(tmp_path/'x', replace(CFG, steps=1), mine)
    assert len(load_file(tmp_path/'x'/'checkpoint'/'adapter_model.safetensors')) == 2
    with pytest.raises(ValueError, match='has adapters already, of rank 3'): go(tmp_path/'y', LORA, mine)
    with pytest.raises(ValueError, match="lora_target='nowhere'.*Its blocks have w1, w2, w3, wo, wqkv"): go(tmp_path/'z', replace(LORA, lora_target='nowhere'), full())


def test_an_engine_sees_whole_weights():
    policy = spread(add_lora(full().policy.eval(), 2))
    engine, cond = PolicyCopy(policy, 'float32'), torch.tensor([0, 1, 2])
    spread(policy, .3); engine.sync(named_tensors(policy))
    assert engine.copy.state_dict().keys() == full().policy.state_dict().keys()
    assert torch.equal(engine.generate(cond, Streams.range(0, 0, 3)), policy.generate(cond, Streams.range(0, 0, 3)))


def test_handed_on(tmp_path):
    "By checkpoint, snapshot, average, merged file, adapter, hub, and as the base of another; peft reads what we write"
    cfg = replace(preset('toy'), steps=1, batch_size=4, num_generations=2, lora_rank=2, lora_target='wqkv,w2', ema_decay=.5)
    run(cfg, tmp_path/'run', progress=False)
    load = lambda weights: load_system('toy', str(weights), perceptual=False).policy
    base, tuned = load('default'), load(tmp_path/'run')
    moved = {n for (n, a), b in zip(base.named_parameters(), tuned.parameters()) if not torch.equal(a, b)}
    assert moved == {f'layers.{i}.{n}.weight' for i in range(base.cfg.n_layer) for n in ('attention.wqkv', 'feed_forward.w2')}
    assert not same_weights(tuned, load(f"{tmp_path/'run'}#ema"))
    assert same_weights(tuned, load(export(tmp_path/'run', tmp_path/'merged.pt'))) # names and shapes of the official file
    assert same_weights(tuned, load(export(tmp_path/'run', tmp_path/'adapter', layout='adapter')))
    theirs = adapters.import_peft().PeftModel.from_pretrained(load('default'), str(tmp_path/'adapter')).merge_and_unload()
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(theirs.state_dict().values(), tuned.state_dict().values()))
    class Hub:
        def create_repo(self, *a, **kw): pass
        def upload_folder(self, repo_id, folder_path, **kw): shutil.copytree(folder_path, tmp_path/repo_id)
    push(tmp_path/'run', 'me/toy', client=Hub())
    assert same_weights(tuned, load(tmp_path/'me'/'toy')) and '- lora' in (tmp_path/'run'/'README.md').read_text()
    second = replace(cfg, weights=str(tmp_path/'run'))
    run(second, tmp_path/'second', progress=False)
    settings = json.loads((tmp_path/'second'/'checkpoint'/'adapter_config.json').read_text())
    assert settings['base_model_name_or_path'] == str(tmp_path/'run') and not same_weights(tuned, load(tmp_path/'second'))
    push(tmp_path/'second', 'me/second', client=Hub())
    assert str(tmp_path) not in (tmp_path/'me'/'second'/'adapter_config.json').read_text()
    with pytest.raises(ValueError, match="trained on 'run', which is not here"): load(tmp_path/'me'/'second')
    with pytest.raises(ValueError, match='two files; expected a folder'): export(tmp_path/'run', tmp_path/'x.pt', layout='adapter')


def test_the_plan_counts_adapters():
    cfg = replace(preset('toy'), beta=.1, lora_rank=2, mixed_precision='bf16')
    whole, lora = load_shapes('toy'), load_shapes('toy')
    adapters.adapt(lora.policy, cfg)
    c = whole.policy.cfg
    n = c.n_layer*2*((c.dim + 3*c.dim) + 2*c.dim + 3*(c.dim + c.ffn_dim)) # A and B beside wqkv, wo, w1, w3, w2
    policy = sum(p.numel() for p in whole.policy.parameters())
    a, b = (rehearsed(x).phases['optimiser'].kinds for x in (replace(cfg, lora_rank=0), cfg))
    assert (a['parameters'], b['parameters']) == (4*policy, 4*n) and b['gradients'] == 4*n
    # the reference was a copy; now it is the frozen policy itself, which was no frozen network before, and has one set of buffers
    assert a['frozen networks'] - b['frozen networks'] == sum(x.numel()*x.element_size() for x in whole.policy.buffers())
    assert disk_estimate(cfg, lora)['checkpoint'] == 16*n
    plan = make_plan(cfg)
    assert plan.networks['policy'] == network_bytes(whole)['policy'] + 4*n and plan.bounds[0] < plan.peak < plan.bounds[1]
    from arpo_nb.training.objectives import PolicyGradient
    system = full(); add_lora(system.policy, 2)
    assert state_bytes(PolicyGradient(system, LORA), None, dict(policy=system.policy)) == 16*sum(p.numel() for p in system.policy.parameters() if p.requires_grad)


def test_what_adapters_cannot_do(monkeypatch):
    with pytest.raises(ValueError, match="method 'tokenizer' trains the decoder"): Config(method='tokenizer', lora_rank=2)
    monkeypatch.setenv('ACCELERATE_USE_FSDP', 'true')
    from types import SimpleNamespace
    with pytest.raises(ValueError, match='lora_rank=2 under FSDP'): check_layout(SimpleNamespace(distributed_type=None, num_processes=2), LORA)
