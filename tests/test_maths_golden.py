"""Golden cases of the leave-one-out rewards and the entropy coefficient.

Cases are discovered: every `cases.json` below `tests/golden/metrics`, or below each `--golden DIR`.
"""
import json, math
from pathlib import Path

import pytest, torch
from safetensors.torch import load_file

from arpo_nb.entropy import entropy_coef, entropy_schedule, normalized_entropy, token_entropy
from arpo_nb.moments import Reference, loo_rewards, moments_std, state_fid
from arpo_nb.rewards import loo_fid_reward

OTHERS = {'advantage', 'surrogate', 'surrogate_note', 'kl', 'total_loss', 'corruption_kernel', 'brightness'} # kinds other tests cover

def discover(root):
    "(id, folder, case) of every case whose kind belongs here"
    for path in sorted(Path(root).rglob('cases.json')):
        if path.parent.name not in ('loo_fid', 'policy'): continue
        for i, case in enumerate(json.loads(path.read_text())['cases']):
            if case['kind'] in OTHERS: continue
            if case.get('file') and not (path.parent/case['file']).exists(): continue # the large ones are not kept here
            yield f"{path.parent.name}-{case.get('name', i)}", path.parent, case

def pytest_generate_tests(metafunc):
    if 'folder' not in metafunc.fixturenames: return
    roots = metafunc.config.getoption('golden', None) or [Path(__file__).parent/'golden'/'metrics']
    cases = [c for root in roots for c in discover(root)]
    metafunc.parametrize('folder,case', [(f, c) for _, f, c in cases], ids=[i for i, _, _ in cases])

def tensor(x):
    "float64 tensor of a nested list, in which infinities and nan may be strings"
    number = lambda v: [number(u) for u in v] if isinstance(v, list) else float(v)
    return torch.tensor(number(x), dtype=torch.float64)

def close(got, want, tol, what):
    want = want if isinstance(want, torch.Tensor) else tensor(want)
    got = torch.as_tensor(got, dtype=torch.float64)
    assert got.shape == want.shape, f'{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}'
    err = (got - want).abs().max().item()
    assert err <= tol, f'{what}: off by {err:.3g}, allowed {tol:.3g}'

def scaled(want, rel):
    "Absolute tolerance relative to the largest expected reward"
    return rel*max(tensor(want).abs().max().item() if isinstance(want, list) else want.abs().max().item(), 1e-6)

def loo_fid_diag(case, folder):
    t = load_file(folder/case['file'])
    rel = 1e-6 if case['name'] == 'cancellation' else 1e-9
    ref, state, x, eps = (t['mu_ref'], t['sigma_ref']), (t['ema_mu'], t['ema_m2']), t['feats'], case['eps']
    reward, new = loo_rewards(x, ref, state, ema_weight=case['alpha'], eps=eps)
    batch, hat = loo_rewards(x, ref, eps=eps)
    close(reward, t['reward_ema'], scaled(t['reward_ema'], rel), 'EMA reward'); close(batch, t['reward_batch'], scaled(t['reward_batch'], rel), 'batch reward')
    for name, got in dict(mu_hat=hat.mean, m2_hat=hat.second, sigma_hat=moments_std(hat, eps), ema_mu_new=new.mean, ema_m2_new=new.second, sigma_new=moments_std(new, eps)).items():
        if name in t: close(got, t[name], 1e-10*max(1, t[name].abs().max().item()), name)
    for name, m in dict(fid_batch=hat, fid_full=new).items():
        if name in case: close(state_fid(m, ref, eps), case[name], 1e-9*max(1, case[name]), name)
    float32, _ = loo_fid_reward(x, ref, state, ema_weight=case['alpha'], eps=eps)
    assert float32.dtype == torch.float32
    if rel == 1e-9: close(float32, t['reward_ema'], 1e-3*t['reward_ema'].std().item(), 'float32 reward')
    for name, wrong in case.get('wrong_answers_for_diagnosis', {}).items():
        assert not torch.allclose(reward[:len(wrong)], tensor(wrong), rtol=1e-4, atol=0), f'this is {name}'

def loo_fid_diag_inline(case, folder):
    i, e, eps = {k: tensor(v) for k, v in case['inputs'].items()}, case['expected'], case['eps']
    ref = (i['mu_ref'], i['sigma_ref'])
    reward, new = loo_rewards(i['feats'], ref, (i['ema_mu'], i['ema_m2']), ema_weight=case['alpha'], eps=eps)
    batch, hat = loo_rewards(i['feats'], ref, eps=eps)
    got = dict(mu_hat=hat.mean, m2_hat=hat.second, sigma_hat=moments_std(hat, eps), fid_batch=state_fid(hat, ref, eps), reward_batch=batch,
               mu_new=new.mean, m2_new=new.second, sigma_new=moments_std(new, eps), fid_full=state_fid(new, ref, eps), reward_ema=reward)
    for name, want in e.items(): close(got[name], want, scaled(want, 1e-9) if name.startswith('reward') else 1e-9*max(1, tensor(want).abs().max().item()), name)

def first_step_variants(case, folder):
    i, seen = {k: tensor(v) for k, v in case['inputs'].items()}, 0
    names = dict(A='adopt', B='blend', C='zero', D='reference')
    for key, want in case['variants'].items():
        reward, new = loo_rewards(i['feats'], (i['mu_ref'], i['sigma_ref']), ema_weight=case['alpha'], eps=case['eps'], first_step=names[key[0]])
        close(reward, want['reward'], scaled(want['reward'], 1e-9), key)
        close(new.mean, want['state_mu'], 1e-10, key); close(new.second, want['state_m2'], 1e-10, key); seen += 1
    assert seen

def loo_fid_sequence(case, folder):
    t = load_file(folder/case['file'])
    ref, state, first = (t['mu_ref'], t['sigma_ref']), None, {'A': 'adopt', 'B': 'blend', 'C': 'zero', 'D': 'reference'}[case['initial_state'].split()[1]]
    for k, x in enumerate(t['feats']):
        reward, state = loo_rewards(x, ref, state, ema_weight=case['alpha'], eps=case['eps'], first_step=first)
        close(reward, t['reward_ema'][k], scaled(t['reward_ema'][k], 1e-9), f'reward of step {k}')
        close(state.mean, t['ema_mu'][k], 1e-10, 'mean'); close(state.second, t['ema_m2'][k], 1e-10, 'second moment')
        close(state_fid(state, ref, case['eps']), case['fid_full'][k], 1e-9, 'distance')

def loo_fid_distributed(case, folder):
    t = load_file(folder/case['file'])
    ref, state, parts = (t['mu_ref'], t['sigma_ref']), (t['ema_mu'], t['ema_m2']), t['feats'].chunk(case['ranks'])
    run = lambda p, gather: loo_rewards(p, ref, state, ema_weight=case['alpha'], eps=case['eps'], gather=gather)
    ranks = [run(p, lambda _: torch.cat(parts)) for p in parts]
    close(torch.cat([r for r, _ in ranks]), t['reward_gathered'], scaled(t['reward_gathered'], 1e-9), 'gathered')
    for _, s in ranks: close(s.mean, t['ema_mu_new'], 1e-10, 'mean'); close(s.second, t['ema_m2_new'], 1e-10, 'second moment')
    close(torch.cat([run(p, None)[0] for p in parts]), t['reward_local'], scaled(t['reward_local'], 1e-9), 'local')

def loo_fid_full(case, folder):
    t = load_file(folder/case['file'])
    eps, options = case['eps_times_identity'], dict(covariance='full', eps=case['eps_times_identity'])
    tol = (lambda want: 1e-4) if 'rank_deficient' in case['name'] else lambda want: scaled(want, 1e-8)
    ref = Reference(t['mu_ref'], t['cov_ref'].diagonal().sqrt(), t['cov_ref'])
    reward, new = loo_rewards(t['feats'], ref, (t['ema_mu'], t['ema_m2']), ema_weight=case['alpha'], **options)
    batch, hat = loo_rewards(t['feats'], ref, **options)
    close(reward, t['reward_ema'], tol(t['reward_ema']), 'EMA reward'); close(batch, t['reward_batch'], tol(t['reward_batch']), 'batch reward')
    if 'reward_ema_40_digits' in case: close(reward, case['reward_ema_40_digits'], tol(t['reward_ema']), '40 digits')
    close(new.mean, t['ema_mu_new'], 1e-10, 'mean')
    if 'ema_m2_new' in t: close(new.second, t['ema_m2_new'], 1e-10, 'second moment')
    close(new.second.trace(), case['ema_m2_new_trace'], 1e-8, 'trace'); close(new.second.norm(), case['ema_m2_new_frobenius'], 1e-8, 'norm')
    close(state_fid(new, ref, eps), case['fid_full'], max(tol(t['reward_ema']), 1e-8), 'distance'); close(state_fid(hat, ref, eps), case['fid_batch'], max(tol(t['reward_ema']), 1e-8), 'batch distance')

def edge(case, folder):
    assert case['name'] == 'one_sample', 'an edge case nobody has decided'
    with pytest.raises(ValueError, match='N = 1'): loo_rewards(torch.zeros(1, 3), (torch.zeros(3), torch.ones(3)))

def entropy(case, folder):
    if 'uniform_H_hat' in case:
        K = round(math.exp(case['log_16384']))
        both = torch.stack([torch.zeros(K, dtype=torch.float64), torch.full((K,), -math.inf, dtype=torch.float64).index_fill(0, torch.tensor([3]), 0.)])
        return close(normalized_entropy(token_entropy(both), K), [case['uniform_H_hat'], case['one_hot_H_hat']], 1e-10, 'extremes')
    logits, e = tensor(case['logits']).requires_grad_(), case['expected']
    H = token_entropy(logits)
    got = dict(H_t=H, H_bar=H.mean(-1), H_hat=normalized_entropy(H.mean(-1), logits.shape[-1]), batch_mean_H=H.mean())
    got['grad_of_batch_mean'] = torch.autograd.grad(H.mean(), logits)[0]
    assert got['grad_of_batch_mean'].isfinite().all()
    for name, want in e.items(): close(got[name].detach(), want, 1e-10, name)

ENDS = dict(decay_to_c_min=lambda c: c['c_min'], decay_to_zero=lambda c: 0., decay_to_tenth_of_c0=lambda c: c['c0']/10)

def entropy_schedule_(case, folder):
    c = case['constants']
    for name, want in case['expected'].items():
        close([entropy_schedule(p, c['c0'], ENDS[name](c), c['warmup'], c['decay_start']) for p in case['p']], want, 1e-10, name)

def entropy_controller(case, folder):
    assert case['decay'] == 'to c_min'
    for name, want in case['expected'].items():
        inside = {'clamp_everywhere': True, 'no_clamp_inside_deadband': False}[name]
        close([[entropy_coef(p, h, clamp_inside=inside) for h in case['H_hat']] for p in case['p']], want, 1e-10, name)
    facts = case.get('facts', {})
    if 'c_eff_at_H_hat_0_70_on_the_plateau' in facts: close(entropy_coef(.5, .7), facts['c_eff_at_H_hat_0_70_on_the_plateau'], 1e-10, 'c_eff')

KINDS = dict(loo_fid_diag=loo_fid_diag, loo_fid_diag_inline=loo_fid_diag_inline, first_step_variants=first_step_variants, loo_fid_sequence=loo_fid_sequence,
             loo_fid_distributed=loo_fid_distributed, loo_fid_full=loo_fid_full, edge=edge, entropy=entropy, entropy_schedule=entropy_schedule_, entropy_controller=entropy_controller)

def test_case(folder, case): KINDS[case['kind']](case, folder)

def test_cases_are_found():
    found = [c['kind'] for _, _, c in discover(Path(__file__).parent/'golden'/'metrics')]
    assert set(found) == set(KINDS) and len(found) >= 30

@pytest.mark.parametrize('covariance', ['diag', 'full'])
def test_a_shifted_feature_fails(covariance):
    "The comparison notices a wrong number"
    folder = Path(__file__).parent/'golden'/'metrics'/'loo_fid'
    name = 'diag_n12_d8' if covariance == 'diag' else 'full_n12_d8'
    t = load_file(folder/f'{name}.safetensors')
    ref = (t['mu_ref'], t['sigma_ref'] if covariance == 'diag' else t['cov_ref'])
    reward, _ = loo_rewards(t['feats'] + 1e-3*torch.eye(*t['feats'].shape), ref, (t['ema_mu'], t['ema_m2']), covariance=covariance, eps=1e-6 if covariance == 'diag' else 0.)
    with pytest.raises(AssertionError): close(reward, t['reward_ema'], scaled(t['reward_ema'], 1e-8), 'reward')

@pytest.mark.parametrize('covariance', ['diag', 'full'])
def test_state_survives_a_checkpoint(covariance, tmp_path):
    g = torch.Generator().manual_seed(0)
    ref, x = Reference.from_features(torch.randn(50, 4, generator=g)), torch.randn(9, 4, generator=g)
    _, state = loo_fid_reward(x, ref, covariance=covariance)
    torch.save(tuple(state), tmp_path/'state.pt')
    a, _ = loo_fid_reward(x + 1, ref, state, covariance=covariance)
    b, _ = loo_fid_reward(x + 1, ref, torch.load(tmp_path/'state.pt', weights_only=True), covariance=covariance)
    assert torch.equal(a, b)
