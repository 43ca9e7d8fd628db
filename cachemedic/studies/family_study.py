"""What is trained to compare the operator families, by name: notebooks 03, 08 and 14 share these conditions.

D and E train alike: few steps at a high learning rate that falls to nothing, mild faults drawn more often than severe
ones, which dominate the loss, and a contraction term without a threshold, which their kind can follow.
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
STEPS = {"layerwise-D": 250, "layerwise-E": 80}
HELD_OUT_STEPS = 80
SHARES = (1 / 16, 1 / 64, 1 / 128, 1 / 256)
COORDINATES = (1, 2, 4, 8)


def token_aware_config(
    base: Base, family: str, seeds: Sequence[int], smoke: bool = False, **options: Any
) -> TrainConfig:
    """How family D or E is trained on a base: faults on all layers, repair of all layers."""
    bank = BankConfig(samples=16 * len(seeds), decoded=4) if smoke else BankConfig(samples=1280, decoded=16)
    return TrainConfig(
        family=family,
        layers=tuple(range(base.config.num_hidden_layers)),
        objectives=(RepairObjective(lambda_contr=0.05, alpha_contr=0.0),),
        seeds=tuple(seeds),
        mixture=Mixture(severities=SEVERITIES),
        bank=bank,
        steps=6 if smoke else STEPS[family],
        batch=4,
        lr=1e-2,
        options=options,
        schedule="linear",
    )


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
    """D without and with the prior from token ids, and E at 1/32 of the bytes of the cache."""
    return {
        "D, no prior": token_aware_config(base, "layerwise-D", seeds, smoke, known_layers=0),
        "D": token_aware_config(base, "layerwise-D", seeds, smoke),
        "E": token_aware_config(base, "layerwise-E", seeds, smoke),
    }


def shares(base: Base, seeds: Sequence[int], smoke: bool = False) -> dict[str, TrainConfig]:
    """E at other sizes of the sketch."""
    return {
        f"E, 1/{1 / share:.0f}": token_aware_config(base, "layerwise-E", seeds, smoke, share=share) for share in SHARES
    }


def held_out(base: Base, seeds: Sequence[int], smoke: bool = False) -> dict[tuple[str, str], TrainConfig]:
    """The headline conditions, each with one corruption type left out of a shorter training."""
    return {
        (name, kind): replace(config, mixture=config.mixture.without(kind), steps=min(config.steps, HELD_OUT_STEPS))
        for name, config in headline(base, seeds, smoke).items()
        for kind in MIXTURE_WEIGHTS
    }


def ablations(base: Base, seeds: Sequence[int], smoke: bool = False) -> dict[str, TrainConfig]:
    """E with one thing changed; at 1/64 of the bytes, where there is something to lose."""

    def changed(**options: Any) -> TrainConfig:
        return token_aware_config(base, "layerwise-E", seeds, smoke, **{"share": 1 / 64, **options})

    named = {f"m = {m}": changed(coordinates=m) for m in COORDINATES}
    named |= {f"{bits} bits each": changed(bits=bits) for bits in (8, 4, 2)}
    named |= {f"{projection} axes": changed(projection=projection) for projection in ("random", "learned")}
    named |= {
        "no prior": changed(known_layers=0),
        "one layer recomputed": changed(known_layers=2),
        "a network a layer": changed(per_layer=True),
        "code alone": changed(rounds=0),
        "with logit bias": changed(bias=True),
        "bias only": changed(bias=True, correction=False),
    }
    return named
