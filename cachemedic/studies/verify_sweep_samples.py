"""The rows of sweeps, stability and valence-weighted distillation that `make verify` computes again.

Like those of `verify_samples`: measured values from scratch with the shipped operators, summaries from committed grids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from cachemedic.evaluation.experiments import ID_COLUMNS
from cachemedic.repair.operator import RepairOperator
from cachemedic.studies.computing import (
    contraction,
    kv_targets,
    learned_quantiser,
    leave_one_type_out,
    protected_layers,
    rank,
    stability,
)
from cachemedic.studies.computing import valence_weighted_kd as valence
from cachemedic.studies.family_study import headline
from cachemedic.studies.run import Run
from cachemedic.studies.setting import base_of, shipped
from cachemedic.studies.summaries import Summarise, by_group, recovery_by_type, summary
from cachemedic.studies.sweeps import by_condition, defenses_of
from cachemedic.studies.valence_report import CORE
from cachemedic.studies.verify_sample import Sample

NLL: Mapping[str, float] = {"nll": 2e-3, "nll_clean": 2e-3, "kl": 2e-3}  # nats per token
ROUNDED = 1e-4  # of summaries: the committed grid has eight digits, and a recovery divides by small differences
SPARED = ("auc", "recovery", "kl_recovery", "clean_regression")


def contraction_rows(run: Run) -> pd.DataFrame:
    """The operator trained without the contraction term, and by it alone."""
    base = base_of(run)
    found = shipped(run, base, contraction.conditions(run, base))
    chosen = {name: found[name] for name in (contraction.WITHOUT, contraction.ALONE)}
    return contraction.grid(run, base, contraction.STANDARD, chosen, **at("gaussian"))


def contraction_rho(run: Run) -> pd.DataFrame:
    """rho of the operator trained by the contraction term alone, on all types."""
    base = base_of(run)
    found = shipped(run, base, contraction.conditions(run, base))
    alone = {contraction.ALONE: found[contraction.ALONE]}
    return contraction.rho(run, base, contraction.STANDARD, alone, severities=(0.5,))


def rank_rows(run: Run) -> pd.DataFrame:
    """All ranks."""
    base = base_of(run)
    return rank.grid(run, base, shipped(run, base, rank.conditions(run, base)), **at("quant_noise"))


def protected_rows(run: Run) -> pd.DataFrame:
    """Four layers in the middle, which alone are hit and repaired."""
    base, name = base_of(run), "mid 4"
    config = protected_layers.conditions(run, base)[f"protected {name}"]
    reader = shipped(run, base, {name: config})[name].defense(base.model)
    return protected_layers.protected_grid(run, base, name, reader, **at("gaussian", 1.0))


def left_out_rows(run: Run) -> pd.DataFrame:
    """Operators that never saw overwriting, and those that did, with and without the contraction term."""
    base, kind = base_of(run), "contiguous_overwrite"
    configs = leave_one_type_out.conditions(run, base)
    own = {name: config for name, config in configs.items() if name.startswith((leave_one_type_out.SEEN, kind))}
    return leave_one_type_out.grid(run, base, defenses_of(base, shipped(run, base, own)), kind, severities=(0.5,))


def target_rows(run: Run) -> pd.DataFrame:
    """Repair of keys, of values and of both."""
    base = base_of(run)
    return kv_targets.grid(run, base, shipped(run, base, kv_targets.conditions(run, base)), **at("dropout_zero"))


def stability_rows(run: Run) -> pd.DataFrame:
    """No defence, the operator and E under noise of a tenth of the cache's norm."""
    base = base_of(run)
    study = headline(base, run.parameters["seeds"])
    found = shipped(run, base, {name: study[name] for name in ("D", "E")})
    compared = stability.readers(run, base, shipped(run, base, stability.conditions(run, base)), found)
    chosen = (stability.NO_DEFENCE, stability.operator_name(run), "E")
    return stability.moved(run, base, {name: compared[name] for name in chosen}, levels=(0.1,))


def objective_rows(run: Run) -> pd.DataFrame:
    """The conditions that every family has, of the first of them, under noise."""
    base, family = base_of(run), valence.families(run)[0]
    config, names = valence.stack(run, base, family), list(valence.objectives(run, base, family))
    stack = RepairOperator.from_pretrained(run.trained / config.key(base))
    readers = defenses_of(base, by_condition(stack, names))
    chosen = {name: readers[name] for name in ("canonical", *CORE)}
    return valence.grid(run, base, chosen, "verify", ("gaussian",)).assign(family=family)


def quantiser_rows(run: Run) -> pd.DataFrame:
    """KIVI at two bits in groups of 128, its steps learned, and with E trained beside."""
    base = base_of(run)
    storages = learned_quantiser.untrained(run, base) | learned_quantiser.learned(run, base)
    chosen = {name: storage for name, storage in storages.items() if name.endswith("2 bits, groups of 128")}
    return learned_quantiser.scores(run, base, chosen)


def at(kind: str, severity: float = 0.5) -> dict[str, Any]:
    """One type at one severity, for the grid of a study."""
    return {"types": (kind,), "severities": (severity,)}


def _from(csv: str, summarise: Summarise) -> Callable[[Run], pd.DataFrame]:
    """`summarise` of a committed grid."""
    return lambda run: summarise(run.read_csv(csv))


def _repaired(summarise: Summarise) -> Summarise:
    """`summarise` without the rows of no defence."""
    return lambda grid: summarise(grid).query("reader != 'none'")


def _over(key: str, summarise: Summarise) -> Summarise:
    return lambda grid: by_group(grid, [key], summarise)


def bounded(*names: str) -> dict[str, float]:
    """Tolerances of summaries and of the limits of their intervals."""
    return {f"{name}{limit}": ROUNDED for name in names for limit in ("", "_low", "_high")}


SWEEP_SAMPLES = (
    Sample("contraction_grid", "two conditions on noisy text", ("setting", *ID_COLUMNS), NLL, contraction_rows),
    Sample("contraction_rho", "the term alone at severity 0.5", ("setting", "severity", "type", "seed", "condition"),
           dict.fromkeys(("rho", "bound_rank", "bound_full", "rank_floor"), 2e-3), contraction_rho),
    Sample("contraction_results", "all rows, from the committed contraction_grid", ("setting", "task", "reader"),
           bounded(*SPARED), _from("contraction_grid", _over("setting", summary))),
    Sample("rank_grid", "all ranks on quantised text", (*ID_COLUMNS,), NLL, rank_rows),
    Sample("rank_results", "all rows, from the committed rank_grid", ("task", "reader"), bounded(*SPARED),
           _from("rank_grid", _repaired(summary))),
    Sample("protected_layers_grid", "four layers in the middle, at severity 1", ("hit", "layers", *ID_COLUMNS), NLL,
           protected_rows),
    Sample("leave_one_out_grid", "overwriting, left out of training or not", ("held_out", *ID_COLUMNS), NLL,
           left_out_rows),
    Sample("leave_one_out_results", "all rows, from the committed leave_one_out_grid", ("held_out", "task", "reader"),
           bounded(*SPARED), _from("leave_one_out_grid", _over("held_out", _repaired(summary)))),
    Sample("kv_targets_grid", "all targets on text with zeros", (*ID_COLUMNS,), NLL, target_rows),
    Sample("kv_targets_by_type", "all rows, from the committed kv_targets_grid", ("task", "type", "reader"),
           bounded("recovery"), _from("kv_targets_grid", _repaired(recovery_by_type))),
    Sample("stability_sensitivity", "three readers under noise of a tenth of the norm", ("reader", "noise", "seed"),
           {"sensitivity": 1e-2, "distance": 1e-2}, stability_rows),
    Sample("stability_curves", "all rows, from the committed stability_sensitivity", ("reader", "noise"),
           bounded("sensitivity", "distance"),
           _from("stability_sensitivity", stability.curves)),
    Sample("valence_measured", "both objectives under noise", ("family", "type", "severity", "reader", "seed"),
           {"kl": 2e-3, "gap": 1e-3}, objective_rows),
    Sample("learned_quantiser_scores", "two bits in groups of 128, each method", ("storage", "seed"),
           {**NLL, "valence_gap": 2e-3, "bytes_per_token": 0.0}, quantiser_rows),
    Sample("learned_quantiser", "all rows, from the committed learned_quantiser_scores", ("storage",),
           bounded(*learned_quantiser.MEASURES), _from("learned_quantiser_scores", learned_quantiser.summary)),
    Sample("learned_quantiser_paired", "all rows, from the committed learned_quantiser_scores",
           ("method", "against", "bits", "bytes_per_token"), bounded(*learned_quantiser.MEASURES),
           _from("learned_quantiser_scores", learned_quantiser.paired)),
)  # fmt: skip
