"The library's own policies and tokenizers keep the rules that `contract` checks"
import pytest
import torch

from arpo_nb.models.contract import check_policy, check_tokenizer
from arpo_nb.models.llamagen import GPT, GPTConfig
from arpo_nb.models.multiscale_vq import MultiScaleConfig, MultiScaleVQ
from arpo_nb.models.tokenizers import VQConfig, VQModel
from arpo_nb.models.var import VAR, VARConfig
from arpo_nb.models.vqgan import VQGAN, CINConfig, CINTransformer, VQGANConfig

def jitter(module, std=.1):
    with torch.no_grad():
        for p in module.parameters(): p.add_(std*torch.randn_like(p))
    return module.eval()

def gpt(text):
    kind = dict(cond='text', cond_len=4, caption_dim=8) if text else dict(num_classes=5)
    return GPT(GPTConfig(dim=32, n_layer=2, n_head=2, vocab_size=24, block_size=16, multiple_of=32, **kind))

def janus():
    pytest.importorskip('transformers')
    from arpo_nb.models.janus import JanusConfig, JanusPolicy, SpecialIds
    return JanusPolicy(JanusConfig(dim=32, n_layer=2, n_head=4, n_kv_head=2, ffn_dim=48, text_vocab_size=60, max_positions=64, vocab_size=24, num_tokens=16, ids=SpecialIds(1, 2, 3, 4, 5)))

SCALES = (1, 2, 4)
def multiscale(): return MultiScaleVQ(MultiScaleConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=8, codebook_size=24, patch_nums=SCALES, image_size=8))
def var(): return VAR(VARConfig(depth=2, embed_dim=32, num_heads=2, vocab_size=24, z_channels=8, num_classes=5, patch_nums=SCALES), jitter(multiscale()).quantize)

PROMPTS = torch.tensor([[5, 1, 20, 3], [1, 30, 31, 3], [5, 5, 1, 3], [5, 1, 22, 3]]), torch.tensor([[0, 1, 1, 1], [1]*4, [0, 0, 1, 1], [0, 1, 1, 1]])
FEATURES = torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(0)), PROMPTS[1]
LABELS = torch.tensor([0, 3, 4, 3])
POLICIES = dict(llamagen_c2i=(lambda: gpt(False), LABELS), llamagen_t2i=(lambda: gpt(True), FEATURES), janus=(janus, PROMPTS), var=(var, LABELS),
                vqgan_cin=(lambda: CINTransformer(CINConfig(vocab_size=24, block_size=16, n_layer=2, n_head=2, n_embd=32, num_classes=5)), LABELS))
TOKENIZERS = dict(var=multiscale, llamagen=lambda: VQModel(VQConfig(ch=8, encoder_ch_mult=(1, 2), decoder_ch_mult=(1, 2), num_res_blocks=1, z_channels=8, codebook_size=24, codebook_embed_dim=4, num_groups=4, image_size=8)),
                  vqgan=lambda: VQGAN(VQGANConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(4,), resolution=8, z_channels=8, codebook_size=24, embed_dim=6, image_size=8)))

@pytest.mark.parametrize('name', POLICIES)
def test_policy(name):
    torch.manual_seed(0)
    make, cond = POLICIES[name]
    policy = jitter(make())
    check_policy(policy, cond)
    if hasattr(policy, 'example_cond'):
        example = policy.example_cond(2)
        assert (example.shape[1:] if torch.is_tensor(example) else len(example)) == (cond.shape[1:] if torch.is_tensor(cond) else len(cond))

@pytest.mark.parametrize('name', TOKENIZERS)
def test_tokenizer(name):
    torch.manual_seed(0)
    check_tokenizer(jitter(TOKENIZERS[name]()), torch.rand(3, 3, 8, 8))
