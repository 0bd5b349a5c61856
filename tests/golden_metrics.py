"Checkers of the maths: leave-one-out Fréchet rewards, advantages, clipped losses, KL, entropy, token corruption, brightness"
import math

import pytest, torch

from arpo_nb.maths.entropy import C_MAX, entropy_coef, entropy_schedule, normalized_entropy, token_entropy
from arpo_nb.maths.grpo import clipped_objective, group_advantages, grpo_loss, k3_kl, log_ratio
from arpo_nb.maths.moments import Reference, loo_rewards, moments_std, state_fid
from arpo_nb.maths.noisy_context import corrupt_tokens
from arpo_nb.rewards import WeightedSum, brightness_reward, loo_fid_reward, luminance
from golden_cases import checks, close

TOL = 1e-10 # of float64 numbers of order 1
FIRST_STEP = dict(A='adopt', B='blend', C='zero', D='reference')

def tensor(x):
    "float64 tensor of a nested list, in which infinities and nan may be strings"
    number = lambda v: [number(u) for u in v] if isinstance(v, list) else float(v)
    return torch.tensor(number(x), dtype=torch.float64)

def tensors(d): return {k: tensor(v) for k, v in d.items()}

def near(got, want, name, tol=TOL):
    "`close` of numbers, lists or tensors, in float64"
    close(torch.as_tensor(got, dtype=torch.float64), want if isinstance(want, torch.Tensor) else tensor(want), tol, name)

def relative(want, tol, least=1.):
    "Tolerance relative to the largest expected number, if that is above `least`"
    return tol*max(torch.as_tensor(want).abs().max().item(), least)

def near_rewards(got, want, name, tol=1e-9): near(got, want, name, relative(want, tol, 1e-6))

def moments(hat, new, eps, mean, second):
    "By the cases' names, the moments of the batch and of the average, whose first two are called `mean` and `second`"
    return {'mu_hat': hat.mean, 'm2_hat': hat.second, 'sigma_hat': moments_std(hat, eps),
            mean: new.mean, second: new.second, 'sigma_new': moments_std(new, eps)}

# Leave-one-out rewards

@checks('loo_fid_diag')
def loo_fid_diag(case):
    t, eps, alpha = case.tensors, case.data['eps'], case.data['alpha']
    tol = 1e-6 if case.data['name'] == 'cancellation' else 1e-9
    ref, state, x = (t['mu_ref'], t['sigma_ref']), (t['ema_mu'], t['ema_m2']), t['feats']
    reward, new = loo_rewards(x, ref, state, ema_weight=alpha, eps=eps)
    batch, hat = loo_rewards(x, ref, eps=eps)
    near_rewards(reward, t['reward_ema'], 'reward_ema', tol)
    near_rewards(batch, t['reward_batch'], 'reward_batch', tol)
    for name, got in moments(hat, new, eps, 'ema_mu_new', 'ema_m2_new').items():
        if name in t: near(got, t[name], name, relative(t[name], 1e-10))
    for name, m in dict(fid_batch=hat, fid_full=new).items():
        if name in case.data: near(state_fid(m, ref, eps), case.data[name], name, relative(case.data[name], 1e-9))
    float32, _ = loo_fid_reward(x, ref, state, ema_weight=alpha, eps=eps)
    assert float32.dtype == torch.float32
    if tol == 1e-9: near(float32, t['reward_ema'], 'reward_ema in float32', 1e-3*t['reward_ema'].std().item())
    for name, wrong in case.data.get('wrong_answers_for_diagnosis', {}).items():
        assert not torch.allclose(reward[:len(wrong)], tensor(wrong), rtol=1e-4, atol=0), f'this is {name}'

@checks('loo_fid_diag_inline')
def loo_fid_diag_inline(case):
    i, want, eps = tensors(case.data['inputs']), tensors(case.data['expected']), case.data['eps']
    ref = i['mu_ref'], i['sigma_ref']
    reward, new = loo_rewards(i['feats'], ref, (i['ema_mu'], i['ema_m2']), ema_weight=case.data['alpha'], eps=eps)
    batch, hat = loo_rewards(i['feats'], ref, eps=eps)
    got = dict(moments(hat, new, eps, 'mu_new', 'm2_new'), reward_ema=reward, reward_batch=batch,
               fid_batch=state_fid(hat, ref, eps), fid_full=state_fid(new, ref, eps))
    for name, w in want.items(): near(got[name], w, name, relative(w, 1e-9, 1e-6 if name.startswith('reward') else 1.))

@checks('first_step_variants')
def first_step_variants(case):
    i = tensors(case.data['inputs'])
    for key, want in case.data['variants'].items():
        reward, new = loo_rewards(i['feats'], (i['mu_ref'], i['sigma_ref']), ema_weight=case.data['alpha'], eps=case.data['eps'],
                                  first_step=FIRST_STEP[key[0]])
        near_rewards(reward, tensor(want['reward']), f'{key} reward')
        near(new.mean, want['state_mu'], f'{key} state_mu')
        near(new.second, want['state_m2'], f'{key} state_m2')

@checks('loo_fid_sequence')
def loo_fid_sequence(case):
    t, eps = case.tensors, case.data['eps']
    ref, state, first = (t['mu_ref'], t['sigma_ref']), None, FIRST_STEP[case.data['initial_state'].split()[1]]
    for k, x in enumerate(t['feats']):
        reward, state = loo_rewards(x, ref, state, ema_weight=case.data['alpha'], eps=eps, first_step=first)
        near_rewards(reward, t['reward_ema'][k], f'reward_ema of step {k}')
        near(state.mean, t['ema_mu'][k], f'ema_mu of step {k}')
        near(state.second, t['ema_m2'][k], f'ema_m2 of step {k}')
        near(state_fid(state, ref, eps), case.data['fid_full'][k], f'fid_full of step {k}', 1e-9)

@checks('loo_fid_distributed')
def loo_fid_distributed(case):
    t = case.tensors
    ref, state, parts = (t['mu_ref'], t['sigma_ref']), (t['ema_mu'], t['ema_m2']), t['feats'].chunk(case.data['ranks'])
    def run(part, gather): return loo_rewards(part, ref, state, ema_weight=case.data['alpha'], eps=case.data['eps'], gather=gather)
    ranks = [run(p, lambda _: torch.cat(parts)) for p in parts]
    near_rewards(torch.cat([r for r, _ in ranks]), t['reward_gathered'], 'reward_gathered')
    for _, s in ranks:
        near(s.mean, t['ema_mu_new'], 'ema_mu_new')
        near(s.second, t['ema_m2_new'], 'ema_m2_new')
    near_rewards(torch.cat([run(p, None)[0] for p in parts]), t['reward_local'], 'reward_local')

@checks('loo_fid_full')
def loo_fid_full(case):
    t, d, eps = case.tensors, case.data, case.data['eps_times_identity']
    tol = 1e-4 if 'rank_deficient' in d['name'] else relative(t['reward_ema'], 1e-8, 1e-6)
    batch_tol = 1e-4 if 'rank_deficient' in d['name'] else relative(t['reward_batch'], 1e-8, 1e-6)
    ref = Reference(t['mu_ref'], t['cov_ref'].diagonal().sqrt(), t['cov_ref'])
    reward, new = loo_rewards(t['feats'], ref, (t['ema_mu'], t['ema_m2']), ema_weight=d['alpha'], covariance='full', eps=eps)
    batch, hat = loo_rewards(t['feats'], ref, covariance='full', eps=eps)
    near(reward, t['reward_ema'], 'reward_ema', tol)
    near(batch, t['reward_batch'], 'reward_batch', batch_tol)
    for name, got in dict(reward_ema_40_digits=reward, fid_full_40_digits=state_fid(new, ref, eps)).items():
        if name in d: near(got, d[name], name, tol)
    near(new.mean, t['ema_mu_new'], 'ema_mu_new')
    if 'ema_m2_new' in t: near(new.second, t['ema_m2_new'], 'ema_m2_new')
    near(new.second.trace(), d['ema_m2_new_trace'], 'ema_m2_new_trace', 1e-8)
    near(new.second.norm(), d['ema_m2_new_frobenius'], 'ema_m2_new_frobenius', 1e-8)
    near(state_fid(new, ref, eps), d['fid_full'], 'fid_full', max(tol, 1e-8))
    near(state_fid(hat, ref, eps), d['fid_batch'], 'fid_batch', max(tol, 1e-8))

@checks('edge')
def edge(case):
    assert case.data['name'] == 'one_sample', 'an edge case nobody has decided'
    with pytest.raises(ValueError, match='N = 1'): loo_rewards(torch.zeros(1, 3), (torch.zeros(3), torch.ones(3)))

# Advantages and losses

ADVANTAGES = dict(population_std_eps1e4=dict(unbiased=False, eps=1e-4), population_std_no_eps=dict(unbiased=False, eps=0.),
                  sample_std_no_eps=dict(unbiased=True, eps=0.), sample_std_eps1e8=dict(unbiased=True, eps=1e-8))

def check_sum(case, rewards):
    "The composite reward is summed first and normalised once"
    names = 'clip_reward', 'hps_reward', 'dist_reward'
    terms = {k: tensor(case.data[k]) for k in names}
    total, _ = WeightedSum({k: ((lambda images, batch, state, r=r: (r, state)), 1.) for k, r in terms.items()})(None, None)
    near(total, rewards, 'rewards')
    apart = sum(group_advantages(r, **ADVANTAGES['population_std_eps1e4']) for r in terms.values())
    near(apart, case.data['if_each_term_were_normalised_separately'], 'if_each_term_were_normalised_separately')

@checks('advantage')
def advantage(case):
    "Where the formula is 0/0 the cases say nan and the library, for lack of a signal, exactly 0"
    rewards = tensor(case.data['rewards'])
    if 'dist_reward' in case.data: check_sum(case, rewards)
    for name, want in case.data['expected'].items():
        over, _, rest = name.partition('population' if 'population' in name else 'sample')
        kind = name.removeprefix(over).removesuffix('_clipped')
        options = dict(ADVANTAGES[kind], clip=case.data['clip'] if name.endswith('_clipped') else 0.)
        groups = {'group_': rewards, 'whole_batch_': rewards.view(1, -1)}[over] # the whole batch is one large group
        near(group_advantages(groups, **options).view_as(rewards), tensor(want).nan_to_num(0.), name)

LEVELS = dict(token_mean='sequence', product='product', per_token='token')

def surrogate_loss(reading, logps, old, advantages, epsilon, level):
    "Loss and statistics of Eq. 2, or of line 25 as printed: the larger objective, which is minus the smaller one of −A"
    if reading == 'eq2_pessimistic': return grpo_loss(logps, old, advantages, epsilon=epsilon, level=level)
    assert reading == 'algorithm1_line25_literal', f'unknown reading {reading!r}'
    return clipped_objective(log_ratio(logps, old, level), -advantages, epsilon).mean(), {}

@checks('surrogate')
def surrogate(case):
    i, eps = case.tensors or tensors(case.data['inputs']), case.data['clip_eps']
    logps, old, advantages = (i[k][None] for k in ('logp_new', 'logp_old', 'advantage')) # one group
    logps.requires_grad_()
    for key, want in case.data['expected'].items():
        name, reading = key.split('/')
        loss, stats = surrogate_loss(reading, logps, old, advantages, eps, LEVELS[name])
        grad, = torch.autograd.grad(loss, logps)
        ratio = log_ratio(logps.detach(), old, LEVELS[name]).exp()[0]
        if name != 'per_token': ratio = ratio[:, 0]
        dead = (grad == 0).double().mean()
        near(loss.detach(), want['loss'], f'{key} loss')
        near(grad[0], want['grad_logp'] if 'grad_logp' in want else i[f'{name}.{reading}.grad_logp'], f'{key} gradient')
        near(ratio, want['ratio'] if 'ratio' in want else i[f'{name}.ratio'], f'{key} ratio')
        near(((ratio - 1).abs() > eps).double().mean(), want['clip_fraction_outside_band'], f'{key} fraction outside')
        near(dead, want['zero_gradient_fraction'], f'{key} fraction without gradient')
        if stats: near(stats['policy/clip_frac'], dead, f'{key} policy/clip_frac', 1e-6)

@checks('surrogate_note')
def surrogate_note(case):
    "A product of ratios beyond float32 must leave the loss and its gradient finite"
    assert case.data['name'] == 'product_overflow', 'a note nobody has read'
    T = case.data['T']
    for step, total, mean in zip(*(case.data[k] for k in ('per_token_log_ratio', 'sum_log_ratio', 'token_mean_ratio')), strict=True):
        logps, old = torch.full((1, 1, T), step, dtype=torch.float64), torch.zeros(1, 1, T, dtype=torch.float64)
        near(log_ratio(logps, old, 'product').item(), total, 'sum_log_ratio')
        near(log_ratio(logps, old, 'sequence').exp().item(), mean, 'token_mean_ratio')
        for sign in (1., -1.):
            now = logps.float().requires_grad_()
            loss, _ = grpo_loss(now, old.float(), torch.tensor([[sign]]), level='product')
            grad, = torch.autograd.grad(loss, now)
            assert loss.isfinite() and grad.isfinite().all(), f'log-ratio {total:.4g}, advantage {sign:+g}: loss {loss:.3g}, gradient {grad.flatten()[0]:.3g}'

@checks('kl')
def kl(case):
    {'k3': k3, 'k3_is_unbiased_for_one_token': k3_unbiased}[case.data['name']](case)

def k3(case):
    i, total = tensors(case.data['inputs']), lambda x: x.sum(-1)
    over = dict(token_mean=lambda x: x.mean(-1), sequence_sum=total, per_token=lambda x: x)
    now, ref = i['logp_cur'].requires_grad_(), i['logp_ref']
    for name, want in case.data['expected'].items():
        items = k3_kl(over[name](now), over[name](ref))
        grad, = torch.autograd.grad(items.mean(), now)
        near(items.detach(), want['per_item'], f'{name} per_item')
        near(items.mean().detach(), want['value'], f'{name} value')
        near(grad, want['grad_logp'], f'{name} grad_logp')
        same = k3_kl(over[name](now), over[name](now.detach()))
        assert not same.any() and not torch.autograd.grad(same.sum(), now)[0].any(), f'{name}: not zero at the first epoch'
    near(k3_kl(ref.mean(-1), now.detach().mean(-1)).mean(), case.data['wrong_sign_token_mean'], 'wrong_sign_token_mean')
    loss, stats = grpo_loss(now[None], now[None].detach(), now.new_zeros(1, len(now)), ref_logps=ref[None], beta=2.)
    near(loss.detach(), 2*case.data['expected']['per_token']['value'], 'grpo_loss')
    near(stats['policy/kl'], case.data['expected']['per_token']['value'], 'policy/kl')

def k3_unbiased(case):
    p, q = tensor(case.data['p_theta']), tensor(case.data['p_ref'])
    near((p*k3_kl(p.log(), q.log())).sum(), case.data['expectation_of_k3_under_theta'], 'expectation_of_k3_under_theta')
    near((p*k3_kl(p.log(), q.log())).sum(), case.data['exact_kl_theta_ref'], 'exact_kl_theta_ref')
    near((p*log_ratio(p.log(), q.log())).sum(), case.data['expectation_of_k1_under_theta'], 'expectation_of_k1_under_theta')
    near((p*k3_kl(q.log(), p.log())).sum(), case.data['expectation_if_sign_were_reversed'], 'expectation_if_sign_were_reversed')

@checks('total_loss')
def total_loss(case):
    i, d, want = tensors(case.data['inputs']), case.data['inputs'], case.data['expected']
    logps, old, ref = (i[k][None] for k in ('logp_new', 'logp_old', 'logp_ref'))
    advantages = group_advantages(i['rewards'][None], unbiased=False, eps=1e-4)
    loss, _ = grpo_loss(logps, old, advantages, epsilon=d['clip_eps'], level='sequence')
    penalty = k3_kl(logps.mean(-1), ref.mean(-1)).mean() # the k3 of the mean log-ratio, as in Algorithm 1
    entropy = i['mean_entropy_per_sample_nats'].mean()
    share = normalized_entropy(entropy, d['vocab'])
    coef = entropy_coef(d['p'], share.item())
    got = dict(advantage=advantages[0], loss_grpo=loss, kl=penalty, H_hat=share, c_eff=coef, total=loss + d['beta']*penalty - coef*entropy)
    for name, w in want.items(): near(got[name], w, name)

# Entropy and its coefficient

@checks('entropy')
def entropy(case):
    if case.data['name'] == 'entropy_extremes': return entropy_extremes(case)
    logits, want = tensor(case.data['logits']).requires_grad_(), case.data['expected']
    H = token_entropy(logits)
    got = dict(H_t=H, H_bar=H.mean(-1), H_hat=normalized_entropy(H.mean(-1), logits.shape[-1]), batch_mean_H=H.mean())
    got['grad_of_batch_mean'], = torch.autograd.grad(H.mean(), logits)
    assert got['grad_of_batch_mean'].isfinite().all()
    for name, w in want.items(): near(got[name].detach(), w, name)

def entropy_extremes(case):
    K = round(math.exp(case.data['log_16384']))
    uniform, one_hot = torch.zeros(K, dtype=torch.float64), torch.full((K,), -math.inf, dtype=torch.float64).index_fill(0, torch.tensor([3]), 0.)
    for name, logits in dict(uniform_H_hat=uniform, one_hot_H_hat=one_hot).items():
        near(normalized_entropy(token_entropy(logits), K), case.data[name], name)

@checks('entropy_schedule')
def schedule(case):
    c = case.data['constants']
    end = dict(decay_to_c_min=c['c_min'], decay_to_zero=0., decay_to_tenth_of_c0=c['c0']/10)
    for name, want in case.data['expected'].items():
        near([entropy_schedule(p, c['c0'], end[name], c['warmup'], c['decay_start']) for p in case.data['p']], want, name)

@checks('entropy_controller')
def controller(case):
    assert case.data['decay'] == 'to c_min'
    for name, want in case.data['expected'].items():
        inside = dict(clamp_everywhere=True, no_clamp_inside_deadband=False)[name]
        near([[entropy_coef(p, h, clamp_inside=inside) for h in case.data['H_hat']] for p in case.data['p']], want, name)
    facts = case.data['facts'] # of the plateau
    near(entropy_coef(.5, .7), facts['c_eff_at_H_hat_0_70_on_the_plateau'], 'c_eff at 0.70')
    near(entropy_coef(.5, facts['H_hat_at_which_c_max_is_reached_on_the_plateau']), C_MAX, 'c_eff where c_max is reached')
    near(entropy_coef(.5, .765 - 1e-12)/entropy_coef(.5, .765 + 1e-12), facts['jump_factor_at_the_deadband_edge'], 'jump at the deadband')

# Token corruption

def corrupt(tokens, noise_rate, K, seed=0, **kw):
    return corrupt_tokens(tokens, noise_rate, K, torch.rand(*tokens.shape, 2, generator=torch.Generator().manual_seed(seed)), **kw)

def transition_matrix(K, noise_rate, n=10, **kw):
    "Exact transition probabilities, by an even grid over the uniform numbers; right when `n` times the rate is whole"
    grid = lambda n: (torch.arange(n, dtype=torch.float64) + .5)/n
    u = torch.cartesian_prod(grid(n), grid(K*(K-1))) # [n·K·(K-1), 2]
    rows = [corrupt_tokens(torch.full((1, len(u)), k), noise_rate, K, u[None], **kw).flatten().bincount(minlength=K) for k in range(K)]
    return torch.stack(rows).double()/len(u)

def check_counts(c):
    "How many tokens change, against six standard deviations; and that drawing from all K codes would change too few"
    K, shape = c['K'], (c['batch'], c['sequence_length'])
    tokens = torch.randint(K, shape, generator=torch.Generator().manual_seed(1))
    clean, noisy = tokens.clone(), corrupt(tokens, c['xi'], K)
    low, high = c['six_sigma_interval_changed_count']
    assert torch.equal(tokens, clean), 'the targets must stay clean'
    assert noisy.min() >= 0 and noisy.max() < K
    changed = (noisy != tokens).double()
    assert low <= changed.sum() <= high, f'K={K}, ξ={c["xi"]}: {changed.sum():.0f} tokens changed, expected {low} to {high}'
    pairs = changed[:, 1:]*changed[:, :-1]
    assert abs(pairs.mean() - c['xi']**2) <= 6*(3*c['xi']**2*(1 - c['xi']**2)/pairs.numel())**.5, 'neighbours change together'
    if c['distinguishable']: assert not low <= (corrupt(tokens, c['xi'], K, kernel='all') != tokens).sum() <= high

def check_uniform(K, limit):
    "Changed tokens are uniform over the other K-1 codes: chi-square of every source code"
    for k in range(K):
        counts = corrupt(torch.full((64, 256), k), 1., K, seed=k).flatten().bincount(minlength=K).double()
        assert counts[k] == 0
        counts, expected = counts[torch.arange(K) != k], 64*256/(K-1)
        assert ((counts - expected)**2/expected).sum() < limit, f'K={K}: the replacements of {k} are not uniform'

@checks('corruption_kernel')
def corruption_kernel(case):
    for c in case.data['cases']:
        check_counts(c)
        if c['K'] > 16: continue # the matrix would be large
        matrix, other = transition_matrix(c['K'], c['xi'], n=20), 1 - torch.eye(c['K'], dtype=torch.float64)
        near(matrix, c['probability_keep']*(1 - other) + c['probability_each_other_token']*other, f'transition matrix of K={c["K"]}')
        drawn = transition_matrix(c['K'], c['xi'], n=20, kernel='all')
        near((drawn*other).sum(-1).mean(), c['changed_fraction_if_replacement_could_equal_original'], 'changed fraction of the other kernel')
    matrix = transition_matrix(5, .4)
    near(matrix, case.data['transition_matrix_K5_xi0_4'], 'transition_matrix_K5_xi0_4')
    near(token_entropy(matrix.log()), [case.data['entropy_of_one_row_nats']]*5, 'entropy_of_one_row_nats')
    limits = case.data['replacement_chi_square_999']
    check_uniform(4, limits['K4_df2'])
    check_uniform(16, limits['K16_df14'])

# Brightness

@checks('brightness')
def brightness(case):
    if case.data['name'] == 'channels': return brightness_of_channels(case)
    want = case.data['expected']
    if 'grey' in case.data: images = tensor(case.data['grey'])[:, None, None, None].expand(-1, 3, 4, 4)
    else: images = tensor(case.data['images'])
    if case.data['name'] == 'signed_range': images = (images + 1)/2
    got = dict(brightness=luminance(images), bright_reward=brightness_reward(images), dark_reward=brightness_reward(images, .2, bright=False))
    for name, w in want.items(): near(got[name], w, name)

def brightness_of_channels(case):
    colours = dict(pure_red=[1, 0, 0], pure_green=[0, 1, 0], pure_blue=[0, 0, 1], white=[1, 1, 1], black=[0, 0, 0])
    for name, rgb in colours.items():
        near(luminance(tensor(rgb)[:, None, None].expand(3, 4, 4)), case.data[name], name)
