"""The facts about a base model that an operator depends on."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

CAUSAL_ANYWAY = ("gpt_neox", "gpt_neox_japanese")  # their configurations have an `is_decoder` that they do not read


@dataclass(frozen=True)
class ModelShape:
    """The facts about a base model that an operator depends on."""

    model_type: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> ModelShape:
        """Read from a Hugging Face configuration (of the text part of a multimodal model).

        Raises `TypeError` for what is no configuration, `ValueError` for models with an encoder or without attention,
        and where keys and values are not of one width, or not of the same in all layers.
        """
        if not isinstance(config, PreTrainedConfig):
            inside = getattr(config, "config", None)
            hint = ": give model.config" if isinstance(inside, PreTrainedConfig) else ""
            raise TypeError(f"a {type(config).__name__} is no configuration of a model{hint}")
        if config.is_encoder_decoder:
            raise ValueError(
                f"{config.model_type} has an encoder, whose attention and the attention to it would be repaired too: "
                "choose a model that is a decoder only"
            )
        if getattr(config, "is_decoder", True) is False and config.model_type not in CAUSAL_ANYWAY:
            raise ValueError(f"{config.model_type} reads what comes after a token, too: set is_decoder=True")
        config = config.get_text_config(decoder=True)
        if getattr(config, "num_attention_heads", None) is None:
            raise ValueError(f"{config.model_type} has no attention heads: choose a model with attention over a cache")
        _check_layers_alike(config)
        heads = _query_heads(config)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        value_dim = getattr(config, "v_head_dim", None) or head_dim
        latent = getattr(config, "kv_lora_rank", None) is not None
        if latent or value_dim != head_dim:
            widths = f"keys of {head_dim} numbers a head and values of {value_dim}"
            found = "multi-head latent attention" if latent else widths
            raise ValueError(
                f"{config.model_type} has {found}: choose a model with multi-head, grouped-query or multi-query "
                "attention, whose keys and values are of one width"
            )
        return cls(
            model_type=config.model_type,
            num_layers=decoder_depth(config),
            num_heads=heads,
            num_kv_heads=_kv_heads(config),
            head_dim=head_dim,
        )


def decoder_depth(config: PreTrainedConfig) -> int:
    """The number of decoder layers of a model with this configuration; `num_hidden_layers` of BART is its encoder's."""
    config = config.get_text_config(decoder=True)
    return getattr(config, "decoder_layers", None) or config.num_hidden_layers


def _kv_heads(config: PreTrainedConfig) -> int:
    """The heads of keys and values, by the names that configurations have for them."""
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1  # Falcon, GPTBigCode
    for name in ("num_key_value_heads", "num_kv_heads"):
        if number := getattr(config, name, None):
            return number
    return _query_heads(config)


def _query_heads(config: PreTrainedConfig) -> int:
    """The heads of queries; where a configuration describes an encoder as well, those of the decoder."""
    return getattr(config, "decoder_attention_heads", None) or config.num_attention_heads


def _check_layers_alike(config: PreTrainedConfig) -> None:
    """Raise `ValueError` where layers have heads of their own sizes or numbers."""
    if not getattr(config, "is_heterogeneous", False):
        return
    for name in ("num_attention_heads", "num_key_value_heads", "head_dim"):
        found = sorted({number for layer in config.per_layer_config if (number := getattr(layer, name, None))})
        if len(found) > 1:
            raise ValueError(
                f"{config.model_type} has layers of different {name} ({', '.join(map(str, found))}): choose a model "
                "whose layers are alike"
            )
