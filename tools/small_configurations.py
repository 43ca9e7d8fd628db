"""A small configuration of any architecture of transformers, from the names that configurations give to sizes."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

VOCABULARY = 64
LAYERS = 4
# By the names that configurations use; a configuration gets those that it has.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "emb_dim", "embedding_dim"), 32),
    **dict.fromkeys(("embedding_size", "word_embed_proj_dim", "attention_hidden_size", "lru_width"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers", "num_decoder_layers", "num_blocks"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "kv_channels", "attention_head_dim", "attention_head_size"), 8),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("n_inner", "dense_intermediate_size", "feed_forward_size", "dim_ff", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("shared_intermediate_size", "shared_experts_intermediate_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "hidden_size_per_layer_input", "router_hidden_size"), 16),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "context_length", "n_ctx"), 64),
    **dict.fromkeys(("model_max_length", "max_source_positions", "max_target_positions"), 64),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 4),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_dt_rank", "time_step_rank"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_key_heads", "linear_num_value_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("initializer_range", "init_std"), 0.3),  # large enough for logits that depend on what is read
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_chunk_size", "attention_window_size"), 16),
    **dict.fromkeys(("attn_layer_period", "full_attention_interval"), 2),
    **dict.fromkeys(("_sliding_window_pattern", "sliding_window_pattern"), 2),
    **dict.fromkeys(("use_mamba_kernels",), False),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id"), 0),
    **dict.fromkeys(("mm_embed_dim", "output_proj_dims", "nemo_conv_channels", "ext_pw_out_channel"), 32),
    **dict.fromkeys(("depthwise_separable_out_channel", "mm_posemb_size"), 32),
    "attn_layer_offset": 1,
    "index_topk": 8,
    "is_decoder": True,
}
# What an architecture needs besides, by its model type.
ROPE = {"rope_type": "default", "rope_theta": 1e4}
BESIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2, "layer_types": ["linear_attention", "full_attention"] * 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "cpmant": {"dim_head": 8, "prompt_length": 0},
    "ctrl": {"dff": 48},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"per_layer_config": {}, "index_n_heads": 2, "index_head_dim": 8, "head_dim": 12},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "kimi_linear": {
        "linear_head_dim": 8, "linear_num_heads": 4, "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mimo_v2_flash": {"v_head_dim": 4},  # as it is known, keys are wider than values
    "ministral": {"head_dim": 8},
    "moshi": {"audio_vocab_size": VOCABULARY},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2, "hc_lowrank": 8, "ple_embed_dim": 16, "ngram_vocab_size_base": 64,
    },
    "reformer": {
        "is_decoder": True, "axial_pos_embds_dim": [8, 24], "axial_pos_shape": [8, 8], "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16, "attn_layers": ["local", "lsh"] * 2,
    },
    "roc_bert": {
        "pronunciation_embed_dim": 32, "shape_embed_dim": 32, "shape_vocab_size": VOCABULARY,
        "pronunciation_vocab_size": VOCABULARY,
    },
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2, "layer_types": ["mamba", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3], "attention_hidden_size": 64, "attention_head_dim": 16, "mamba_headdim": 8,
        "n_mamba_heads": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def small_configuration(model_type: str) -> PreTrainedConfig:
    """A configuration of four layers, 32 hidden numbers and 64 tokens. Raises what its class raises."""
    return _small(CONFIG_MAPPING[model_type])


def _small(cls: Any) -> PreTrainedConfig:
    default = cls().to_dict()
    chosen = {name: value for name, value in SIZES.items() if default.get(name) is not None}
    if "qk_rope_head_dim" in chosen:
        chosen.pop("head_dim", None)  # it is derived, and each head has a key of its own
        chosen["num_key_value_heads"] = SIZES["num_attention_heads"]
    for name, part in cls.sub_configs.items():
        kind = (default.get(name) or {}).get("model_type") or getattr(part, "model_type", "")
        if kind:
            chosen[name] = _small(CONFIG_MAPPING[kind] if kind in CONFIG_MAPPING else part).to_dict()  # noqa: SIM401 (it is lazy)
    return cls(**chosen | BESIDES.get(cls.model_type, {}))
