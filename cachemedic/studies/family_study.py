"""What is trained to compare the operator families, by name; several studies share these conditions.

D and E begin with a trust network that was fitted to known faults, then train alike: few steps at a high learning rate
that falls to nothing, mild faults drawn more often than severe ones, which dominate the loss, and a contraction term
without a threshold, which their kind can follow. Validation decides which of a run's parameters are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cachemedic.corruption.apply import MIXTURE_WEIGHTS, Mixture
from cachemedic.models.load import Base
from cachemedic.training.bank import BankConfig
from cachemedic.training.config import TrainConfig
from cachemedic.training.objective import RepairObjective

SEVERITIES = (0.1, 0.1, 0.1, 0.25, 0.25, 0.5, 1.0)
STEPS = {"D": 200, "E": 80}
LEARNING_RATE = 1e-2
SHARES = (1 / 512, 1 / 256, 1 / 64, 1 / 32)  # beside 1/128, the default
SMALL = 1 / 256  # the share that is ablated: there is something to lose


def token_aware_config(
    base: Base, family: str, seeds: Sequence[int], smoke: bool = False, **options: Any
) -> TrainConfig:
    """How D, E or another family that repairs stored tokens is trained: faults on all layers, repair of all layers."""
    bank = BankConfig(samples=16 * len(seeds), decoded=4) if smoke else BankConfig(samples=1280, decoded=16)
    return TrainConfig(
        family=family,
        layers=tuple(range(base.config.num_hidden_layers)),
        objectives=(RepairObjective(lambda_contr=0.05, alpha_contr=0.0),),
        seeds=tuple(seeds),
        mixture=Mixture(severities=SEVERITIES),
        bank=bank,
        steps=2 if smoke else STEPS.get(family, STEPS["E"]),
        batch=4,
        lr=LEARNING_RATE,
        options=options,
        schedule="linear",
    )


def untrained(config: TrainConfig) -> TrainConfig:
    """The same with the trust network as it was fitted to known faults, before the objective."""
    return replace(config, steps=0)


def folded(base: Base, seeds: Sequence[int], smoke: bool = False) -> dict[str, TrainConfig]:
    """A, B and C at one parameter budget, within 5%, under the canonical objective and without its contraction term."""
    bank = BankConfig(samples=16 * len(seeds)) if smoke else BankConfig(samples=256 * len(seeds))
    sizes: dict[str, dict[str, Any]] = {
        "A": {"rank": 8},
        "B": {"rank": 8, "options": {"gate_hidden": 26}},
        "C": {"rank": 16, "options": {"gate_hidden": 256}},
    }
    return {
        family: TrainConfig(
            family=family,
            layers=tuple(range(base.config.num_hidden_layers)),
            objectives=(RepairObjective(), RepairObjective(lambda_contr=0.0)),
            seeds=tuple(seeds),
            bank=bank,
            steps=4 if smoke else 100,
            **size,
        )
        for family, size in sizes.items()
    }


def headline(base: Base, seeds: Sequence[int], smoke: bool = False) -> dict[str, TrainConfig]:
    """D without and with the token ids, and E at 1/128 of the bytes of the cache."""
    return {
        "D, no ids": token_aware_config(base, "D", seeds, smoke, with_ids=False),
        "D": token_aware_config(base, "D", seeds, smoke),
        "E": token_aware_config(base, "E", seeds, smoke),
    }


def before_training(base: Base, seeds: Sequence[int], smoke: bool = False) -> dict[str, TrainConfig]:
    """D and E before they are trained by the objective."""
    trained = headline(base, seeds, smoke)
    return {f"{name}, untrained": untrained(trained[name]) for name in ("D", "E")}


def shares(base: Base, seeds: Sequence[int], smoke: bool = False) -> dict[str, TrainConfig]:
    """E with other lengths of the code, before training."""
    configs = {share: token_aware_config(base, "E", seeds, smoke, share=share) for share in SHARES}
    return {f"E, 1/{1 / share:.0f}": untrained(config) for share, config in configs.items()}


def held_out(base: Base, seeds: Sequence[int], smoke: bool = False) -> dict[tuple[str, str], TrainConfig]:
    """D and E, fitted to the faults of all types but one."""
    return {
        (name, kind): replace(config, mixture=config.mixture.without(kind))
        for name, config in before_training(base, seeds, smoke).items()
        for kind in MIXTURE_WEIGHTS
    }


def ablations(base: Base, seeds: Sequence[int], smoke: bool = False) -> dict[str, TrainConfig]:
    """E with one thing changed, at `SMALL` of the bytes, before training."""

    def changed(**options: Any) -> TrainConfig:
        return untrained(token_aware_config(base, "E", seeds, smoke, **{"share": SMALL, **options}))

    def of_rank(rank: int) -> TrainConfig:
        return replace(changed(), rank=rank)

    named = {"no ids": changed(with_ids=False)}
    named |= {f"{n} round{'s' * (n > 1)}": changed(rounds=n) for n in (1, 4)}
    named |= {f"rank {rank}": of_rank(rank) for rank in (2, 16)}
    return named | {f"{n} hidden units": changed(hidden=n) for n in (4, 64)}
