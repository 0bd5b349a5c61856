"Files where people have them, models of other shapes, and what an installed package carries: through the doors users come in by."
import json
import os
import shutil
import subprocess
import sys
import traceback
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from doors import ENV, arpo, notebook, ok, refused as refused_notebook

from arpo_nb import systems
from arpo_nb.config import Config, preset
from arpo_nb.models.llamagen import GPT, GPTConfig
from arpo_nb.models.multiscale_vq import MultiScaleVQ
from arpo_nb.models.tokenizers import VQConfig, VQModel
from arpo_nb.models.toy import ASSETS, build_toy
from arpo_nb.models.var import VAR, load_tokenizer, own_tokenizer, randomise
from arpo_nb.models.var_toy import toy_multiscale_config, toy_var_config
from arpo_nb.specs import ModelSpec
from arpo_nb.systems import load_system, model_files
from arpo_nb.training.launch import DOORS
from arpo_nb.weights import FILES, in_folder, local_files, locate, plan_file

SMALL = dict(steps=1, eval_images=0)
TINY = 'batch_size=2,num_generations=2,mini_batch_size=0,micro_batch_size=0,mixed_precision=no,gradient_checkpointing=off'


def refused(capsys, *words):
    "What `arpo` says in refusing, here in this process, which has torch already"
    from arpo_nb.training import launch
    with pytest.raises((Exception, SystemExit)) as e: launch.arpo(list(words))
    assert not isinstance(e.value, SystemExit) or e.value.code
    return ''.join(traceback.format_exception(e.value)) + ''.join(capsys.readouterr())


@pytest.fixture(scope='module')
def var_file(tmp_path_factory):
    "A checkpoint as VAR's training script writes it: depth 2, seven classes, four maps, its own tokenizer inside"
    torch.manual_seed(0)
    vq = MultiScaleVQ(toy_multiscale_config())
    policy = randomise(VAR(toy_var_config(depth=2, num_classes=7), vq.quantize))
    path = tmp_path_factory.mktemp('var')/'ar-ckpt-last.pth'
    torch.save(dict(epoch=3, iter=0, args=dict(depth=2), trainer=dict(var_wo_ddp=policy.state_dict(), vae_local=vq.state_dict(), var_opt=dict(state={}))), path)
    return path


@pytest.fixture(scope='module')
def llamagen_files(tmp_path_factory):
    "A transformer and a tokenizer as LlamaGen's training scripts write them: three classes, 64 pixels, 32 codes"
    from argparse import Namespace
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('llamagen')
    policy = GPT(GPTConfig(dim=64, n_layer=2, n_head=2, num_classes=3, vocab_size=32, block_size=16))
    torch.nn.init.normal_(policy.output.weight, std=.02)
    vq = VQModel(VQConfig(ch=32, encoder_ch_mult=(1, 1, 1, 1, 1), decoder_ch_mult=(1, 1, 1, 1, 1), num_res_blocks=1, z_channels=8, codebook_size=32, codebook_embed_dim=4, image_size=64))
    kept = Namespace(image_size=64, gpt_model='GPT-tiny', num_classes=3, codebook_l2_norm=True)
    torch.save(dict(model=policy.state_dict(), optimizer={}, steps=10, args=kept), folder/'0000010.pt')
    torch.save(dict(model=vq.state_dict(), optimizer={}, discriminator={}, steps=10, args=kept), folder/'vq.pt')
    return folder/'0000010.pt', folder/'vq.pt'


def test_a_var_of_another_shape_is_trained_and_measured(var_file, tmp_path):
    "run_var, then run_eval and the sample writer, which are told the checkpoint alone"
    ok(notebook('run_var', model='var', weights=var_file, model_args='vq_num_groups=4', rewards='brightness', out_dir=tmp_path/'out', overrides=TINY, **SMALL))
    cfg = json.loads((tmp_path/'out'/'config.json').read_text())
    assert (cfg['weights'], cfg['model_args']) == (str(var_file), 'vq_num_groups=4')
    assert load_file(tmp_path/'out'/'checkpoint'/'model.safetensors')['model.class_emb.weight'].shape == (8, 64)
    ok(notebook('run_eval', checkpoint=tmp_path/'out'/'checkpoint', n=8, batch_size=8, reference='none', out_dir=tmp_path/'eval'))
    told = json.loads((tmp_path/'eval'/'eval.json').read_text())
    assert told['model'] == 'var' and told['protocol']['base']['weights'] == str(var_file)
    ok(arpo('sample', '--checkpoint', tmp_path/'out'/'checkpoint', '--images', 7, '--out', tmp_path/'pics', cwd=tmp_path))
    assert len([*(tmp_path/'pics').glob('*.png')]) == 7


def test_a_llamagen_of_another_shape_is_trained(llamagen_files, tmp_path):
    "Through run_loofid and the command line: classes, codes and size are the files' own"
    policy, vq = llamagen_files
    ok(notebook('run_loofid', model='llamagen', weights=policy, tokenizer_weights=vq, model_args='n_head=2', out_dir=tmp_path/'out', overrides=f'rewards=brightness,rollout_cfg_scale=1,{TINY}', **SMALL))
    assert load_file(tmp_path/'out'/'checkpoint'/'model.safetensors')['model.cls_embedding.embedding_table.weight'].shape == (4, 64)
    dry = ok(arpo('plan', '--model', 'llamagen', '--method', 'loofid', '--weights', policy, '--tokenizer_weights', vq, '--model_args', 'n_head=2', '--rewards', 'brightness', cwd=tmp_path))
    assert str(vq) in dry.stdout and 'given' in dry.stdout
    mine = load_system('llamagen', str(policy), perceptual=False, tokenizer_weights=str(vq), model_args='n_head=2')
    assert (mine.num_classes, mine.policy.num_tokens, mine.tokenizer.image_size, mine.tokenizer.codebook_size) == (3, 16, 64, 32)


def test_what_is_said_of_a_file_is_true(var_file, llamagen_files, tmp_path):
    policy, vq = map(str, llamagen_files)
    for args, why in ((('var', str(var_file), 'depth=12,vq_num_groups=4'), 'has depth=2; leave it out'),
                      (('var', str(var_file), 'patch_nums=1_2_4,vq_num_groups=4'), r'has patch_nums=\(1, 2, 3, 4\)'),
                      (('var', str(var_file), ''), 'add vq_num_groups=NUMBER'), (('var', 'default', ''), 'give weights=FILE'),
                      (('llamagen', 'random', 'dim=64'), 'stands for files of your own'), (('toy', 'default', 'depth=3'), 'has no argument depth'),
                      (('var_d16', 'random', 'dept=3'), "did you mean 'depth'"), (('llamagen', policy, 'nlayer=3'), "did you mean 'n_layer'"), (('llamagen', policy, ''), 'add n_head=NUMBER')):
        with pytest.raises(ValueError, match=why): load_system(args[0], args[1], perceptual=False, model_args=args[2], tokenizer_weights=vq if args[0] == 'llamagen' else 'default')
    bare = tmp_path/'bare.pt'
    torch.save(torch.load(policy, weights_only=False)['model'], bare)
    with pytest.raises(ValueError, match="model_args='image_size=256'"): load_system('llamagen', str(bare), perceptual=False, tokenizer_weights=vq, model_args='n_head=2')
    assert load_system('llamagen', str(bare), perceptual=False, tokenizer_weights=vq, model_args='n_head=2,image_size=64').policy.num_tokens == 16
    wide = torch.load(policy, weights_only=False)['model']
    torch.save(dict(wide, **{k: torch.zeros(33, 64) for k in ('tok_embeddings.weight', 'output.weight')}), bare)
    with pytest.raises(ValueError, match='32 codes, but the transformer draws from 33'): load_system('llamagen', str(bare), perceptual=False, tokenizer_weights=vq, model_args='n_head=2,image_size=64')


def test_a_tokenizer_serves_other_numbers_of_scales(var_file):
    "Its usage counts are nobody's; everything else is strict"
    fewer = MultiScaleVQ(toy_multiscale_config(patch_nums=(1, 2, 4)))
    load_tokenizer(fewer, own_tokenizer(var_file))
    same = torch.load(var_file, weights_only=False)['trainer']['vae_local']
    assert torch.equal(fewer.quantize.embedding.weight, same['quantize.embedding.weight'])
    with pytest.raises(ValueError, match='does not fit'): load_tokenizer(MultiScaleVQ(toy_multiscale_config(codebook_size=128)), own_tokenizer(var_file))


def test_a_run_with_a_tokenizer_of_ones_own_is_measured_with_it(tmp_path):
    "The run's folder says which: pictures are those of an explicit request, and not the shipped tokenizer's"
    vq = load_file(ASSETS/'vq.safetensors')
    save_file({k: v*.9 if k.startswith('decoder.conv_out') else v for k, v in vq.items()}, tmp_path/'mine.safetensors')
    ok(arpo('train', '--model', 'toy', '--tokenizer_weights', tmp_path/'mine.safetensors', '--steps', 1, '--batch_size', 2, '--num_generations', 2, '--out_dir', 'run', cwd=tmp_path))
    draw = lambda out, *more: ok(arpo('sample', '--checkpoint', 'run/checkpoint', '--images', 2, '--out', out, *more, cwd=tmp_path))
    draw('told'), draw('explicit', '--tokenizer-weights', tmp_path/'mine.safetensors')
    draw('shipped', '--tokenizer_weights', ASSETS/'vq.safetensors')
    pictures = {n: (tmp_path/n/'000001.png').read_bytes() for n in ('told', 'explicit', 'shipped')}
    assert pictures['told'] == pictures['explicit'] != pictures['shipped']
    assert json.loads((tmp_path/'told'/'samples.json').read_text())['tokenizer_weights'].endswith('mine.safetensors')
    os.remove(tmp_path/'mine.safetensors')
    gone = arpo('sample', '--checkpoint', 'run/checkpoint', '--images', 2, '--out', 'gone', cwd=tmp_path)
    assert gone.returncode and 'which is not here' in gone.stderr and 'tokenizer_weights=FILE' in gone.stderr
    other = arpo('sample', '--model', 'toy_var', '--checkpoint', 'run/checkpoint', '--out', 'other', cwd=tmp_path)
    assert other.returncode and 'this checkpoint is of toy' in other.stderr


def test_a_folder_with_published_names_is_weights(tmp_path):
    "Policy and tokenizer from one folder, by their publisher's names, among other files"
    policy, vq = build_toy()
    torch.save(dict(model=policy.state_dict()), tmp_path/'c2i_B_256.pt')
    torch.save(dict(model={k: v + 1 if 'post_quant' in k else v for k, v in vq.state_dict().items()}), tmp_path/'vq_ds16_c2i.pt')
    torch.save(dict(model=policy.state_dict()), tmp_path/'c2i_L_256.pt')
    spec = ModelSpec('mine', build_toy, num_classes=10, files=dict(policy='c2i_B_256', tokenizer='vq_ds16_c2i'))
    got = load_system(spec, str(tmp_path), perceptual=False)
    assert torch.equal(got.policy.output.weight, policy.output.weight)
    assert torch.equal(got.tokenizer.post_quant_conv.weight, vq.post_quant_conv.weight + 1)
    assert dict(model_files('llamagen_b', str(tmp_path), False)) == dict(c2i_B_256=tmp_path/'c2i_B_256.pt', vq_ds16_c2i=tmp_path/'vq_ds16_c2i.pt')
    assert dict(model_files('llamagen_b', files=str(tmp_path), perceptual=False))['vq_ds16_c2i'] == tmp_path/'vq_ds16_c2i.pt'


def test_reward_networks_by_name(tmp_path, monkeypatch):
    "What a run's `files` names reaches the rewards and the plan, a file it does not need is left alone, a bad name is refused"
    for n in ('hps_v2.1', 'maniqa', 'vgg16'): (tmp_path/f'{n}.pt').write_bytes(b'x')
    cfg = replace(preset('toy', 'loofid'), rewards='hps+brightness', files=f'hps_v2.1={tmp_path}/hps_v2.1.pt,maniqa={tmp_path}/maniqa.pt')
    seen = {}
    monkeypatch.setattr(systems, 'make_rewards', lambda names, **options: seen.update(options) or 1/0)
    with pytest.raises(ZeroDivisionError): systems.load_reward(cfg, load_system('toy'))
    assert seen['weights'] == {'hps_v2.1': tmp_path/'hps_v2.1.pt'}
    assert dict(model_files('llamagen_b', 'x.pt', 'vgg', 'y.pt', f'vgg16={tmp_path}/vgg16.pt'))['vgg16'] == tmp_path/'vgg16.pt'
    for text, why in (('clip=x.pt', 'did you mean clip_'), (f'hps_v2.1={tmp_path}/none.pt', 'expected NAME=FILE'), (str(tmp_path/'hps_v2.1.pt'), 'a file without a name'), (f'{tmp_path}/..//nowhere', 'expected NAME=FILE')):
        with pytest.raises((ValueError, OSError), match=why): local_files(text)


def test_the_folder_of_ARPO_WEIGHTS(tmp_path, monkeypatch):
    "For files of the hub too; the cure that a missing file's error names works"
    monkeypatch.setenv('ARPO_WEIGHTS', str(tmp_path))
    with pytest.raises(FileNotFoundError, match='folder that ARPO_WEIGHTS names, as c2i_B_256.pt, or name it: files=') as e: plan_file('c2i_B_256', cache_dir=None, offline=True)
    policy, _ = build_toy()
    torch.save(dict(model=policy.state_dict()), tmp_path/'c2i_B_256.pt')
    assert plan_file('c2i_B_256', offline=True)['path'] == tmp_path/'c2i_B_256.pt'
    at = tmp_path/'models--timm--vit_base_patch32_clip_224.openai'/'snapshots'/'abc'/'open_clip_model.safetensors'
    at.parent.mkdir(parents=True); at.write_bytes(b'x')
    assert in_folder(tmp_path, 'clip_b32') == at and in_folder(tmp_path, 'clip_l14') is None
    (tmp_path/'open_clip_model.safetensors').write_bytes(b'x')
    assert in_folder(tmp_path, 'clip_l14') is None, 'the name is shared by two networks, and the size is neither\'s'
    assert in_folder(tmp_path, 'clip_l14', alone=True) == tmp_path/'open_clip_model.safetensors'


def test_every_door_opens(tmp_path):
    for door in DOORS:
        if door == 'notebooks': continue
        assert 'usage' in ok(arpo(door, '--help', cwd=tmp_path)).stdout, door
    laid = ok(arpo('notebooks', 'here', cwd=tmp_path)).stdout
    assert 'here/run_vapi.ipynb' in laid and (tmp_path/'here'/'examples'/'own_reward.py').is_file()
    assert 'toy_var' in ok(arpo('models', cwd=tmp_path)).stdout and 'clip_l14' in ok(arpo('weights', '--list', cwd=tmp_path)).stdout
    assert 'memory per device' in ok(arpo('plan', '--model', 'toy', cwd=tmp_path)).stdout
    wrong = arpo('eval', '--chekpoint', 'x', cwd=tmp_path)
    assert wrong.returncode and 'did you mean --checkpoint' in wrong.stderr
    assert arpo('trian', cwd=tmp_path).returncode == 2


def test_a_run_from_a_file(tmp_path, monkeypatch, capsys):
    "YAML and JSON start from the recipe; options win; an unknown field is named"
    (tmp_path/'run.yaml').write_text('model: toy\nmethod: loofid\nrewards: brightness\nlearning_rate: 1e-5\ncompile: off\nsteps: 1\nbatch_size: 2\nnum_generations: 2\nout_dir: out\n')
    ok(arpo('train', '--config', 'run.yaml', '--seed', 5, cwd=tmp_path))
    cfg = json.loads((tmp_path/'out'/'config.json').read_text())
    recipe = preset('toy', 'loofid')
    assert (cfg['learning_rate'], cfg['seed'], cfg['rewards'], cfg['scale_rewards']) == (1e-5, 5, 'brightness', recipe.scale_rewards)
    (tmp_path/'again.json').write_text(json.dumps(cfg))
    ok(arpo('train', '--config', 'again.json', '--out_dir', 'again', cwd=tmp_path))
    assert json.loads((tmp_path/'again'/'config.json').read_text()) == cfg
    monkeypatch.chdir(tmp_path)
    for text, why in (('model: toy\nreward: clip\n', "'reward': no such field; did you mean rewards"), ('model: toy\ntop_k: 3\n', 'use rollout_top_k'), ('steps: 3\n', 'names at least its model'),
                      ('model: toy\nsteps: many\n', 'expected a whole number'), ('[1, 2]', 'a list; expected names'), ('model: toy\nrewards: {clip: 1}\n', 'rewards is a dict')):
        (tmp_path/'bad.yml').write_text(text)
        assert why in refused(capsys, 'train', '--config', 'bad.yml', '--out_dir', 'bad'), text
    for words, why in ((['train', '--config', 'none.yaml'], 'no such file'), (['train', 'out/config.json', '--model', 'toy'], 'says all'), (['train'], 'give a file, --config FILE, or --model')):
        assert why in refused(capsys, *words)


NOWHERE = [('nowhere:Thing', "no module named 'nowhere'"), ('plain:Thin', "has no 'Thin', did you mean 'Thing'"), ('fails:Thing', 'in helper')]


@pytest.fixture
def things(tmp_path, monkeypatch):
    "A working folder with modules of one's own"
    (tmp_path/'fails.py').write_text('def helper(): raise RuntimeError("my own mistake")\nhelper()\n')
    (tmp_path/'plain.py').write_text('Thing = 3\n')
    monkeypatch.chdir(tmp_path); monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ('fails', 'plain'): sys.modules.pop(name, None)


@pytest.mark.parametrize('field', ['model', 'data', 'optim', 'perceptual_net', 'sampler', 'rewards'])
def test_paths_that_lead_nowhere(field, things, capsys):
    "Whatever takes a dotted path: a module that is not there, a name that is not in it, one that fails inside"
    method = 'vapi' if field == 'perceptual_net' else 'grpo'
    for path, why in NOWHERE:
        assert why in refused(capsys, 'train', '--model', 'toy', '--method', method, '--out_dir', 'out', '--steps', '1', f'--{field}', path), path


def test_paths_that_lead_nowhere_in_an_evaluation(things, monkeypatch):
    "By the command, which starts a kernel, and in the notebook itself"
    path, why = NOWHERE[2]
    done = arpo('eval', '--model', 'toy', '--n', '4', '--scores', path, cwd=things)
    assert done.returncode and why in done.stderr + done.stdout, (done.stdout + done.stderr)[-1500:]
    for path, why in NOWHERE[:2]: assert why in refused_notebook('run_eval', things, monkeypatch, model='toy', n=4, metric=path), path


CORE = '''
import sys
for name in ("matplotlib", "papermill", "ipykernel", "IPython", "scipy", "nbdev"): sys.modules[name] = None
from arpo_nb.rewards import loo_fid_reward
from arpo_nb.training.launch import arpo
arpo(["train", "--model", "toy", "--method", "loofid", "--steps", "1", "--batch_size", "2", "--num_generations", "2", "--out_dir", "out"])
'''


def test_the_core_needs_no_notebook(tmp_path):
    ok(subprocess.run([sys.executable, '-c', CORE], cwd=tmp_path, env=ENV, capture_output=True, text=True))
    assert (tmp_path/'out'/'checkpoint').is_dir()


def test_the_wheel_works_outside_the_repository(tmp_path):
    source, out = tmp_path/'source', tmp_path/'wheel'
    source.mkdir()
    for name in ('setup.py', 'settings.ini', 'MANIFEST.in', 'README.md', 'LICENSE'): shutil.copy(ROOT/name, source)
    skip = shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT/'arpo_nb', source/'arpo_nb', ignore=skip); shutil.copytree(ROOT/'examples', source/'examples', ignore=skip)
    (source/'nbs').mkdir()
    for p in (ROOT/'nbs').glob('run_*.ipynb'): shutil.copy(p, source/'nbs')
    ok(subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', str(out), str(source)], capture_output=True, text=True))
    with zipfile.ZipFile(next(out.glob('*.whl'))) as z:
        names = z.namelist()
        z.extractall(tmp_path/'site')
        notes = z.read(next(n for n in names if n.endswith('METADATA'))).decode()
        carried = json.loads(z.read('arpo_nb/notebooks/run_vapi.ipynb'))
    ours = {p.name for p in (ROOT/'nbs').glob('run_*.ipynb')}
    assert {Path(n).name for n in names if n.endswith('.ipynb')} == ours and 'arpo_nb/py.typed' in names and 'arpo_nb/notebooks/examples/own_reward.py' in names
    assert not any(c.get('outputs') for c in carried['cells'])
    assert 'Requires-Dist: papermill; extra == "notebooks"' in notes and 'Requires-Dist: matplotlib\n' not in notes
    shutil.rmtree(source)
    env = dict(PYTHONPATH=str(tmp_path/'site'))
    where = subprocess.run([sys.executable, '-c', 'import arpo_nb; print(arpo_nb.__file__)'], cwd=tmp_path, env={**ENV, **env}, capture_output=True, text=True).stdout
    assert where.startswith(str(tmp_path/'site'))
    def arpo(*words):
        return subprocess.run([sys.executable, '-c', 'import sys; from arpo_nb.training.launch import arpo; sys.exit(arpo())', *map(str, words)], cwd=tmp_path, env={**ENV, **env}, capture_output=True, text=True)
    ok(arpo('notebooks', 'here'))
    ok(arpo('train', '--model', 'toy', '--steps', 1, '--batch_size', 2, '--num_generations', 2, '--out_dir', 'run'))
    ok(arpo('eval', '--checkpoint', 'run/checkpoint', '--n', 20, '--out_dir', 'measured'))
    assert json.loads((tmp_path/'measured'/'eval.json').read_text())['model'] == 'toy' and (tmp_path/'measured.ipynb').is_file()
