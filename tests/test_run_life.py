"The life of a run: killed, out of numbers, out of disk, damaged, started twice, on several processes."
import json
import os
import signal
import socket
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from doors import ENV, Started, begin_script
from safetensors.torch import load_file

import arpo_nb.training.launch as launching
import arpo_nb.training.saving as saving
from arpo_nb.config import Config, preset, to_json
from arpo_nb.data.images import ArrayData
from arpo_nb.models.llamagen import GPT, GPTConfig
from arpo_nb.models.tokenizers import VQConfig, VQModel
from arpo_nb.protocols import System
from arpo_nb.training.launch import launch, run
from arpo_nb.training.run_folder import claim_folder, read_rows
from arpo_nb.training.saving import Damaged, find_checkpoint, read_run
from arpo_nb.training.trainer import Stopped, StopSignal, train

CFG = Config(model='tiny', steps=6, batch_size=4, num_generations=2, learning_rate=1e-2, save_steps=2, perceptual_coef=0.)
FREE = replace(CFG, method='grpo', rewards='bright')
DATA = ArrayData(torch.randint(256, (12, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3)


class TiedGPT(GPT):
    "Its head is its embedding"
    def __init__(self, cfg):
        super().__init__(cfg)
        self.output.weight = self.tok_embeddings.weight


def tiny(gpt=GPT):
    torch.manual_seed(0)
    policy = gpt(GPTConfig(dim=32, n_layer=1, n_head=2, vocab_size=16, block_size=16, num_classes=3, multiple_of=32))
    return System('tiny', policy, VQModel(VQConfig(ch=8, encoder_ch_mult=(1, 2), decoder_ch_mult=(1, 2), num_res_blocks=1, z_channels=8,
                  codebook_size=16, codebook_embed_dim=4, num_groups=4, image_size=8, usage_window=16)), num_classes=3)


class Bright:
    "A reward that goes wrong at a call, and counts calls in its state"
    def __init__(self, at=None, state=None, error=None): self.at, self.state, self.error, self.calls = at, state, error, 0

    def __call__(self, images, batch, state=None):
        count = 0 if state is None else state['count']
        if count == self.at and self.error: raise self.error
        new = dict(count=count + 1) if count != self.at else self.state
        return images.mean((-3, -2, -1)), new


def go(out, cfg=CFG, system=None, **kw): return train(system or tiny(), DATA, cfg, out, progress=False, **kw)


def files(folder): return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def same_weights(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# --- nothing replaces the last good checkpoint

def test_numbers_that_run_away_leave_the_last_good_checkpoint(tmp_path):
    cfg = replace(CFG, method='mle', steps=40, learning_rate=1e12, max_grad_norm=0., save_steps=1)
    with pytest.raises(FloatingPointError, match='an earlier whole state|nothing was saved'): go(tmp_path/'x', cfg)
    folder = find_checkpoint(tmp_path/'x', verify=True)
    assert all(w.isfinite().all() for w in load_file(folder/'model.safetensors').values())
    assert all(v - v == 0 for r in read_rows(tmp_path/'x'/'metrics.jsonl') for v in r.values())


def test_a_gradient_without_a_norm_moves_nothing(tmp_path, monkeypatch):
    import arpo_nb.training.trainer as trainer
    system, calls = tiny(), []
    def poisoned(acc, objective, opt, rollouts, cfg, seen):
        calls.append(1)
        if len(calls) == 4: next(objective.parameters()).register_hook(lambda g: g*float('nan'))
        return update(acc, objective, opt, rollouts, cfg, seen)
    update = trainer.update
    monkeypatch.setattr(trainer, 'update', poisoned)
    with pytest.raises(FloatingPointError, match="step 3: the gradient's norm is nan"): go(tmp_path, system=system)
    assert all(p.isfinite().all() for p in system.policy.parameters())
    assert read_run(find_checkpoint(tmp_path, verify=True))['step'] == 2 and len(read_rows(tmp_path/'metrics.jsonl')) == 3


def test_an_error_in_the_second_update_saves_nothing(tmp_path, monkeypatch):
    cfg, seen = replace(CFG, mini_batch_size=2), []
    step = torch.optim.AdamW.step
    def short_of_memory(self, *a, **kw):
        seen.append(1)
        if len(seen) == 8: raise RuntimeError('CUDA out of memory') # the second update of step 3
        return step(self, *a, **kw)
    monkeypatch.setattr(torch.optim.AdamW, 'step', short_of_memory)
    with pytest.raises(RuntimeError, match='step 3: CUDA out of memory; .*an earlier whole state'): go(tmp_path/'x', cfg)
    assert read_run(find_checkpoint(tmp_path/'x', verify=True))['step'] == 2
    monkeypatch.undo()
    a, b = tiny(), tiny()
    go(tmp_path/'x', cfg, a); go(tmp_path/'y', cfg, b)
    assert same_weights(a.policy, b.policy)


def test_an_error_before_any_update_keeps_the_steps_made(tmp_path):
    reward = Bright(at=3, error=RuntimeError('no answer'))
    with pytest.raises(RuntimeError, match='step 3: no answer; .*holds the state before it'): go(tmp_path/'x', FREE, reward=reward)
    assert read_run(find_checkpoint(tmp_path/'x', verify=True))['step'] == 3
    a, b = tiny(), tiny()
    go(tmp_path/'x', FREE, a, reward=Bright()); go(tmp_path/'y', FREE, b, reward=Bright())
    assert same_weights(a.policy, b.policy)


def test_a_reward_state_that_is_not_finite_is_never_saved(tmp_path):
    with pytest.raises(FloatingPointError, match="the reward's state.mu is not finite"):
        go(tmp_path/'x', FREE, reward=Bright(at=3, state=dict(mu=torch.tensor(float('nan')))))
    assert read_run(find_checkpoint(tmp_path/'x', verify=True))['step'] == 2
    go(tmp_path/'x', FREE, reward=Bright()) # mended


def test_a_reward_state_that_could_not_come_back_is_refused_at_once(tmp_path):
    with pytest.raises(RuntimeError, match="step 0: the reward's state .*can't be saved and brought back.*nothing was saved"):
        go(tmp_path, FREE, reward=Bright(at=0, state=dict(count=1, f=Path('x'))))


# --- what a run did not write

def test_other_peoples_files_stay(tmp_path):
    for name in ('.probe', 'launch.json'): (tmp_path/name).write_text('mine')
    go(tmp_path)
    assert [(tmp_path/name).read_text() for name in ('.probe', 'launch.json')] == ['mine']*2


@pytest.mark.parametrize('name', ['checkpoint', 'checkpoint.new', 'checkpoint.old'])
def test_a_checkpoint_nobody_wrote_is_refused(tmp_path, name):
    go(tmp_path, replace(CFG, steps=1, save_steps=1))
    if name == 'checkpoint': (tmp_path/name).rename(tmp_path/'kept')
    (tmp_path/name).mkdir(); (tmp_path/name/'model.safetensors').write_bytes(b'the only copy')
    with pytest.raises(FileExistsError, match=f'holds {name}, which no run wrote'): go(tmp_path, replace(CFG, steps=1, save_steps=1))
    assert files(tmp_path/name) == {'model.safetensors': b'the only copy'}


# --- kills, power cuts and full disks while saving

def test_parts_are_on_the_disk_before_they_take_the_name(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, Path.rename
    monkeypatch.setattr(os, 'fsync', lambda fd: (events.append(os.readlink(f'/proc/self/fd/{fd}')), fsync(fd))[1])
    monkeypatch.setattr(Path, 'rename', lambda a, b: (events.append((a.name, b.name)), rename(a, b))[1])
    go(tmp_path, replace(CFG, steps=1))
    at = events.index(('checkpoint.new', 'checkpoint'))
    before = {Path(e).name for e in events[:at] if isinstance(e, str)}
    assert set(files(tmp_path/'checkpoint')) - {'manifest.json'} <= before and str(tmp_path) in events[at:]


@pytest.mark.parametrize('crash', range(4))
def test_a_crash_anywhere_in_the_swap_resumes(tmp_path, monkeypatch, crash):
    class Crash(BaseException): pass
    whole = tiny(); go(tmp_path/'whole', system=whole)
    calls, rename, remove = [], Path.rename, saving._remove
    def point(f):
        def g(*a):
            calls.append(1)
            if len(calls) == first + crash: raise Crash
            return f(*a)
        return g
    first = 8 # after the first save and the start of the run
    monkeypatch.setattr(Path, 'rename', point(rename)); monkeypatch.setattr(saving, '_remove', point(remove))
    with pytest.raises(Crash): go(tmp_path/'x')
    monkeypatch.undo()
    again = tiny(); go(tmp_path/'x', system=again)
    assert same_weights(whole.policy, again.policy)
    assert {p.name for p in (tmp_path/'x').iterdir()} == {'checkpoint', 'config.json', 'metrics.jsonl', 'run.lock', 'run.log'}


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    save, calls = torch.save, []
    def full(*a, **kw):
        if isinstance(a[1], (str, Path)) and Path(a[1]).name == 'optimizer.bin': calls.append(1)
        if len(calls) == 2: raise RuntimeError('PytorchStreamWriter failed writing file data/0: file write failed')
        return save(*a, **kw)
    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(OSError, match=r'the disk at .* is full .*GB free, .*GB\s+needed\); free some'): go(tmp_path/'x')
    monkeypatch.undo()
    assert read_run(find_checkpoint(tmp_path/'x', verify=True))['step'] == 2 and not (tmp_path/'x'/'checkpoint.new').exists()
    a, b = tiny(), tiny()
    go(tmp_path/'x', system=a); go(tmp_path/'y', system=b)
    assert same_weights(a.policy, b.policy)


# --- damaged parts

@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp('finished')/'run'
    go(out, replace(CFG, steps=2))
    return out


@pytest.mark.parametrize('part', ['run.pt', 'model.safetensors', 'optimizer.bin', 'random_states_0.pkl', 'manifest.json'])
@pytest.mark.parametrize('how', ['empty', 'cut', 'flipped', 'gone'])
def test_a_damaged_part_is_named_and_the_other_checkpoint_taken(tmp_path, finished, part, how):
    import shutil
    out = tmp_path/'x'
    shutil.copytree(finished, out)
    path = out/'checkpoint'/part
    whole = path.read_bytes()
    middle = bytearray(whole); middle[len(whole)//2] ^= 255
    if how == 'gone': path.unlink()
    else: path.write_bytes(dict(empty=b'', cut=whole[:len(whole)//2], flipped=bytes(middle))[how])
    cfg = replace(CFG, steps=2)
    if (part, how) == ('manifest.json', 'gone'): # then it looks like an older version's, which is read
        with pytest.warns(UserWarning, match='no manifest.json'): assert len(go(out, cfg)) == 2
        return
    with pytest.raises((Damaged, RuntimeError), match=part.replace('.', r'\.')): go(out, cfg)
    shutil.copytree(finished/'checkpoint', out/'checkpoint.old')
    with pytest.warns(UserWarning, match='checkpoint.old instead'): assert len(go(out, cfg)) == 2


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path, finished):
    import shutil
    cfg = replace(CFG, steps=2, seed=1)
    go(tmp_path/'x', cfg)
    shutil.rmtree(tmp_path/'x'/'checkpoint'); shutil.copytree(finished/'checkpoint', tmp_path/'x'/'checkpoint')
    with pytest.raises(Damaged, match='belongs to another configuration'): go(tmp_path/'x', cfg)


def test_damaged_small_files(tmp_path, finished):
    import shutil
    out, cfg = tmp_path/'x', replace(CFG, steps=2)
    shutil.copytree(finished, out)
    (out/'config.json').write_text('') # the checkpoint knows whose it is
    with (out/'metrics.jsonl').open('a') as f: f.write('{"step": 2, "lo')
    with pytest.warns(UserWarning, match='the last row was cut'): assert len(go(out, cfg)) == 2
    assert (out/'config.json').read_text() == (finished/'config.json').read_text()
    (out/'config.json').write_text('{"sed": 1}')
    with pytest.raises(ValueError, match=r'config\.json: unknown fields'): go(out, cfg)
    shutil.copy(finished/'config.json', out)
    (out/'metrics.jsonl').write_text('{"step": 0}\nno\n{"step": 1}\n')
    with pytest.raises(ValueError, match=r'metrics\.jsonl, line 2'): go(out, cfg)


# --- names, ties, environment

def test_tied_parameters_are_saved_loaded_and_followed(tmp_path):
    cfg = replace(FREE, beta=.1, ref_policy='ema', ref_decay=.5)
    whole, broken, again = (tiny(TiedGPT) for _ in range(3))
    go(tmp_path/'whole', cfg, whole, reward=Bright())
    with pytest.raises(RuntimeError, match='no answer'): go(tmp_path/'x', cfg, broken, reward=Bright(at=3, error=RuntimeError('no answer')))
    go(tmp_path/'x', cfg, again, reward=Bright())
    assert same_weights(whole.policy, again.policy) and again.policy.output.weight is again.policy.tok_embeddings.weight


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path)); monkeypatch.chdir(tmp_path)
    go('~/here', replace(CFG, steps=1))
    assert (tmp_path/'here'/'checkpoint').is_dir() and not (tmp_path/'~').exists() and find_checkpoint('~/here')


def test_the_environment_does_not_change_the_mathematics(tmp_path, monkeypatch):
    a, b = tiny(), tiny()
    go(tmp_path/'a', system=a)
    monkeypatch.setenv('ACCELERATE_GRADIENT_ACCUMULATION_STEPS', '4'); monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', 'bf16')
    with pytest.warns(UserWarning, match='ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 in the environment is ignored'): rows = go(tmp_path/'b', system=b)
    assert same_weights(a.policy, b.policy) and rows[0]['loss'] == read_rows(tmp_path/'a'/'metrics.jsonl')[0]['loss']


def test_two_precisions_in_one_process(tmp_path):
    go(tmp_path/'a', replace(CFG, steps=1)); go(tmp_path/'b', replace(CFG, steps=1, mixed_precision='bf16')); go(tmp_path/'c', replace(CFG, steps=1))
    a, b, c = (load_file(tmp_path/n/'checkpoint'/'model.safetensors') for n in 'abc')
    assert all(torch.equal(a[k], c[k]) for k in a) and not all(torch.equal(a[k], b[k]) for k in a)


def test_room_for_two_checkpoints_is_asked_for_before_the_first_step(tmp_path, monkeypatch):
    import arpo_nb.files as folder
    from arpo_nb.training.plan import make_plan
    from arpo_nb.training.trainer import state_bytes
    system = tiny()
    n = 16*sum(p.numel() for p in system.policy.parameters())
    monkeypatch.setattr(folder, 'disk_of', lambda f: ('/disk', 2*n - 1))
    with pytest.raises(OSError, match='this run, for its checkpoints, needs .* GB on the disk at /disk'): go(tmp_path/'x', system=system)
    assert not (tmp_path/'x'/'metrics.jsonl').exists()
    toy = sum(p.numel() for p in __import__('arpo_nb.systems', fromlist=['x']).load_system('toy').policy.parameters())
    assert sum(make_plan(preset('toy')).disk.values()) == 2*16*toy


def test_two_runs_in_one_kernel(tmp_path):
    "With another precision, and the first again"
    cfg = replace(TOY, steps=1)
    for name, precision in dict(a='no', b='bf16', c='no').items(): run(replace(cfg, mixed_precision=precision), tmp_path/name, progress=False)
    a, b, c = (load_file(tmp_path/n/'checkpoint'/'model.safetensors') for n in 'abc')
    assert all(torch.equal(a[k], c[k]) for k in a) and not all(torch.equal(a[k], b[k]) for k in a)


# --- one writer

SLOW = '''import sys, time
import arpo_nb.training.launch as L
load = L.load_data
def slow(cfg, system):
    data = load(cfg, system)
    rows = data.load
    def wait(r):
        time.sleep(SECONDS)
        return rows(r)
    data.load = wait
    return data
L.load_data = slow
FURTHER
if __name__ == '__main__': L.main(sys.argv[1:])
'''
TOY = replace(preset('toy'), steps=60, batch_size=8, num_generations=2, save_steps=100)


def script(tmp_path, seconds=.2, further=''):
    path = tmp_path/'slow.py'
    path.write_text(SLOW.replace('SECONDS', str(seconds)).replace('FURTHER', further))
    (tmp_path/'job.json').write_text(to_json(TOY))
    return path


def started(tmp_path, path):
    "A run of a script that has made three steps"
    log, ends = tmp_path/'run'/'metrics.jsonl', time.time() + 180
    before = log.stat().st_ino if log.exists() else 0 # a run that goes on writes the rows it keeps into a new file
    child = begin_script(path, tmp_path/'job.json', '--out_dir', tmp_path/'run')
    while not (log.exists() and log.stat().st_ino != before and len(log.read_text().splitlines()) >= 3):
        assert child.poll() is None and time.time() < ends, child.wait().stderr
        time.sleep(.05)
    return child


def test_the_same_run_is_not_started_twice(tmp_path):
    path = script(tmp_path)
    child = started(tmp_path, path)
    with pytest.raises(FileExistsError, match=f'being written by process {child.pid} on {socket.gethostname()}'): claim_folder(tmp_path/'run', TOY)
    child.send_signal(signal.SIGKILL); child.wait()
    second = started(tmp_path, path) # takes over
    second.send_signal(signal.SIGTERM)
    done = second.wait()
    said = done.stdout + done.stderr
    assert done.returncode == 75 and 'stopped by SIGTERM' in said and f'taken over from process {child.pid}' in said
    assert read_run(find_checkpoint(tmp_path/'run', verify=True))['step'] >= 3
    rows = read_rows(tmp_path/'run'/'metrics.jsonl')
    assert [r['step'] for r in rows] == list(range(len(rows)))


# --- several processes

def two(tmp_path, monkeypatch, **kw):
    path = script(tmp_path, **kw)
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', str(path)]
    monkeypatch.setattr(launching, 'launch_command', lambda *a: command)
    for k in ('OMP_NUM_THREADS', 'PYTHONPATH'): monkeypatch.setenv(k, ENV[k])
    return replace(TOY, num_processes=2)


def test_one_process_that_fails_ends_all_with_its_own_words(tmp_path, monkeypatch):
    further = '''
import os
train = L.train
def failing(system, *a, **kw):
    generate, calls = system.policy.hidden, []
    def hidden(*x):
        calls.append(1)
        if os.environ['RANK'] == '1' and len(calls) > 4: raise ArithmeticError('words of process one')
        return generate(*x)
    system.policy.hidden = hidden
    return train(system, *a, **kw)
L.train = failing'''
    cfg, began = two(tmp_path, monkeypatch, seconds=0., further=further), time.time()
    with pytest.raises(RuntimeError, match='process 1 failed first: RuntimeError: step 2: words of process one; nothing was saved yet'):
        launch(cfg, tmp_path/'run', progress=False)
    assert time.time() - began < 120 and find_checkpoint(tmp_path/'run') is None


def test_a_launcher_that_is_asked_to_stop_saves_and_one_that_is_killed_leaves_nobody(tmp_path):
    further = '''
path = __file__
if 'WORLD_SIZE' not in __import__('os').environ:
    L.launch_command = lambda *a: [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', path]'''
    path = script(tmp_path, further=further)
    (tmp_path/'job.json').write_text(to_json(replace(TOY, num_processes=2)))
    child = started(tmp_path, path)
    child.send_signal(signal.SIGTERM)
    done = child.wait()
    assert done.returncode == 75 and 'stopped by SIGTERM' in done.stdout + done.stderr, done
    assert read_run(find_checkpoint(tmp_path/'run', verify=True))['step'] >= 3
    killed = started(tmp_path, path)
    mine = [p for p in workers(path) if p != killed.pid]
    assert len(mine) >= 3 # torchrun and two processes
    killed.send_signal(signal.SIGKILL); killed.wait()
    ends = time.time() + 60
    while workers(path) and time.time() < ends: time.sleep(.2)
    assert not workers(path)


@pytest.mark.parametrize('ours, code', [(True, 75), (False, -signal.SIGTERM)])
def test_a_request_that_comes_after_the_stop_changes_nothing(ours, code):
    child = Started(_asked_again, ours)
    assert child.wait().returncode == code # a process that is not ours alone may do other things afterwards


def _asked_again(ours):
    "One process of several: another was asked first and all stopped; then its own request comes"
    def stopped():
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGTERM)
            assert stop.received
        signal.raise_signal(signal.SIGTERM)
        raise Stopped('stopped after step 3')
    return launching.as_process(None, stopped, rank=1) if ours else stopped()


def workers(path):
    "Processes whose command line names a script"
    found = []
    for p in Path('/proc').glob('[0-9]*'):
        try:
            if str(path) in (p/'cmdline').read_text() and (p/'stat').read_text().split()[2] != 'Z': found.append(int(p.name))
        except OSError: pass
    return found
