"""Repair operators: what every family shares.

An operator is a stack of R runs (the leading axis of every parameter), so that all runs of a sweep train in one pass of
the frozen model over R * B rows, run-major: row = run * B + sample. One run, R = 1, is the plain case.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from cachemedic.core.errors import check_given, nearest_valid
from cachemedic.core.files import digest, read_sealed, replace_together, seal
from cachemedic.core.integers import LARGEST_SEED, LONGEST, seed_number, whole_number, whole_numbers
from cachemedic.defenses.defense import Defense
from cachemedic.models.shape import ModelShape
from cachemedic.repair.attach import protect
from cachemedic.repair.attention import Attention, Gates
from cachemedic.repair.config import OperatorConfig
from cachemedic.repair.registry import family_class
from cachemedic.repair.shipped import CONFIG, operator_folder
from cachemedic.repair.trainable import Trainable

WEIGHTS, STATISTICS = "operator.safetensors", "statistics.json"


class RepairOperator(nn.Module, Trainable, ABC):
    """A stack of R repair operators for the attention of some layers of one model.

    Make one with `create` or `from_pretrained`; use it with `cachemedic.repair.attach.protect`. A family says how its
    parameters start (`initial_parameters`) and what it does around attention (`attend`), or else to stored tokens, see
    `cachemedic.token.token_repair.TokenOperator`.
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
            TypeError: for a layer, a rank, a seed or an option of another kind, or a model in place of its
                configuration.
        """
        cls = family_class(family)
        for name in options:
            if name not in cls.default_options:
                raise nearest_valid(f"option of operator family {family}", name, cls.default_options)
        for name, default in cls.default_options.items():
            if isinstance(default, bool) and name in options:
                check_given(name, options[name], bool)
        runs = whole_number("runs", runs, 1, LONGEST)
        if isinstance(seed, Iterable) and getattr(seed, "ndim", None) != 0:  # one number of NumPy or torch is no list
            seeds = list(whole_numbers("seed", seed, 0, LARGEST_SEED))
        else:
            seeds = [seed_number(seed_number(seed) + run) for run in range(runs)]
        if len(seeds) != runs:
            raise ValueError(f"seed holds {len(seeds)} numbers for {runs} runs; give one number a run, or a single one")
        shape = ModelShape.of(model_config)
        if isinstance(layers, str):
            if layers != "all":
                raise ValueError(f"layers must be layer numbers or 'all', not {layers!r}")
            layers = range(shape.num_layers)
        config = OperatorConfig(
            family=family,
            layers=tuple(sorted(whole_numbers("layers", layers))),
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
    def runs(self) -> int:
        return self.config.runs

    @property
    def fixed_bytes(self) -> int:
        return sum(p.nbytes for p in self.parameters()) // self.runs

    @property
    def head_dim(self) -> int:
        return self.config.model.head_dim

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def attach(self, model: PreTrainedModel) -> AbstractContextManager[Any]:
        """A context within which `model` reads its cache through this operator, see `protect`."""
        return protect(model, self)

    @property
    def idle_because(self) -> str | None:
        """Why this operator would change nothing inside attention; None if it may change something."""
        return None

    def defense(self, model: PreTrainedModel) -> Defense:
        """This operator at work on the caches of `model`, to be measured beside other defenses."""
        return self

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
        record = self.config.as_json() | {"sha256": digest(weights)}
        beside = self._files_beside()
        if STATISTICS in beside:
            statistics = beside[STATISTICS]
            record["statistics"] = None if statistics is None else digest(statistics)
        replace_together(Path(folder), beside | {WEIGHTS: weights, CONFIG: seal(record)}, last=CONFIG)

    @staticmethod
    def from_pretrained(name_or_folder: str | Path) -> RepairOperator:
        """Read what `save_pretrained` wrote (on the CPU): from a folder, by a name like "E/embedded-gpt2", or a hub.

        The names are those of `cachemedic.repair.shipped.shipped_operators()`. Any other "org/name" is a repository of
        the Hugging Face hub with the files of such a folder.

        Raises:
            FileNotFoundError: if there is no such folder, or the weights or `config.json` are missing in it.
            ValueError: for an unknown name, if the hub cannot be reached or holds no operator there, if a file is
                damaged, or if the files do not belong together.
        """
        check_given("name_or_folder", name_or_folder, (str, Path))
        folder = operator_folder(name_or_folder)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} is no saved operator: it has no file {name}")
        record = read_sealed(folder / CONFIG)
        try:
            expected, statistics = record.pop("sha256"), record.pop("statistics", None)
            config = OperatorConfig.from_json(record)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / CONFIG} is damaged: {error!r}") from error
        weights = (folder / WEIGHTS).read_bytes()
        found = digest(weights)
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
        operator = cls(config, {name: parameters[name] for name in fresh})  # in the order of a new operator
        operator._read_beside(folder, statistics)
        return operator

    def _files_beside(self) -> dict[str, bytes | None]:
        """Hook for families that keep more in their folder than their parameters: files, None for one to remove.

        `statistics.json` names the content of the others.
        """
        return {}

    def _read_beside(self, folder: Path, named: str | None) -> None:
        """The inverse hook. `named`: sha256 of `statistics.json`, None if the operator has none."""
