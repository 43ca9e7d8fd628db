"""Valence-weighted distillation: L_i = w_i (l1 soft + l2 feature + l3 sequence + l4 valence + l5 regularisation).

The second objective for the students of `cachemedic.training.objective`, per sequence i. Its terms are in
`terms`, its weights in `weights`, and what the weights are computed from in `saliency`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from cachemedic.core.errors import nearest_valid
from cachemedic.training.step_data import StepOutputs, ValenceStep
from cachemedic.training.valence.saliency import ALPHA, saliency
from cachemedic.training.valence.terms import (
    contrastive,
    cross_entropy,
    kd_feature,
    kd_sequence,
    kd_soft,
    valence_future,
    weight_decay,
)
from cachemedic.training.valence.weights import valence_weights

# Ranges of the typical values; 0 leaves a term, or the weights, out.
RANGES = {
    "lambda_soft": (0.7, 0.9),
    "lambda_feature": (0.3, 0.5),
    "lambda_sequence": (0.2, 0.4),
    "lambda_valence": (0.4, 0.7),
    "lambda_reg": (1e-5, 1e-4),
    "lam": (5.0, 8.0),
    "temperature": (4.0, 8.0),
}
FEATURES = ("hidden", "attention", "both")
WEIGHTINGS = ("sequence", "batch mean", "shuffled")
PRESETS: Mapping[str, dict[str, Any]] = {
    "canonical": {},
    "excerpt": {
        "lambda_ce": 1.0,
        "lambda_soft": 0.8,
        "lambda_feature": 0.0,
        "lambda_sequence": 0.0,
        "lambda_valence": 0.6,
        "lambda_reg": 0.0,
        "lam": 6.0,
        "normalise": False,
        "weighting": "batch mean",
    },
}


@dataclass(frozen=True)
class ValenceObjective:
    """The weighted sum of the terms, one value a run; every lambda and the temperature may be 0 (a term left out) or in
    its range of `RANGES` (the temperature in its range).

    lam: strength of the weights, 0 for uniform ones; `learn_lam`: where learning it begins. alpha: of the saliency.
    normalise, max_weight: see `valence_weights`. weighting: "sequence" (w_i for sequence i), "shuffled" (the weights of
    the batch in random order, a control) or "batch mean" (all sequences by the mean weight).
    features: "hidden" states, "attention" outputs or "both". sampled: tokens a sequence is sampled for.
    contrastive: weight of the contrastive term within the regularisation. lambda_ce: weight of the cross-entropy of the
    tokens of the text, part of the preset "excerpt" only.
    """

    lambda_soft: float = 0.8
    lambda_feature: float = 0.4
    lambda_sequence: float = 0.3
    lambda_valence: float = 0.55
    lambda_reg: float = 5e-5
    lambda_ce: float = 0.0
    lam: float = 6.5
    temperature: float = 6.0
    alpha: tuple[float, float, float, float] = ALPHA
    normalise: bool = True
    max_weight: float | None = None
    weighting: str = "sequence"
    learn_lam: bool = False
    features: str = "both"
    sampled: int = 4
    contrastive: float = 0.0

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            off = value == 0 and name != "temperature"
            if not (off or low <= value <= high):
                zero = "" if name == "temperature" else "0 (off) or "
                raise ValueError(f"{name} must be {zero}{low:g} to {high:g}, not {value!r}")
        for name in ("lambda_ce", "contrastive"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must be a finite number from 0 upwards, not {getattr(self, name)!r}")
        for name, allowed in (("weighting", WEIGHTINGS), ("features", FEATURES)):
            if getattr(self, name) not in allowed:
                raise nearest_valid(name, getattr(self, name), allowed)
        if self.sampled < 1:
            raise ValueError(f"sampled must be at least 1 token, not {self.sampled}")
        if self.learn_lam and not self.lam:
            raise ValueError("learn_lam begins at lam, which must not be 0")
        valence_weights(torch.zeros(1), self.lam, self.normalise, self.max_weight)  # refuses options out of range

    @staticmethod
    def preset(name: str, **changes: Any) -> ValenceObjective:
        """A named set of values, "canonical" or "excerpt" (the source's code excerpt), with `changes`."""
        if name not in PRESETS:
            raise nearest_valid("preset", name, PRESETS)
        known = [f.name for f in fields(ValenceObjective)]
        for key in changes:
            if key not in known:
                raise nearest_valid("field of the valence objective", key, known)
        return ValenceObjective(**{**PRESETS[name], **changes})

    @property
    def tokens_sampled(self) -> int:
        """How many tokens each student has to sample for it."""
        return self.sampled if self.lambda_sequence else 0

    def __call__(self, step: StepOutputs) -> dict[str, torch.Tensor]:
        """`loss`, its parts `kd`, `feature`, `sequence`, `valence`, `regularisation`, `cross_entropy`, unweighted means
        over the batch, and `effective`, the effective number of sequences of the weights; [R] each."""
        view = step.valence
        if view is None:
            raise ValueError("the valence objective needs the valence view of a step (`StepOutputs.valence`)")
        terms = self.terms(step)
        total = sum(weight * terms[name] for name, weight in self._lambdas().items() if weight)
        weights = self.weights(step)  # [R, B]
        if self.weighting == "batch mean":
            weights = weights.mean(1, keepdim=True).expand_as(weights)
        effective = weights.sum(1).square() / weights.square().sum(1)
        return {
            "loss": (weights * total).mean(1),
            **{name: value.mean(1) for name, value in terms.items()},
            "effective": effective.detach(),
        }

    def terms(self, step: StepOutputs) -> dict[str, torch.Tensor]:
        """The terms that are not left out, each for every sequence [R, B], without their lambdas."""
        view = step.valence
        assert view is not None  # `__call__` checks it
        terms = {}
        if self.lambda_soft:
            terms["kd"] = kd_soft(step.z_clean, step.z_rep, self.temperature)
        if self.lambda_feature:
            terms["feature"] = self._feature(view)
        if self.lambda_sequence:
            assert view.sampled_clean is not None  # by `tokens_sampled`
            assert view.sampled_rep is not None
            terms["sequence"] = kd_sequence(view.sampled_clean, view.sampled_rep)
        if self.lambda_valence:
            terms["valence"] = valence_future(view.future_rep, view.future_clean)
        if self.lambda_reg:
            runs, samples = step.z_rep.shape[:2]
            decay = weight_decay(view.steps or [], runs).to(step.z_rep.device)
            terms["regularisation"] = decay[:, None].expand(runs, samples)
            if self.contrastive:
                pooled = (x[:, :, -1].mean(2) for x in (view.hidden_clean, view.hidden_rep))  # over tokens
                terms["regularisation"] = terms["regularisation"] + self.contrastive * contrastive(*pooled)
        if self.lambda_ce:
            terms["cross_entropy"] = cross_entropy(step.z_rep[:, :, :-1], view.targets)
        return terms

    def weights(self, step: StepOutputs) -> torch.Tensor:
        """The weights of the sequences [R, B]; they carry no gradient unless lambda is learned."""
        view = step.valence
        assert view is not None
        salient = saliency(view.future_clean, step.z_clean, self.alpha)
        if self.weighting == "shuffled":
            salient = salient.gather(1, view.order)
        lam = view.strength[:, None] if self.learn_lam and view.strength is not None else self.lam
        return valence_weights(salient, lam, self.normalise, self.max_weight)

    def _lambdas(self) -> dict[str, float]:
        return {
            "kd": self.lambda_soft,
            "feature": self.lambda_feature,
            "sequence": self.lambda_sequence,
            "valence": self.lambda_valence,
            "regularisation": self.lambda_reg,
            "cross_entropy": self.lambda_ce,
        }

    def _feature(self, view: ValenceStep) -> torch.Tensor:
        pairs = {
            "hidden": (view.hidden_clean, view.hidden_rep),
            "attention": (view.attention_clean, view.attention_rep),
        }
        chosen = pairs.values() if self.features == "both" else [pairs[self.features]]
        return torch.stack([kd_feature(teacher, student) for teacher, student in chosen]).sum(0)
