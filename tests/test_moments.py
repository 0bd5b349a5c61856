"Leave-one-out rewards against 40 digits and singular values; references and states of every kind"
import inspect

import mpmath as mp
import numpy as np
import pytest, torch
from safetensors.torch import load_file, save_file

from arpo_nb.maths import moments
from arpo_nb.maths.moments import (Moments, Reference, as_reference, batch_moments, geometric_nodes, loo_rewards, moments_std,
                                   root_quadrature, state_fid)
from arpo_nb.rewards import LOOFIDReward, loo_fid_reward

# Full covariance

def features(N, D, spectrum, like_real=True, memory=False, rank=None, seed=0, shift=.1):
    "Features, reference and state (raw moments) whose reference has this spectrum [D]"
    g = torch.Generator().manual_seed(seed)
    randn = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    Q = torch.linalg.qr(randn(D, D))[0]
    cov = (Q*spectrum)@Q.T
    mix = (Q*spectrum.sqrt())@Q.T if like_real else torch.eye(D, dtype=torch.float64)
    mean = .1*randn(D)
    x = .8*randn(N, D) + shift if rank is None else randn(N, rank)@randn(rank, D)/rank**.5
    past = (mean + .7*randn(3*D, D)@mix + shift) if memory else None
    ref = Reference(mean, cov.diagonal().clamp(min=0).sqrt(), (cov + cov.T)/2)
    return mean + x@mix, ref, None if past is None else (past.mean(0), past.T@past/len(past))

def powers(D, condition): return condition**(-torch.arange(D, dtype=torch.float64)/max(D-1, 1))

def by_40_digits(x, ref, old, alpha, eps):
    "Rewards by definition, rows really removed, eigenvalues in 40-digit arithmetic"
    mp.mp.dps, D = 40, x.shape[1]
    lam, U = mp.eigsy(mp.matrix(ref.cov.tolist()))
    F = U*mp.diag([mp.sqrt(max(v, 0)) for v in lam])
    X, mu, I = mp.matrix(x.tolist()), mp.matrix(ref.mean[:, None].tolist()), mp.eye(D)*mp.mpf(eps)
    past = None if old is None else (mp.matrix(old[0][:, None].tolist()), mp.matrix(old[1].tolist()))
    def fid(out=None):
        rows = [X[i, :] for i in range(X.rows) if i != out]
        m, s = mp.zeros(D, 1), mp.zeros(D)
        for r in rows: m, s = m + r.T/len(rows), s + r.T*r/len(rows)
        if past: m, s = ((1 - mp.mpf(alpha))*o + mp.mpf(alpha)*b for o, b in zip(past, (m, s)))
        cov = s - m*m.T + I
        ev = mp.eigsy(F.T*cov*F, eigvals_only=True)
        return sum(v**2 for v in m - mu) + sum(cov[i, i] for i in range(D)) - 2*sum(mp.sqrt(v) for v in ev if v > mp.mpf(10)**-32)
    whole = fid()
    return torch.tensor([float(fid(i) - whole) for i in range(len(x))], dtype=torch.float64)

def by_singular_values(x, ref, old, alpha, eps):
    "Rewards by definition; roots of eigenvalues as singular values of a factor, which float64 knows twice as well"
    factor = torch.zeros(0, x.shape[1], dtype=torch.float64)
    if old is not None:
        lam, V = torch.linalg.eigh(old[1] - torch.outer(old[0], old[0]))
        factor = ((1 - alpha)*lam.clamp(min=0)).sqrt()[:, None]*V.T
    def fid(rows):
        m, d = rows.mean(0), torch.zeros(1, x.shape[1], dtype=torch.float64)
        parts = [factor, (alpha/len(rows))**.5*(rows - m), eps**.5*torch.eye(x.shape[1], dtype=torch.float64)]
        if old is not None: m, d = (1-alpha)*old[0] + alpha*m, (alpha*(1-alpha))**.5*(m - old[0])[None]
        F = torch.cat([*parts, d])
        return (m - ref.mean).square().sum() + F.square().sum() - 2*torch.linalg.svdvals(F@ref.root).sum()
    whole = fid(x)
    return torch.stack([fid(torch.cat([x[:i], x[i+1:]])) - whole for i in range(len(x))])

def off(got, want): return ((got - want).abs().max()/want.std()).item()

SMALL = [(12, 6, 1e2, True, False, None, 1e-6), (12, 6, 1e10, False, False, None, 1e-6), (12, 6, 1e12, True, True, None, 1e-6),
         (12, 6, 1e12, True, False, None, 0.), (9, 6, 1e12, False, True, None, 0.), (5, 8, 1e2, True, False, None, 0.), (5, 8, 1e2, True, False, None, 1e-6),
         (5, 8, 1e12, False, False, None, 0.), (8, 8, 1e4, True, False, None, 0.), (12, 8, 10., True, False, 3, 0.),
         (12, 8, 10., True, True, 3, 1e-6), (2, 3, 10., True, False, None, 1e-6), (2, 3, 10., True, False, None, 0.), (5, 1, 1., True, False, None, 0.)]

@pytest.mark.parametrize('N, D, condition, like_real, memory, rank, eps', SMALL)
def test_full_rewards_to_40_digits(N, D, condition, like_real, memory, rank, eps):
    x, ref, old = features(N, D, powers(D, condition), like_real, memory, rank)
    alpha = .5 if memory else 1.
    got, _ = loo_rewards(x, ref, old, ema_weight=alpha, covariance='full', eps=eps)
    assert off(got, by_40_digits(x, ref, old, alpha, eps)) < 1e-6

@pytest.mark.parametrize('N, D, spectrum, memory, eps', [
    (144, 64, powers(64, 100.), True, 1e-6), (12, 64, powers(64, 100.), False, 1e-6), (12, 64, powers(64, 100.), False, 0.),
    (12, 64, powers(64, 1e12), True, 1e-6), (30, 160, torch.arange(1., 161, dtype=torch.float64)**-1.5, False, 1e-6),
    (30, 160, torch.arange(1., 161, dtype=torch.float64)**-1.5, True, 1e-6)])
def test_full_rewards_by_singular_values(N, D, spectrum, memory, eps):
    x, ref, old = features(N, D, spectrum, memory=memory)
    alpha = .5 if memory else 1.
    got, _ = loo_rewards(x, ref, old, ema_weight=alpha, covariance='full', eps=eps)
    assert off(got, by_singular_values(x, ref, old, alpha, eps)) < 1e-6

def test_singular_values_and_digits_agree():
    x, ref, old = features(6, 8, powers(8, 1e6), memory=True)
    assert off(by_singular_values(x, ref, old, .3, 0.), by_40_digits(x, ref, old, .3, 0.)) < 1e-6

def test_a_far_mean_costs_a_batch_nothing():
    x, ref, _ = features(12, 6, powers(6, 10.))
    moved = Reference(ref.mean + 1e4, ref.std, ref.cov)
    want, _ = loo_rewards(x, ref, covariance='full')
    assert off(loo_rewards(x + 1e4, moved, covariance='full')[0], want) < 1e-6

def test_the_quadrature_checks_itself():
    lam = 10.**torch.linspace(-20, 0, 30, dtype=torch.float64)
    coarse, (s, w) = geometric_nodes(lam[-1], 3.)[0], root_quadrature(lam, spacing=3.)
    assert len(s) > len(coarse) and ((torch.log1p(lam[:, None]/s)@w - lam.sqrt()).abs() < 1e-11).all()
    with pytest.raises(ArithmeticError, match='quadrature'): root_quadrature(lam, spacing=12.)

def test_scale_does_not_matter():
    x, ref, _ = features(8, 5, powers(5, 100.))
    want, _ = loo_rewards(x, ref, covariance='full', eps=0.)
    for c in (1e-30, 1e30):
        small = Reference(ref.mean*c, ref.std*c, ref.cov*c*c)
        assert off(loo_rewards(x*c, small, covariance='full', eps=0.)[0]/c/c, want) < 1e-9

def test_nothing_to_compare(): # a reference without spread: only means and traces are left
    x, ref = torch.randn(6, 3, dtype=torch.float64), Reference(torch.zeros(3), torch.zeros(3), torch.zeros(3, 3))
    fid = lambda r: r.mean(0).square().sum() + (r - r.mean(0)).square().sum()/len(r)
    want = torch.stack([fid(torch.cat([x[:i], x[i+1:]])) - fid(x) for i in range(6)])
    assert torch.allclose(loo_rewards(x, ref, covariance='full')[0], want)

# Features

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('covariance', ['diag', 'full'])
def test_rewards_keep_their_digits(dtype, covariance):
    x = torch.randn(144, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    r, _ = loo_fid_reward(x, Reference.from_features(torch.randn(50, 4)), covariance=covariance)
    assert r.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert len(r.unique()) > 130

def test_arrays_are_features_too():
    x, real = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32), torch.randn(50, 4)
    assert torch.equal(loo_fid_reward(x, real)[0], loo_fid_reward(torch.from_numpy(x), real)[0])

# States

@pytest.mark.parametrize('covariance', ['diag', 'full'])
@pytest.mark.parametrize('first_step', ['adopt', 'blend', 'zero', 'reference'])
def test_states_go_through_files(covariance, first_step, tmp_path):
    x, ref = torch.randn(9, 4), Reference.from_features(torch.randn(50, 4))
    _, state = loo_fid_reward(x, ref, covariance=covariance, first_step=first_step)
    want = loo_fid_reward(x + 1, ref, state, covariance=covariance)[0]
    torch.save(state, tmp_path/'state.pt'), torch.save(tuple(state), tmp_path/'tuple.pt'), torch.save(state._asdict(), tmp_path/'dict.pt')
    save_file(state._asdict(), tmp_path/'state.safetensors')
    back = [torch.load(tmp_path/f'{n}.pt', weights_only=True) for n in ('state', 'tuple', 'dict')]
    assert isinstance(back[0], Moments)
    pair = [t.numpy() for t in state[:2]]
    for s in (*back, load_file(tmp_path/'state.safetensors'), pair):
        assert torch.allclose(loo_fid_reward(x + 1, ref, s, covariance=covariance)[0], want)
        assert torch.allclose(state_fid(s, ref), state_fid(state, ref))

def test_states_of_before(): # checkpoints whose diagonal states ended in None
    x, ref = torch.randn(9, 4), Reference.from_features(torch.randn(50, 4))
    _, state = loo_fid_reward(x, ref)
    assert torch.equal(loo_fid_reward(x, ref, (*state[:3], None))[0], loo_fid_reward(x, ref, state)[0])

@pytest.mark.parametrize('state, says', [('state.pt', 'got str'), ((torch.ones(4),), 'of 1'), (dict(mean=torch.ones(4)), 'raw second moment'),
                                         (dict(mu=torch.ones(4)), "'mu'"), ((torch.ones(4), torch.ones(4).long()), 'int64'),
                                         ((torch.ones(4), torch.full((4,), torch.nan)), 'not finite')])
def test_what_is_no_state(state, says):
    ref = Reference(torch.zeros(4), torch.ones(4))
    for call in (lambda: loo_fid_reward(torch.randn(9, 4), ref, state), lambda: state_fid(state, ref)):
        with pytest.raises(ValueError, match=says): call()

# References

def real_moments(D=4):
    x = np.random.default_rng(1).normal(size=(50, D))
    return x, x.mean(0), np.cov(x, rowvar=False)

def same(a, b): return torch.allclose(a.mean, b.mean) and torch.allclose(a.std, b.std) and torch.allclose(a.cov, b.cov)

def test_references_of_every_kind(tmp_path):
    x, mu, sigma = real_moments()
    want = Reference(torch.tensor(mu), torch.tensor(sigma).diagonal().sqrt(), torch.tensor(sigma))
    np.savez(tmp_path/'fid.npz', mu=mu, sigma=sigma)
    np.savez_compressed(tmp_path/'clean.npz', mu=mu.astype(np.float32), sigma=sigma.astype(np.float32))
    np.savez(tmp_path/'adm.npz', mu=mu, sigma=sigma, mu_s=mu[:2], sigma_s=sigma[:2, :2], arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    np.savez(tmp_path/'ours.npz', mu=mu, sigma=sigma, features=x[:3], network='inception')
    torch.save(dict(mu=mu, sigma=sigma), tmp_path/'fidelity.pt')
    save_file(dict(mu=torch.tensor(mu), sigma=torch.tensor(sigma)), tmp_path/'fid.safetensors')
    for name in ('fid.npz', 'clean.npz', 'adm.npz', 'ours.npz', 'fidelity.pt', 'fid.safetensors'):
        for path in (tmp_path/name, str(tmp_path/name)): assert same(as_reference(path), want), name
    with np.load(tmp_path/'adm.npz') as z: assert same(as_reference(z), want)
    for given in ((mu, sigma), (torch.tensor(mu), sigma), [mu, sigma], dict(mu=mu, sigma=sigma)): assert same(as_reference(given), want)
    assert as_reference(tmp_path/'ours.npz').network == 'inception'
    rows = Reference.from_features(x)
    np.savez(tmp_path/'features.npz', features=x), np.savez(tmp_path/'alone.npz', x), np.save(tmp_path/'x.npy', x), torch.save(torch.tensor(x), tmp_path/'x.pt')
    for given in (x, torch.tensor(x), *(tmp_path/n for n in ('features.npz', 'alone.npz', 'x.npy', 'x.pt'))): assert same(as_reference(given), rows)

def test_torch_files_of_numpy_1(tmp_path): # whose arrays name another module
    import zipfile
    _, mu, sigma = real_moments()
    torch.save(dict(mu=mu, sigma=sigma), tmp_path/'new.pt')
    with zipfile.ZipFile(tmp_path/'new.pt') as new, zipfile.ZipFile(tmp_path/'old.pt', 'w') as old:
        for n in new.namelist(): old.writestr(n, new.read(n).replace(b'numpy._core.multiarray', b'numpy.core.multiarray'))
    assert torch.allclose(as_reference(tmp_path/'old.pt').cov, torch.tensor(sigma))

class Evil:
    def __reduce__(self): return print, ('ran',)

def test_files_that_are_no_reference(tmp_path, capsys):
    x, mu, sigma = real_moments()
    np.savez(tmp_path/'half.npz', mu=mu), np.savez(tmp_path/'spatial.npz', mu_s=mu, sigma_s=sigma), np.savez(tmp_path/'pictures.npz', np.zeros((9, 4, 4, 3), np.uint8))
    np.savez(tmp_path/'swapped.npz', mu=sigma, sigma=mu), (tmp_path/'cut.npz').write_bytes((tmp_path/'half.npz').read_bytes()[:90])
    np.save(tmp_path/'line.npy', mu), torch.save(dict(mu=Evil(), sigma=Evil()), tmp_path/'evil.pt'), np.save(tmp_path/'ids.npy', np.arange(12).reshape(4, 3))
    for name, says in dict(half='holds mu, but no sigma', spatial='holds mu_s, sigma_s, but no mu and no sigma', pictures='holds arr_0, but no mu', swapped='shape', cut='damaged').items():
        with pytest.raises(ValueError, match=says): as_reference(tmp_path/f'{name}.npz')
    for name, says in {'line.npy': 'expected a pair', 'evil.pt': 'damaged', 'ids.npy': 'int64', '': 'a folder'}.items():
        with pytest.raises(ValueError, match=says): as_reference(tmp_path/name)
    with pytest.raises(FileNotFoundError, match='no such file'): as_reference(tmp_path/'none.npz')
    assert 'ran' not in capsys.readouterr().out

EYE = torch.eye(3)
@pytest.mark.parametrize('given, says', [
    ((torch.zeros(3), torch.tensor([[1., .5, 0.], [0., 1., 0.], [0., 0., 1.]])), 'not symmetric'), ((torch.zeros(3), 2 - EYE), 'positive semi-definite'),
    ((torch.zeros(2), EYE), 'shape'), ((torch.zeros(3), torch.ones(3, 2)), 'shape'), ((torch.zeros(3), EYE*torch.nan), 'not finite'), ((torch.zeros(3), -torch.ones(3)), 'negative'),
    ((torch.full((3,), torch.inf), torch.ones(3)), 'not finite'), ((torch.zeros(1, 3), torch.ones(3)), 'shape'), ((torch.zeros(3),)*3, 'pair'), (torch.zeros(2, 3), 'pair'),
    (None, 'NoneType'), (3., 'float'), ((torch.zeros(3), 'std'), 'array of floats'), ({}, 'nothing')])
def test_what_is_no_reference(given, says):
    for covariance in ('diag', 'full'):
        with pytest.raises(ValueError, match=says): loo_fid_reward(torch.randn(6, 3), given, covariance=covariance)
    with pytest.raises(ValueError, match=says): LOOFIDReward(lambda x: x, given)

def test_rounding_is_no_reason_to_refuse(): # a float32 covariance of fewer rows than dimensions
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    r, _ = loo_fid_reward(x[:8], (x.mean(0), torch.cov(x.T)), covariance='full')
    assert r.isfinite().all()

# Once

@pytest.fixture
def count(monkeypatch):
    "Calls of functions of torch.linalg, by name"
    calls = {}
    def watch(name):
        f = getattr(torch.linalg, name)
        def counted(*args, **kwargs):
            calls[name] = calls.get(name, 0) + 1
            return f(*args, **kwargs)
        monkeypatch.setattr(torch.linalg, name, counted)
    for name in ('eigh', 'cholesky_ex'): watch(name)
    return calls

@pytest.mark.parametrize('kind', ['tensors', 'arrays', 'file'])
def test_a_pair_is_checked_and_decomposed_once(kind, count, tmp_path):
    _, mu, sigma = real_moments(5)
    np.savez(tmp_path/'fid.npz', mu=mu, sigma=sigma)
    mean, cov = torch.tensor(mu), torch.tensor(sigma)
    state, given = None, dict(tensors=lambda: (mean, cov), arrays=lambda: (mu, sigma), file=lambda: tmp_path/'fid.npz')[kind]
    loo_fid_reward(torch.randn(6, 5), given(), covariance='full')
    first = dict(count)
    for _ in range(3): _, state = loo_fid_reward(torch.randn(6, 5), given(), state, covariance='full')
    assert count['eigh'] - first['eigh'] == 3 # one for each step's own matrix
    assert count['cholesky_ex'] - first['cholesky_ex'] == 3

def test_a_changed_pair_is_another(tmp_path):
    _, mu, sigma = real_moments()
    mean, cov, x = torch.tensor(mu), torch.tensor(sigma), torch.randn(6, 4)
    before = loo_fid_reward(x, (mean, cov))[0]
    cov *= 4
    assert not torch.allclose(loo_fid_reward(x, (mean, cov))[0], before)
    before = loo_fid_reward(x, (mu, sigma))[0]
    sigma *= 4
    assert not torch.allclose(loo_fid_reward(x, (mu, sigma))[0], before)

def test_a_reference_moves_once():
    ref = Reference.from_features(torch.randn(9, 3))
    assert ref.to('cpu') is ref and ref.to('meta') is ref.to(torch.device('meta'))
    ref = Reference.from_features(torch.randn(9, 3)); ref.root
    assert vars(ref.to('meta'))['root'].is_meta # moved, not made again

# Options

@pytest.mark.parametrize('slip, says', [(dict(eps=-1e-6), 'eps'), (dict(eps=float('nan')), 'eps'), (dict(eps=float('inf')), 'eps'), (dict(first_step='zeros'), 'first_step'),
                                        (dict(ema_weight=0.), 'ema_weight'), (dict(covariance='fulll'), 'covariance')])
def test_slips_are_refused_at_every_step(slip, says):
    x, ref = torch.randn(6, 3), Reference.from_features(torch.randn(9, 3))
    _, state = loo_fid_reward(x, ref)
    for s in (None, state):
        with pytest.raises(ValueError, match=says): loo_fid_reward(x, ref, s, **slip)
    if 'eps' in slip:
        for call in (lambda: state_fid(state, ref, **slip), lambda: moments_std(state, **slip)):
            with pytest.raises(ValueError, match=says): call()

def test_no_number_of_nodes_to_choose():
    functions = [f for n, f in vars(moments).items() if inspect.isfunction(f) and f.__module__ == moments.__name__]
    assert not [f.__name__ for f in functions if 'nodes' in inspect.signature(f).parameters]

def test_batch_moments_check_their_rows():
    with pytest.raises(ValueError, match='not finite'): batch_moments(torch.full((3, 2), torch.nan), Reference(torch.zeros(2), torch.ones(2)))
