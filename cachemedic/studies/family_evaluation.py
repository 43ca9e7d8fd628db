"""The readers that notebooks 08 and 14 compare, and what they are compared by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pandas as pd
import torch
from torch import Tensor

from cachemedic.data.text import documentation
from cachemedic.data.windows import sample_windows
from cachemedic.defenses.clean_ranges import CacheStatistics
from cachemedic.defenses.heuristics import Defence, Defended, blind_defences
from cachemedic.defenses.rivals import rivals
from cachemedic.defenses.safeguards import Safeguard, cache_bits_per_token
from cachemedic.evaluation.decoding import clean_pass
from cachemedic.evaluation.evaluate import Reader
from cachemedic.evaluation.experiments import standard_tasks
from cachemedic.models.load import Base
from cachemedic.models.shape import ModelShape
from cachemedic.repair.operator import RepairOperator
from cachemedic.studies.family_study import folded
from cachemedic.studies.report import Run
from cachemedic.token.calibration import vectors_of
from cachemedic.token.scrub import Codes, Scrubber
from cachemedic.training.config import TrainConfig
from cachemedic.training.trainer import load_or_train

Name = TypeVar("Name")

HEURISTICS = ("none", "clip_renormalise", "range_restriction")


@dataclass(frozen=True, eq=False)
class Yardsticks:
    """What is measured on clean caches of the calibration split: blind heuristics and rivals, by name."""

    blind: Mapping[str, Defence]
    rivals: Mapping[str, Safeguard]

    @classmethod
    def measure(cls, base: Base, examples: int = 64) -> Yardsticks:
        task = standard_tasks(base, "calibration", [0], {"perplexity": examples})["perplexity"]
        clean = clean_pass(base.model, task)
        statistics = CacheStatistics.measure(clean.k, clean.v, task.prefix_mask)
        shape = ModelShape.of(base.model.config)
        blind = {name: defence for name, defence in blind_defences(statistics).items() if name in HEURISTICS}
        return cls(blind, rivals(clean.k, clean.v, task.prefix_mask, shape))


def trained(
    base: Base, configs: Mapping[Name, TrainConfig], run: Run, retrain: bool = False
) -> dict[Name, RepairOperator]:
    """The operators of named conditions, those that ship or newly trained ones."""
    return {
        name: load_or_train(base, config, run.trained, run.work, run.retrain or retrain)
        for name, config in configs.items()
    }


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


def bytes_per_token(base: Base, readers: Mapping[str, Reader]) -> pd.DataFrame:
    """Columns reader, bits_per_token, share: what a reader keeps, in bits and over a bf16 cache."""
    whole = cache_bits_per_token(ModelShape.of(base.model.config))
    bits = {name: reader.bits_per_token() if isinstance(reader, Safeguard) else 0.0 for name, reader in readers.items()}
    return pd.DataFrame(
        [(name, b, b / whole) for name, b in bits.items()], columns=["reader", "bits_per_token", "share"]
    )


class OneSide(Safeguard):
    """A safeguard of which only the repaired keys, or only the values, are used: side is "k" or "v"."""

    def __init__(self, scrubber: Scrubber, side: str) -> None:
        self.scrubber, self.side = scrubber, side

    @property
    def runs(self) -> int:
        return self.scrubber.runs

    def bits_per_token(self) -> float:
        return self.scrubber.bits_per_token()

    def write(self, k: Tensor, v: Tensor, ids: Tensor, valid: Tensor) -> Codes:
        return self.scrubber.write(k, v, ids, valid)

    def read(self, k: Tensor, v: Tensor, ids: Tensor, valid: Tensor, kept: Any) -> Defended:
        read = self.scrubber.read(k, v, ids, valid, kept)
        return Defended(read.k, v) if self.side == "k" else Defended(k, read.v)


class SketchSwapped(OneSide):
    """An attacker who can write the sketch: what is kept of every example is that of the next one of the batch."""

    def __init__(self, scrubber: Scrubber) -> None:
        super().__init__(scrubber, "kv")

    def write(self, k: Tensor, v: Tensor, ids: Tensor, valid: Tensor) -> Codes:
        kept = self.scrubber.write(k, v, ids, valid)
        return None if kept is None else [codes.roll(-1, 0) for codes in kept]

    def read(self, k: Tensor, v: Tensor, ids: Tensor, valid: Tensor, kept: Any) -> Defended:
        return self.scrubber.read(k, v, ids, valid, kept)


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
