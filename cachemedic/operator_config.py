"""What defines an operator besides its weights: its family, its place, and the shape of the model it was made for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from operator import index
from typing import Any

from transformers import PreTrainedConfig

APPLY_TO = ("K", "V", "KV")


def nearest_valid(kind: str, value: object, allowed: Iterable[str]) -> ValueError:
    """The error for an unknown name: the value, the nearest valid one and all that are allowed."""
    names = sorted(allowed)
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ValueError(f"unknown {kind} {value!r}: {hint}allowed: {', '.join(map(repr, names)) or 'none'}")


def _whole(name: str, value: Any) -> int:
    """`value` as a plain int; raises `TypeError` unless it is an integer of some kind."""
    try:
        return int(index(value))
    except TypeError:
        raise TypeError(f"{name} must be a whole number, not {value!r}") from None


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

        Raises `ValueError` for models with an encoder, and where keys and values are not of one width.
        """
        if config.is_encoder_decoder:
            raise ValueError(
                f"{config.model_type} has an encoder, whose attention and the attention to it would be repaired too: "
                "choose a model that is a decoder only"
            )
        config = config.get_text_config(decoder=True)
        heads = config.num_attention_heads
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
            num_layers=config.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=head_dim,
        )


@dataclass(frozen=True)
class OperatorConfig:
    """Definition of an operator; JSON-able by `as_json`.

    `options` are those of the family (see its class). Raises `ValueError` for a value outside of what the model allows,
    `TypeError` for a layer, rank or number of runs that is no integer.
    """

    family: str
    layers: tuple[int, ...]
    rank: int
    apply_to: str
    runs: int
    model: ModelShape
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # NumPy's integers would be refused by JSON
        object.__setattr__(self, "layers", tuple(_whole("a layer", layer) for layer in self.layers))
        for name in ("rank", "runs"):
            object.__setattr__(self, name, _whole(name, getattr(self, name)))
        if self.apply_to not in APPLY_TO:
            raise nearest_valid("apply_to", self.apply_to, APPLY_TO)
        if not self.layers or len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers must be one or more distinct layer numbers, not {list(self.layers)}")
        last = self.model.num_layers - 1
        for layer in self.layers:
            if not 0 <= layer <= last:
                raise ValueError(f"layer {layer} is out of range: the model has layers 0 to {last}")
        if not 1 <= self.rank <= self.model.head_dim:
            raise ValueError(f"rank {self.rank} is out of range: allowed are 1 to the head size, {self.model.head_dim}")
        if self.runs < 1:
            raise ValueError(f"runs must be 1 or more, not {self.runs}")

    @property
    def sides(self) -> tuple[str, ...]:
        """Which tensors are repaired, a subset of ("k", "v")."""
        return tuple(self.apply_to.lower())

    def as_json(self) -> dict[str, Any]:
        """A dictionary of JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> OperatorConfig:
        """The inverse of `as_json`; an unknown or missing key is an error."""
        known = {f.name for f in fields(cls)}
        for key in record:
            if key not in known:
                raise nearest_valid("key of an operator's configuration", key, known)
        if missing := known - set(record):
            raise ValueError(f"an operator's configuration lacks {', '.join(sorted(missing))}")
        model = ModelShape(**record["model"])
        return cls(**{**record, "layers": tuple(record["layers"]), "model": model})
