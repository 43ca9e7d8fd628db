"""The defenses that the studies of families compare, and what they are compared by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pandas as pd
import torch
from torch import Tensor

from cachemedic.data.text import documentation
from cachemedic.data.windows import sample_windows
from cachemedic.defenses.defense import Around, CachedTokens, Defense, cache_bytes_per_token
from cachemedic.defenses.heuristics import blind_defenses
from cachemedic.defenses.storage_defenses import storage_defenses
from cachemedic.evaluation.experiments import calibration_of
from cachemedic.models.cache import stack_cache
from cachemedic.models.load import Base
from cachemedic.models.shape import ModelShape
from cachemedic.repair.operator import RepairOperator
from cachemedic.studies.family_study import folded
from cachemedic.studies.run import Run
from cachemedic.studies.sweeps import trained
from cachemedic.token.coder import joint_operator
from cachemedic.token.joint import SINKS
from cachemedic.token.joint_calibration import clean_caches
from cachemedic.token.kept import Kept
from cachemedic.token.token_recompute import TokenRecompute
from cachemedic.token.token_repair import TokenRepair
from cachemedic.token.vectors import TokenVectors
from cachemedic.training.config import TrainConfig

Name = TypeVar("Name")

HEURISTICS = ("none", "clip_renormalise", "range_restriction")


def comparison_defenses(base: Base, examples: int = 64) -> tuple[dict[str, Defense], dict[str, Defense]]:
    """The heuristics, and the defenses that keep something, that operators are compared with, by name."""
    calibration = calibration_of(base, examples)
    heuristics = blind_defenses(calibration)
    keeping = {"recompute": TokenRecompute(base.model), **storage_defenses(calibration)}
    return {name: heuristics[name] for name in HEURISTICS}, keeping


def token_repairs(base: Base, configs: Mapping[Name, TrainConfig], run: Run) -> dict[Name, TokenRepair]:
    """What reads a damaged cache with each of the `trained` operators of families D and E."""
    operators = trained(base, configs, run, run.smoke).items()
    return {name: TokenRepair(base.model, operator) for name, operator in operators}


def code_alone(repair: TokenRepair) -> TokenRepair:
    """The same operator, where every changed token is replaced by what its code says."""
    return TokenRepair(repair.model, repair.operator, "restore")


class TokenByToken(TokenRepair):
    """The same operator where it judges each token by itself, as in training: no rotation that tokens share is undone,
    and no token is told to be another one.
    """

    @torch.no_grad()
    def read(self, damaged: CachedTokens, kept: Kept | None) -> CachedTokens:
        vectors, positions = TokenVectors(self.model, self.operator.layers), damaged.positions
        prior = self.operator.prior(self.model, damaged.ids, positions)
        k, v = self.operator.repair_with_prior(vectors, damaged.k, damaged.v, prior, positions, kept)
        return replace(damaged, k=k, v=v)


def without_trust(repair: TokenRepair) -> TokenRepair:
    """The same operator with a trust network that says nothing: the noise is as the algebra has it."""
    operator = RepairOperator.stack([repair.operator.select(run) for run in range(repair.runs)])
    for name, p in operator.named_parameters():
        if name in ("trust_out", "trust_bias"):
            p.data.zero_()
    return TokenRepair(repair.model, operator)


def linear_operators(base: Base, seeds: Sequence[int], run: Run) -> dict[str, RepairOperator]:
    """A, B and C under the canonical objective, and without its contraction term."""
    configs = folded(base, seeds, run.smoke)
    stacks = trained(base, configs, run, run.smoke)
    conditions = ("", ", no contraction")
    return {
        f"{family}{condition}": RepairOperator.stack([stack.select(i) for i in configs[family].runs_of(place)])
        for family, stack in stacks.items()
        for place, condition in enumerate(conditions)
    }


def bytes_per_token(base: Base, defenses: Mapping[str, Defense]) -> pd.DataFrame:
    """Columns reader; bits_per_token, share: what a defense keeps of a token, in bits and over a bf16 cache;
    cache_bytes, fixed_bytes: what it keeps of a cache besides, and once; prefill_share: the time of a read over that of
    a prefill of the damaged tokens.
    """
    whole = cache_bytes_per_token(ModelShape.of(base.model.config))
    rows = [
        (name, 8 * d.bytes_per_token, d.bytes_per_token / whole, d.cache_bytes, d.fixed_bytes, d.prefill_share)
        for name, d in defenses.items()
    ]
    return pd.DataFrame(
        rows, columns=["reader", "bits_per_token", "share", "cache_bytes", "fixed_bytes", "prefill_share"]
    )


@dataclass(frozen=True, eq=False)
class OneSide(Around):
    """A defense of which only the repaired keys, or only the values, are used: side is "k" or "v"."""

    side: str

    def read(self, damaged: CachedTokens, kept: Any) -> CachedTokens:
        return replace(damaged, **{self.side: getattr(self.inner.read(damaged, kept), self.side)})


class CodeSwapped(Around):
    """An attacker who can write what is kept: that of every example is that of the next one of the batch."""

    def write(self, clean: CachedTokens) -> Kept:
        return self.inner.write(clean).rows(torch.arange(len(clean.ids)).roll(-1))


@torch.inference_mode()
def rate_distortion(base: Base, codes: Mapping[str, TokenRepair], samples: int = 24) -> pd.DataFrame:
    """Error of codes beside the Gaussian rate-distortion curves, on clean text that nothing was fitted to.

    Columns kind, share (of a bf16 cache), distortion: mean squared error over the variance of clean token vectors,
    in units of the joint model's scale, for a token that is lost entirely. "joint" and "by layer" are the curves of
    reverse water-filling (Cover and Thomas, section 10.3.3) on the covariance over all layers, or of each alone,
    without what token ids tell; a name of `codes` is that operator's code.
    """
    ids = sample_windows(base, documentation("validation"), samples, 288, seed=9)
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    ((_, cache),) = clean_caches(base, ids, len(ids))
    keys, values = stack_cache(cache)
    operators = {name: joint_operator(repair.operator) for name, repair in codes.items()}
    vectors, joint = TokenVectors(base.model), next(iter(operators.values())).calibrated
    x = vectors.of(keys, values, positions)
    centred = joint.standardise(x)[:, SINKS:].flatten(0, 1)
    centred = (centred - centred.mean(0)).double()
    total, whole = centred.square().mean(0).sum(), 16 * joint.dim
    over_all = torch.linalg.eigvalsh(centred.T @ centred / len(centred)).clamp_min(0)
    layers = centred.unflatten(1, (len(joint.layers), -1)).transpose(0, 1)
    alone = torch.linalg.eigvalsh(layers.mT @ layers / layers.shape[1]).clamp_min(0).flatten()
    rows = []
    for kind, spectrum in (("joint", over_all), ("by layer", alone)):
        for share in (1 / 1024, 1 / 512, 1 / 256, 1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8):
            rows.append((kind, share, float(_water_filling(spectrum, share * whole) / total)))
    for name, operator in operators.items():
        assert operator.code is not None  # only family E has something to draw here
        prior = operator.prior(base.model, ids, positions)
        restored = joint.reconstruct(operator.code.decode(operator.code.encode(x, prior)), prior)
        error = ((restored - x) * joint.scale)[:, SINKS:].square().mean((0, 1)).sum()
        rows.append((name, 8 * operator.bytes_per_token / whole, float(error / total)))
    return pd.DataFrame(rows, columns=["kind", "share", "distortion"])


def _water_filling(spectrum: Tensor, bits: float) -> Tensor:
    """Least total squared error of a Gaussian vector with this spectrum at so many bits."""
    low, high = torch.zeros(()).double(), spectrum.max()
    for _ in range(60):  # bisection on the water level
        level = (low + high) / 2
        rate = 0.5 * torch.log2((spectrum / level).clamp_min(1)).sum()
        low, high = (level, high) if rate > bits else (low, level)
    return torch.minimum(spectrum, high).sum()
