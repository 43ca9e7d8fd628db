"""Small random-weight models of nine architectures, and operators and inputs for them."""

import torch
import transformers as hf
from transformers import DynamicCache

from cachemedic.repair.operator import RepairOperator

VOCABULARY, PAD = 61, 0
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # large enough for sharp attention and logits that matter
    "bos_token_id": PAD,
    "eos_token_id": PAD,
    "pad_token_id": PAD,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
CONFIGS = {
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.3,
        scale_attn_by_inverse_layer_idx=True, bos_token_id=PAD, eos_token_id=PAD, pad_token_id=PAD,
    ),
    "opt": lambda: hf.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=48, init_std=0.3,
        max_position_embeddings=64, word_embed_proj_dim=32, bos_token_id=PAD, eos_token_id=PAD, pad_token_id=PAD,
    ),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**SIZES),
    "llama": lambda: hf.LlamaConfig(**GROUPED),
    "qwen2": lambda: hf.Qwen2Config(**GROUPED),
    "qwen3": lambda: hf.Qwen3Config(**GROUPED, head_dim=16),
    "mistral": lambda: hf.MistralConfig(**GROUPED, sliding_window=6),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **GROUPED, head_dim=16, sliding_window=6, query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi": lambda: hf.PhiConfig(**GROUPED),
}  # fmt: skip


def bart():
    """A decoder that takes no position_ids; its configuration also tells of an encoder, of other sizes."""
    return hf.BartConfig(
        vocab_size=VOCABULARY, d_model=32, decoder_layers=3, encoder_layers=2, decoder_attention_heads=4,
        encoder_attention_heads=2, decoder_ffn_dim=48, max_position_embeddings=64, is_decoder=True,
        is_encoder_decoder=False, init_std=0.3, bos_token_id=PAD, eos_token_id=PAD, pad_token_id=PAD,
    )  # fmt: skip


def shaken(operator: RepairOperator, size: float = 0.3) -> RepairOperator:
    """The operator with every parameter moved at random: no longer the identity."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for p in operator.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator))
    return operator


def model_of(name: str, implementation: str = "sdpa", seed: int = 0):
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config((CONFIGS | {"bart": bart})[name]()).eval().requires_grad_(False)
    model.set_attn_implementation(implementation)
    model.generation_config.pad_token_id = PAD
    return model


def operator_for(model, family="A", layers=(0, 2), apply_to="KV", runs=1, size=0.3, **options):
    """An operator far from the identity."""
    return shaken(RepairOperator.create(family, model.config, layers, 3, apply_to, runs=runs, **options), size)


def padded_batch(rows=3, length=9, seed=1):
    """Token ids and their mask; row i begins with 2 i padding tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
    mask = (torch.arange(length) >= 2 * torch.arange(rows)[:, None]).long()
    return ids * mask, mask


def prefill_and_decode(model, ids, mask, prefix=6):
    """Logits of all real tokens: the prefix at once, then one token, then the rest as a chunk, on one cache."""
    cache = DynamicCache(config=model.config)
    logits = []
    for start, end in ((0, prefix), (prefix, prefix + 1), (prefix + 1, ids.shape[1])):
        position_ids = (mask.cumsum(1) - 1).clamp_min(0)[:, start:end]
        out = model(ids[:, start:end], attention_mask=mask[:, :end], position_ids=position_ids, past_key_values=cache)
        logits.append(out.logits)
    return torch.cat(logits, dim=1)[mask.bool()]
