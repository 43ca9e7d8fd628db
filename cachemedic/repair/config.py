"""What defines an operator besides its weights: its family, its place, and the shape of the model it was made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from typing import Any

from cachemedic.core.errors import nearest_valid
from cachemedic.core.integers import LONGEST, whole_number, whole_numbers
from cachemedic.models.shape import ModelShape

APPLY_TO = ("K", "V", "KV")


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
        # numbers of NumPy, and fractions, would be refused by JSON
        object.__setattr__(self, "layers", whole_numbers("layers", self.layers))
        object.__setattr__(self, "rank", whole_number("rank", self.rank))
        object.__setattr__(self, "runs", whole_number("runs", self.runs, 1, LONGEST))
        object.__setattr__(self, "options", {name: _plain(value) for name, value in self.options.items()})
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


def _plain(value: Any) -> Any:
    if isinstance(value, Fraction):
        return float(value)
    return value.item() if getattr(value, "ndim", None) == 0 else value
