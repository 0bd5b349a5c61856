"TRL's names mean what TRL means: its own loss on the same tensors, value and gradient, for every combination a `Config` accepts"
from collections import defaultdict
from dataclasses import fields
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from arpo_nb.config import NOT_HERE, TRL_ONLY, Config, override
from arpo_nb.maths.entropy import stepped_coef, token_entropy
from arpo_nb.maths.enumerable import TablePolicy, all_sequences
from arpo_nb.maths.grpo import LOSS_TYPES, aggregate, grpo_loss, high_entropy_mask
from arpo_nb.protocols import Batch, Rollout, Streams, System
from arpo_nb.training.objectives import PolicyGradient

B, G, T, V = 2, 4, 4, 3
CLIPS = dict(dapo=[{}, dict(epsilon_high=.28), dict(epsilon=.1, epsilon_high=0.), dict(delta=1.3)], cispo=[dict(epsilon_high=1.2), dict(epsilon_high=5.)],
             sapo=[{}, dict(sapo_temperature_pos=.7, sapo_temperature_neg=2.)])
KLS = [{}, dict(beta=.3), dict(beta=.3, use_bias_correction_kl=True)]
COMBINATIONS = [dict(loss_type=kind, importance_sampling_level=level, top_entropy_quantile=q, entropy_coef=.01, **clip, **kl)
                for kind, level, q, kl in product(LOSS_TYPES, ('token', 'sequence'), (0., .35, 1.), KLS) for clip in CLIPS.get(kind, CLIPS['dapo'])]


@pytest.fixture(scope='module')
def trl():
    "TRL's trainer and its configuration; skipped where TRL is not installed"
    pytest.importorskip('trl', minversion='1.16', reason='TRL is not installed (pip install -e ".[dev]")')
    from arpo_nb.weights import import_transformers
    import_transformers()
    from trl.trainer import grpo_config, grpo_trainer
    return SimpleNamespace(Trainer=grpo_trainer.GRPOTrainer, Config=grpo_config.GRPOConfig)


class OneProcess:
    "What TRL's loss asks of accelerate"
    num_processes, sync_gradients = 1, True
    def gather(self, x): return x
    def reduce(self, x, reduction): return x
    def pad_across_processes(self, x, **kw): return x


def trl_loss(trl, logps, entropy, old, ref, advantages, mask=None, **kw):
    "TRL's own `_compute_loss` of [N, T] tensors, with a stand-in for the trainer that holds them"
    kw = dict(use_bias_correction_kl=False) | kw
    args = trl.Config(output_dir='unused', report_to='none', bf16=False, use_cpu=True, num_generations=G, per_device_train_batch_size=B*G, max_completion_length=T, **kw)
    own = ('loss_type', 'importance_sampling_level', 'top_entropy_quantile', 'entropy_coef', 'beta', 'max_completion_length', 'off_policy_mask_threshold', 'use_vllm', 'use_adaptive_entropy')
    me = SimpleNamespace(args=args, **{k: getattr(args, k) for k in own}, accelerator=OneProcess(), model=SimpleNamespace(training=True), aux_loss_enabled=False,
                         epsilon_low=args.epsilon, epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high, # as the trainer's constructor does
                         vllm_importance_sampling_correction=False, current_gradient_accumulation_steps=1, _metrics=defaultdict(lambda: defaultdict(list)),
                         _entropy_bonus_enabled=bool(args.entropy_coef or args.use_adaptive_entropy), _last_world_entropy=kw.pop('last_entropy', float('inf')), _entropy_window_stats=None,
                         _get_per_token_logps_and_entropies=lambda *a, **k: (logps, entropy, None))
    me.get_high_entropy_mask, me.get_gamma_weights = trl.Trainer.get_high_entropy_mask.__get__(me), trl.Trainer.get_gamma_weights
    mask = torch.ones_like(logps) if mask is None else mask
    ids = torch.zeros(len(logps), T, dtype=torch.long)
    inputs = dict(prompt_ids=ids[:, :1], prompt_mask=ids[:, :1], completion_ids=ids, completion_mask=mask, advantages=advantages, old_per_token_logps=old, ref_per_token_logps=ref,
                  num_items_in_batch=mask.sum())
    return trl.Trainer._compute_loss(me, None, inputs), me


def world(per_token_advantages=False):
    "A rollout of a policy that has moved since, far enough for every clip to act, and its tensors as TRL wants them"
    policy, gen = TablePolicy(V, T, seed=1), torch.Generator().manual_seed(2)
    random = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64)
    tokens = all_sequences(V, T)[torch.randint(V**T, (B*G,), generator=gen)]
    batch = Batch(torch.zeros(B*G, dtype=torch.long), Streams.range(0, 0, B*G))
    step = policy.hidden(tokens, batch.cond).log_softmax(-1)
    logps = step.gather(-1, tokens[..., None])[..., 0]
    shape = (B*G, 1, T) if per_token_advantages else (B*G, 1)
    rollout = Rollout(batch, tokens[:, None], (logps.detach() + .4*random(B*G, T))[:, None], tokens[:, None], ref_logps=(logps.detach() + .4*random(B*G, T))[:, None],
                      advantages=random(*shape))
    return policy, rollout, logps, token_entropy(policy.hidden(tokens, batch.cond)).float().double() # TRL compares with a quantile in float32


def ours(policy, rollout, entropy, **kw):
    "Loss of the trainer's objective under a `Config` with these fields"
    cfg = Config(method='grpo', rewards='any', batch_size=B, num_generations=G, **kw)
    objective = PolicyGradient(System('table', policy, torch.nn.Identity()), cfg)
    objective.entropy_coef = cfg.entropy_coef
    if cfg.top_entropy_quantile < 1: rollout = Rollout(**{**vars(rollout), 'entropy_mask': high_entropy_mask(entropy.detach()[:, None], cfg.top_entropy_quantile)})
    return objective(rollout)[0]


@pytest.mark.parametrize('per_token', [False, True])
def test_the_objective_is_trls(trl, per_token):
    seen, some = set(), COMBINATIONS[::7 if per_token else 1]
    for kw in some:
        policy, r, logps, entropy = world(per_token)
        mine, = torch.autograd.grad(loss := ours(policy, r, entropy, **kw), policy.table)
        theirs, _ = trl_loss(trl, logps, entropy, r.old_logps[:, 0], r.ref_logps[:, 0], r.advantages[:, 0], **kw)
        gradient, = torch.autograd.grad(theirs, policy.table)
        torch.testing.assert_close(loss, theirs, rtol=1e-6, atol=1e-9, msg=lambda m: f'{kw}: {m}')
        torch.testing.assert_close(mine, gradient, rtol=1e-6, atol=1e-9, msg=lambda m: f'{kw}: {m}')
        seen.add(round(theirs.item(), 9))
    assert len(seen) > len(some)/4 # the four averages coincide, the rest does not


def test_padded_sequences_are_averaged_as_in_trl(trl):
    _, r, logps, entropy = world()
    lengths = torch.arange(B*G) % T + 1
    mask = (torch.arange(T) < lengths[:, None]).double()
    for kind, level, beta in product(LOSS_TYPES, ('token', 'sequence'), (0., .3)):
        kw = dict(epsilon_high=1.2) if kind == 'cispo' else {}
        a, _ = grpo_loss(logps[:, None], r.old_logps, r.advantages, loss_type=kind, level=level, ref_logps=r.ref_logps, beta=beta, mask=mask[:, None], **kw)
        b, _ = trl_loss(trl, logps, entropy, r.old_logps[:, 0], r.ref_logps[:, 0], r.advantages[:, 0], mask, loss_type=kind, importance_sampling_level=level, beta=beta, **kw)
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(*(torch.autograd.grad(x, logps, retain_graph=True)[0] for x in (a, b)), rtol=1e-10, atol=1e-12)


def test_the_entropy_mask_is_trls(trl):
    me = SimpleNamespace(accelerator=OneProcess())
    for n in (1, 2, 7, 64, 1001):
        h = torch.rand(n, T, generator=torch.Generator().manual_seed(n), dtype=torch.float32)
        for q in (0., .2, .35, .5, .8, .999, 1.):
            theirs = trl.Trainer.get_high_entropy_mask(me, h, torch.ones_like(h), 1 - q)
            mine = high_entropy_mask(h, q)
            assert torch.equal(mine > 0, theirs) and mine.mean().item() == pytest.approx(1)


def test_adaptive_entropy_is_trls_stepper(trl):
    "`stepped_coef` is TRL's controller, one optimiser step after another"
    _, r, logps, entropy = world()
    for factor in (.5, 2.):
        target = factor*entropy.mean().item()
        _, me = trl_loss(trl, logps, entropy, None, None, r.advantages[:, 0], entropy_coef=.01, use_adaptive_entropy=True, entropy_target=target, entropy_coef_delta=.004)
        assert me.entropy_coef == pytest.approx(stepped_coef(.01, entropy.mean().item(), target, .004)[1], abs=1e-12)


def test_what_trl_has_and_we_refuse(trl):
    kinds = dict(luspo=dict(importance_sampling_level='sequence'), vespo={})
    assert set(kinds) == set(NOT_HERE)
    _, r, logps, entropy = world()
    tensors = logps, entropy, r.old_logps[:, 0], r.ref_logps[:, 0], r.advantages[:, 0]
    for kind, kw in kinds.items():
        assert trl_loss(trl, *tensors, loss_type=kind, **kw)[0].isfinite()
        with pytest.raises(ValueError, match=f"'{kind}'.*{NOT_HERE[kind].split(' ')[-1]}"): Config(loss_type=kind)
        with pytest.raises(ValueError, match='choose one of'): aggregate(logps[:, None], kind)
    luspo, grpo = (trl_loss(trl, *tensors, loss_type=k, importance_sampling_level='sequence')[0] for k in ('luspo', 'grpo'))
    torch.testing.assert_close(luspo, T*grpo) # the reason given


def test_every_shared_field_is_accounted_for(trl):
    "A field with TRL's name is one of those compared above, or means the same by itself; TRL's others that invite confusion are refused by name"
    theirs, mine = {f.name for f in fields(trl.Config)}, {f.name for f in fields(Config)}
    compared = {k for kw in COMBINATIONS for k in kw}
    plain = {'optim', 'optim_args', 'seed', 'num_generations', 'num_iterations', 'temperature', 'scale_rewards', 'learning_rate', 'lr_scheduler_type', 'warmup_steps', 'weight_decay', 'adam_beta1', 'adam_beta2',
             'max_grad_norm', 'gradient_checkpointing', 'save_steps', 'entropy_coef_min', 'entropy_coef_max',
             'save_total_limit', 'resume_from_checkpoint', 'metric_for_best_model', 'greater_is_better',
             'vllm_importance_sampling_correction', 'vllm_importance_sampling_mode', 'vllm_importance_sampling_clip_min', 'vllm_importance_sampling_clip_max'}
    assert theirs & mine == compared | plain
    from trl import ModelConfig # where LoRA is asked for
    assert set(TRL_ONLY) <= theirs | {f.name for f in fields(ModelConfig)} and not set(TRL_ONLY) & mine
    for name, reason in TRL_ONLY.items():
        with pytest.raises(ValueError) as e: override(Config(), f'{name}=1')
        assert reason in str(e.value)


def test_scale_rewards_reads_as_trl_reads_it(trl):
    for value in (True, False, 'group', 'batch', 'none'):
        args = trl.Config(output_dir='unused', report_to='none', bf16=False, use_cpu=True, scale_rewards=value)
        assert Config(scale_rewards=value).scale_rewards == args.scale_rewards
