"""The defenses that notebooks 08 and 14 compare, and what they are compared by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import pandas as pd
import torch
from torch import Tensor

from cachemedic.data.text import documentation
from cachemedic.data.windows import sample_windows
from cachemedic.defenses.defense import Around, CachedTokens, Defense, cache_bytes_per_token
from cachemedic.defenses.heuristics import blind_defenses
from cachemedic.defenses.storage_defenses import storage_defenses
from cachemedic.evaluation.experiments import calibration_of
from cachemedic.models.load import Base
from cachemedic.models.shape import ModelShape
from cachemedic.repair.operator import RepairOperator
from cachemedic.studies.family_study import folded
from cachemedic.studies.run import Run
from cachemedic.token.layerwise.calibration import vectors_of
from cachemedic.token.layerwise.operator import TokenAware
from cachemedic.token.layerwise.scrub import Scrubber
from cachemedic.training.config import TrainConfig
from cachemedic.training.trainer import load_or_train

Name = TypeVar("Name")

HEURISTICS = ("none", "clip_renormalise", "range_restriction")


def comparison_defenses(base: Base, examples: int = 64) -> tuple[dict[str, Defense], dict[str, Defense]]:
    """The heuristics, and the defenses with protected storage, that operators are compared with, by name."""
    calibration = calibration_of(base, examples)
    heuristics = blind_defenses(calibration)
    return {name: heuristics[name] for name in HEURISTICS}, storage_defenses(calibration)


def trained(
    base: Base, configs: Mapping[Name, TrainConfig], run: Run, retrain: bool = False
) -> dict[Name, RepairOperator]:
    """The operators of named conditions, those that ship or newly trained ones."""
    return {
        name: load_or_train(base, config, run.trained, run.work, run.retrain or retrain)
        for name, config in configs.items()
    }


def scrubbers(base: Base, configs: Mapping[Name, TrainConfig], run: Run, retrain: bool = False) -> dict[Name, Scrubber]:
    """What reads a damaged cache with each of the `trained` operators of families D and E."""
    operators = trained(base, configs, run, retrain).items()
    return {name: Scrubber(base.model, cast(TokenAware, operator)) for name, operator in operators}


def linear_operators(base: Base, seeds: Sequence[int], run: Run, smoke: bool) -> dict[str, RepairOperator]:
    """A, B and C under the canonical objective, and without its contraction term."""
    configs = folded(base, seeds, smoke)
    stacks = trained(base, configs, run, smoke)
    conditions = ("", ", no contraction")
    return {
        f"{family}{condition}": RepairOperator.stack([stack.select(i) for i in configs[family].runs_of(place)])
        for family, stack in stacks.items()
        for place, condition in enumerate(conditions)
    }


def bytes_per_token(base: Base, defenses: Mapping[str, Defense]) -> pd.DataFrame:
    """Columns reader, bits_per_token, share: what a defense keeps, in bits and over a bf16 cache."""
    whole = cache_bytes_per_token(ModelShape.of(base.model.config))
    rows = [(name, 8 * defense.bytes_per_token, defense.bytes_per_token / whole) for name, defense in defenses.items()]
    return pd.DataFrame(rows, columns=["reader", "bits_per_token", "share"])


@dataclass(frozen=True, eq=False)
class OneSide(Around):
    """A defense of which only the repaired keys, or only the values, are used: side is "k" or "v"."""

    side: str

    def read(self, damaged: CachedTokens, kept: Any) -> CachedTokens:
        return replace(damaged, **{self.side: getattr(self.inner.read(damaged, kept), self.side)})


class SketchSwapped(Around):
    """An attacker who can write the sketch: what is kept of every example is that of the next one of the batch."""

    def write(self, clean: CachedTokens) -> Any:
        kept = self.inner.write(clean)
        return None if kept is None else [codes.roll(-1, 0) for codes in kept]


@torch.inference_mode()
def rate_distortion(base: Base, codes: Mapping[str, Scrubber], samples: int = 24) -> pd.DataFrame:
    """Error of codes beside the Gaussian rate-distortion curves, on clean text that nothing was fitted to.

    Columns kind, share (of a bf16 cache), distortion: mean squared error over the variance of clean token vectors,
    in units of the transform's scale, for a token that is lost entirely. "joint" and "by layer" are the curves of
    reverse water-filling (Cover and Thomas, section 10.3.3) on the covariance over all layers, or of each alone,
    without what token ids tell; a name of `codes` is that operator's sketch.
    """
    windows = vectors_of(base, sample_windows(base, documentation("validation"), samples, 288, seed=9))
    any_code = next(iter(codes.values()))
    transform = any_code.transform
    z = transform.standardise(windows.x)
    is_first = windows.positions == 0
    inner = z[:, :, 1:].transpose(1, 2).flatten(0, 1)  # [tokens, P, D]
    centred = inner - inner.mean(0)
    total = centred.square().mean(0).sum()
    whole = 16 * centred[0].numel()
    flat = centred.flatten(1).double()
    joint = torch.linalg.eigvalsh(flat.T @ flat / len(flat)).clamp_min(0)
    layers = centred.double().transpose(0, 1)
    alone = torch.linalg.eigvalsh(layers.mT @ layers / layers.shape[1]).clamp_min(0).flatten()
    rows = []
    for kind, spectrum in (("joint", joint), ("by layer", alone)):
        for share in (1 / 1024, 1 / 512, 1 / 256, 1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8):
            rows.append((kind, share, float(_water_filling(spectrum, share * whole) / total)))
    for name, scrubber in codes.items():
        code = scrubber.operator.code
        assert code is not None  # only family E has something to draw here
        known = z[:, : scrubber.operator.known_layers]
        sketch = code.understand(code.write(z, is_first, known), is_first, known)
        coded = range(known.shape[1], z.shape[1])
        decoded = torch.cat([known, torch.stack([code.reconstruct(layer, sketch)[1] for layer in coded], 1)], 1)
        error = (decoded - z)[:, :, 1:].square().mean((0, 2)).sum()
        rows.append((name, code.bits_per_token / whole, float(error / total)))
    return pd.DataFrame(rows, columns=["kind", "share", "distortion"])


def _water_filling(spectrum: Tensor, bits: float) -> Tensor:
    """Least total squared error of a Gaussian vector with this spectrum at so many bits."""
    low, high = torch.zeros(()).double(), spectrum.max()
    for _ in range(60):  # bisection on the water level
        level = (low + high) / 2
        rate = 0.5 * torch.log2((spectrum / level).clamp_min(1)).sum()
        low, high = (level, high) if rate > bits else (low, level)
    return torch.minimum(spectrum, high).sum()
