"What test_sharding.py starts: every setting under DDP and under FSDP2 on the CPU, and runs cut short and continued across layouts"
import copy
import json
import os
import shutil
import signal
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser, prepare_multi_gpu_env
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.launcher.api import LaunchConfig, launch_agent

from arpo_nb.config import Config
from arpo_nb.models.llamagen import GPT
from arpo_nb.models.toy import toy_gpt_config
from arpo_nb.systems import load_data, load_reward
from arpo_nb.training.processes import load_once
from arpo_nb.training.sharding import Sharded, shard
from arpo_nb.training.trainer import accelerator, train

ROOT = Path(__file__).parent.parent
BASE = dict(steps=2, batch_size=2, num_generations=2, learning_rate=1e-4, save_steps=100)
VAPI, GRPO = dict(BASE, noise_rate=.5), dict(BASE, method='grpo', rewards='loo_fid')
SETTINGS = dict(vapi=VAPI, ema=dict(GRPO, beta=.5, ref_policy='ema', ref_decay=.5, kl_level='sequence'),
                guided_micro=dict(GRPO, batch_size=4, micro_batch_size=2, rollout_cfg_scale=2., logprob_cfg='guided'),
                mixed_checkpointing=dict(GRPO, method='mixed', gradient_checkpointing=True, mini_batch_size=2, batch_size=4), bf16=dict(VAPI, mixed_precision='bf16'),
                toy_var=dict(GRPO, model='toy_var', rewards='brightness', beta=.1, gradient_checkpointing=True), offload=dict(VAPI, beta=.1, num_iterations=2, ref_offload=True),
                engine=dict(GRPO, model='toy_var', rewards='brightness', sampler='PolicyCopy', sampler_args='dtype=float32', vllm_importance_sampling_correction=True),
                mle=dict(BASE, method='mle'), ste=dict(BASE, method='ste'))
RESUMED = dict(VAPI, num_iterations=2, beta=.5, ref_policy='ema', ref_decay=.5, update_dropout=False)


def pretend_accelerator():
    "accelerate shards on accelerators only: let it keep its plugin on a CPU"
    init = AcceleratorState.__init__
    def patched(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None: self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
    AcceleratorState.__init__ = patched


def environment(file):
    "What accelerate launch tells the processes it starts with one of our configurations"
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(['--config_file', str(ROOT/'accelerate'/file), 'program']))
    return {k: v for k, v in prepare_multi_gpu_env(args).items() if k.startswith(('ACCELERATE_USE', 'FSDP_', 'PARALLELISM_'))}


class Cut:
    "Data that send SIGTERM to their own process with a given batch"
    def __init__(self, data, after): self.data, self.left = data, after
    def __len__(self): return len(self.data)
    def __getattr__(self, name): return getattr(self.data, name)
    def load(self, rows):
        self.left -= 1
        if self.left == 0: signal.raise_signal(signal.SIGTERM)
        return self.data.load(rows)


def run(setting, out, sharded='', cut=0):
    "Metrics of a run in this process group; `sharded` is the kind of its checkpoints, '' for none"
    os.environ.pop('ACCELERATE_USE_FSDP', None)
    if sharded: os.environ |= environment('fsdp2.yaml') | dict(FSDP_STATE_DICT_TYPE=f'{sharded}_STATE_DICT')
    cfg = Config(**setting, num_processes=int(os.environ.get('WORLD_SIZE', 1)))
    system = load_once(cfg, accelerator(cfg), say=lambda _: None)
    data = load_data(cfg, system)
    try: return train(system, Cut(data, cut) if cut else data, cfg, out, reward=load_reward(cfg, system), progress=False)
    except SystemExit: return None
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


def error(*args, **kwargs):
    try: run(*args, **kwargs)
    except Exception as e: return str(e)


def copied(rank):
    "Gradients by a policy in parts that are copied, one part and two copies here: of two micro-batches, less those by hand"
    torch.manual_seed(0)
    whole = GPT(toy_gpt_config()).eval()
    torch.nn.init.normal_(whole.output.weight)
    parts = shard(copy.deepcopy(whole), 'cpu', mesh=init_device_mesh('cpu', (2, 1), mesh_dim_names=('copies', 'parts')))
    objective = Sharded(SimpleNamespace(model=parts), nullcontext)
    tokens = torch.randint(whole.vocab_size, (2, 2, 1, whole.num_tokens))
    def back(policy, x): policy.head(policy.hidden(x, x[:, 0]*0)).logsumexp(-1).mean().backward()
    for i in range(2):
        objective.set_requires_gradient_sync(i == 1)
        back(parts, tokens[rank, i])
    for x in tokens.flatten(0, 1): back(whole, x)
    both = [(p.grad.full_tensor(), q.grad/2) for p, q in zip(parts.parameters(), whole.parameters()) if q.grad is not None]
    return max(float((p - q).abs().max()/q.abs().max()) for p, q in both)


def main(out):
    pretend_accelerator()
    rank, found = int(os.environ['RANK']), {}
    for name, setting in SETTINGS.items():
        for kind, sharded in (('ddp', ''), ('fsdp', 'FULL')): found[f'{name}/{kind}'] = run(setting, out/f'{name}_{kind}', sharded)
    copies = dict(sharded=('fsdp', 'ddp', 'one'), full=('fsdp', 'one'), ddp=('fsdp',))
    for start, goals in copies.items():
        run(RESUMED, out/start, '' if start == 'ddp' else start.upper(), cut=1)
        for goal in goals:
            if rank == 0: shutil.copytree(out/start, out/f'{start}_{goal}')
            torch.distributed.barrier()
            if goal != 'one': found[f'{start}_{goal}'] = run(RESUMED, out/f'{start}_{goal}', 'SHARDED' if goal == 'fsdp' else '')
    found['copies'] = copied(rank)
    found['tokenizer'] = error(dict(BASE, method='tokenizer'), out/'tokenizer', 'FULL')
    found['seeds'] = error(dict(VAPI, seed=rank), out/'seeds', 'FULL')
    (out/f'found{rank}.json').write_text(json.dumps(found))


def process(out):
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    main(Path(out))
    torch.distributed.destroy_process_group()


def agent(out, endpoint):
    "torchrun on one of two machines, whose process is a fork of it"
    config = LaunchConfig(min_nodes=2, max_nodes=2, nproc_per_node=1, run_id='test', rdzv_backend='c10d', rdzv_endpoint=endpoint,
                          local_addr='127.0.0.1', start_method='fork', max_restarts=0)
    launch_agent(config, process, [out])
