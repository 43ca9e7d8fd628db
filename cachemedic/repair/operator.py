"""Repair operators: what every family shares.

An operator is a stack of R runs (the leading axis of every parameter), so that all runs of a sweep train in one pass of
the frozen model over R * B rows, run-major: row = run * B + sample. One run, R = 1, is the plain case.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from cachemedic.core.errors import nearest_valid
from cachemedic.core.files import replace_together
from cachemedic.models.shape import ModelShape
from cachemedic.repair.config import OperatorConfig
from cachemedic.repair.registry import family_class

WEIGHTS, CONFIG, STATISTICS = "operator.safetensors", "config.json", "statistics.json"
UNNAMED = "unnamed"  # statistics of folders that were written before their `config.json` named them

Gates = tuple[Tensor | None, Tensor | None]


class Attention(Protocol):
    """A model's own attention in one layer, its mask and scaling included; heads may be wider than the model's."""

    @property
    def scaling(self) -> float:
        """What logits are multiplied by, whatever the width of the heads."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        """query [R*B, H, M, n], key and value [R*B, G, T, n] -> (output [R*B, M, H, n], weights or None)."""


class Reader(Protocol):
    """What `cachemedic.repair.attach.protect` attaches to a model: an operator, or what it has found in one cache."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Whose attention it changes."""

    @property
    def runs(self) -> int:
        """How many runs read the rows of a batch, a block of rows each."""

    @property
    def device(self) -> torch.device:
        """Where its numbers are."""

    def check_model(self, model_config: PreTrainedConfig) -> None:
        """Raise `ValueError` for a model of another shape."""

    def of_rows(self, rows: slice | Tensor) -> Reader:
        """What reads these rows of a batch."""

    def attend(
        self, layer: int, attention: Attention, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor | None, Gates]:
        """Attention of one layer, see `RepairOperator.attend`."""


class RepairOperator(nn.Module, ABC):
    """A stack of R repair operators for the attention of some layers of one model.

    Make one with `create` or `from_pretrained`; use it with `cachemedic.repair.attach.protect`. A family says how its
    parameters start (`initial_parameters`) and what it does around attention (`attend`).
    """

    default_options: dict[str, Any] = {}

    def __init__(self, config: OperatorConfig, parameters: dict[str, Tensor]) -> None:
        """From a definition and its parameters, [R, ...] each."""
        super().__init__()
        self.config = config
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    @staticmethod
    def create(
        family: str,
        model_config: PreTrainedConfig,
        layers: Iterable[int] | str = "all",
        rank: int = 8,
        apply_to: str = "KV",
        seed: int | Sequence[int] = 0,
        runs: int = 1,
        **options: Any,
    ) -> RepairOperator:
        """A new operator, the exact identity, for the model that `model_config` describes.

        Args:
            family: "A", "B" or "C", see `cachemedic.repair.folded`, "D" or "E", see `cachemedic.token`, or a name of
                your own, see `cachemedic.repair.registry`.
            layers: which layers to protect, or "all".
            rank: r, at most the head size.
            apply_to: "K", "V" or "KV".
            seed: of the initialisation: one number a run, or the first of R consecutive ones. A run's parameters depend
                on its own seed alone.
            runs: R.
            options: of the family, for example `gate_hidden`.

        Raises:
            ValueError: for an unknown family or option, or a value that the model does not allow.
            TypeError: for a layer or a rank that is no integer.
        """
        cls = family_class(family)
        for name in options:
            if name not in cls.default_options:
                raise nearest_valid(f"option of operator family {family}", name, cls.default_options)
        seeds = list(range(seed, seed + runs)) if isinstance(seed, int) else list(seed)
        if len(seeds) != runs:
            raise ValueError(f"seed holds {len(seeds)} numbers for {runs} runs; give one number a run, or a single one")
        shape = ModelShape.of(model_config)
        if isinstance(layers, str):
            if layers != "all":
                raise ValueError(f"layers must be layer numbers or 'all', not {layers!r}")
            layers = range(shape.num_layers)
        config = OperatorConfig(
            family=family,
            layers=tuple(sorted(layers)),
            rank=rank,
            apply_to=apply_to,
            runs=runs,
            model=shape,
            options=cls.default_options | options,
        )
        per_run = [cls.initial_parameters(config, torch.Generator().manual_seed(s)) for s in seeds]
        return cls(config, {name: torch.stack([p[name] for p in per_run]) for name in per_run[0]})

    @classmethod
    @abstractmethod
    def initial_parameters(cls, config: OperatorConfig, generator: torch.Generator) -> dict[str, Tensor]:
        """The parameters of one run (no run axis), the exact identity, drawn from `generator` only."""

    @abstractmethod
    def attend(
        self, layer: int, attention: Attention, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor | None, Gates]:
        """Repaired attention of one layer.

        `attention` is the model's own and may be called on changed tensors. Returns the repaired output [R*B, M, H, d]
        and weights, and the gates that were used.
        """

    @property
    def family(self) -> str:
        return self.config.family

    @property
    def layers(self) -> tuple[int, ...]:
        return self.config.layers

    @property
    def rank(self) -> int:
        return self.config.rank

    @property
    def apply_to(self) -> str:
        return self.config.apply_to

    @property
    def runs(self) -> int:
        return self.config.runs

    @property
    def head_dim(self) -> int:
        return self.config.model.head_dim

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def of_rows(self, rows: slice | Tensor) -> RepairOperator:
        """What reads these rows of a batch: an operator treats all rows alike."""
        return self

    def num_parameters(self) -> int:
        """Trainable numbers of one run."""
        return sum(p.numel() for p in self.parameters()) // self.runs

    def check_model(self, model_config: PreTrainedConfig) -> None:
        """Raise `ValueError` if this operator was made for a model of another shape."""
        shape = ModelShape.of(model_config)
        if shape != self.config.model:
            raise ValueError(f"this operator was made for {self.config.model}, but the model has {shape}")

    def select(self, run: int) -> RepairOperator:
        """Run number `run` as an operator of its own (R = 1), a copy."""
        if not 0 <= run < self.runs:
            raise ValueError(f"run {run} is out of range: this operator has runs 0 to {self.runs - 1}")
        parameters = {name: p.detach()[run : run + 1].clone() for name, p in self.named_parameters()}
        return self._like(replace(self.config, runs=1), parameters)

    @staticmethod
    def stack(operators: Sequence[RepairOperator]) -> RepairOperator:
        """All runs of `operators`, which may differ only in their number of runs, as one operator (a copy)."""
        definitions = {str(replace(op.config, runs=1)) for op in operators}
        if len(definitions) != 1:
            raise ValueError(f"only operators of one definition stack; got {sorted(definitions) or 'none'}")
        first = operators[0]
        if len({op._held() for op in operators}) != 1:
            raise ValueError("only operators of the same statistics of clean tokens stack: these were calibrated apart")
        parameters = {
            name: torch.cat([op.get_parameter(name).detach() for op in operators])
            for name, _ in first.named_parameters()
        }
        return first._like(replace(first.config, runs=sum(op.runs for op in operators)), parameters)

    def _like(self, config: OperatorConfig, parameters: dict[str, Tensor]) -> RepairOperator:
        """An operator of other parameters that shares whatever else this one holds."""
        return type(self)(config, parameters)

    def _held(self) -> object:
        """What tells apart what operators of one definition hold beside their parameters."""
        return None

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `operator.safetensors`, `config.json` and what the family keeps beside them into `folder`, as one.

        A save that fails to write leaves the operator that was there; one that is killed while it replaces files leaves
        none.
        """
        weights = safetensors.torch.save({name: p.detach().contiguous() for name, p in self.named_parameters()})
        record = self.config.as_json() | {"sha256": hashlib.sha256(weights).hexdigest()}
        beside = self._files_beside()
        if STATISTICS in beside:
            statistics = beside[STATISTICS]
            record["statistics"] = None if statistics is None else hashlib.sha256(statistics).hexdigest()
        config = (json.dumps(record, indent=2) + "\n").encode()
        replace_together(Path(folder), beside | {WEIGHTS: weights, CONFIG: config}, last=CONFIG)

    @staticmethod
    def from_pretrained(folder: str | Path) -> RepairOperator:
        """Read what `save_pretrained` wrote (on the CPU).

        Raises:
            FileNotFoundError: if the weights or `config.json` are missing.
            ValueError: if a file is damaged or they do not belong together.
        """
        folder = Path(folder)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} is no saved operator: it has no file {name}")
        try:
            record = json.loads((folder / CONFIG).read_text())
            expected, statistics = record.pop("sha256"), record.pop("statistics", UNNAMED)
            config = OperatorConfig.from_json(record)
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / CONFIG} is damaged: {error!r}") from error
        weights = (folder / WEIGHTS).read_bytes()
        found = hashlib.sha256(weights).hexdigest()
        if found != expected:
            raise ValueError(
                f"{folder / WEIGHTS} is damaged or not of this {CONFIG}: sha256 {found[:16]} is not {expected[:16]}"
            )
        cls = family_class(config.family)
        parameters = safetensors.torch.load(weights)
        found_shapes = {name: (*p.shape,) for name, p in parameters.items()}
        fresh = cls.initial_parameters(config, torch.Generator())
        if found_shapes != {name: (config.runs, *p.shape) for name, p in fresh.items()}:
            raise ValueError(
                f"the weights in {folder} do not have the shapes that its {CONFIG} defines: {found_shapes}"
            )
        operator = cls(config, parameters)
        operator._read_beside(folder, statistics)
        return operator

    def _files_beside(self) -> dict[str, bytes | None]:
        """Hook for families that keep more in their folder than their parameters: files, None for one to remove.

        `statistics.json` names the content of the others.
        """
        return {}

    def _read_beside(self, folder: Path, named: str | None) -> None:
        """The inverse hook. `named`: sha256 of `statistics.json`, None if the operator has none, or `UNNAMED`."""
