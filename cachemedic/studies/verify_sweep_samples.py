"""The rows of sweeps, stability and valence-weighted distillation that `make verify` computes again.

Like those of `verify_samples`: measured values from scratch with the shipped operators, summaries from committed grids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pandas as pd

from cachemedic.core.severity_map import SeverityMap
from cachemedic.corruption.apply import Mixture
from cachemedic.corruption.spec import Axis
from cachemedic.data.tasks import perplexity_task
from cachemedic.data.text import documentation
from cachemedic.defenses.defense import Defense
from cachemedic.defenses.heuristics import NoDefense
from cachemedic.evaluation.decoding import clean_pass
from cachemedic.evaluation.experiments import ID_COLUMNS, run_grid, standard_tasks
from cachemedic.evaluation.stability import sensitivity
from cachemedic.models.load import Base, load_base
from cachemedic.repair.config import APPLY_TO
from cachemedic.repair.operator import RepairOperator
from cachemedic.studies import valence_report
from cachemedic.studies.contraction import measure_contraction
from cachemedic.studies.family_study import headline
from cachemedic.studies.quantised_evaluation import quantised_scores
from cachemedic.studies.report import ROOT
from cachemedic.studies.summaries import Summarise, by_group, means_over_seeds, recovery_by_type, summary
from cachemedic.studies.sweeps import (
    block,
    by_condition,
    contraction_sweep,
    defense_of,
    defenses_of,
    rank_sweep,
    stacks,
    standard_config,
    with_and_without_contraction,
)
from cachemedic.studies.verify import Parameters, Sample
from cachemedic.training.bank import BankConfig, open_bank
from cachemedic.training.config import TrainConfig
from cachemedic.training.objective import RepairObjective
from cachemedic.training.valence.quantiser import KVQuantiser, QuantiserConfig

NLL: Mapping[str, float] = {"nll": 2e-3, "nll_clean": 2e-3, "kl": 2e-3}  # nats per token
ROUNDED = 1e-4  # of summaries: the committed grid has eight digits, and a recovery divides by small differences
SPARED = ("auc", "recovery", "kl_recovery", "clean_regression")


def calibrated_base(name: str) -> Base:
    """A base with the severities of the committed results."""
    return load_base(name, severity_map=SeverityMap(pd.read_csv(ROOT / "results" / "severity_map.csv")))


def _standard(parameters: Parameters, steps: int = 300) -> tuple[Base, TrainConfig]:
    """The base, and the configuration that the conditions of a sweep vary."""
    base, objective = calibrated_base(parameters["base"]), parameters.get("objective", "canonical")
    return base, standard_config(base, parameters["family"], parameters["seeds"], False, steps, objective)


def _shipped(base: Base, config: TrainConfig) -> RepairOperator:
    return RepairOperator.from_pretrained(ROOT / "trained" / config.key(base))


def _operators(base: Base, conditions: Mapping[str, TrainConfig]) -> dict[str, RepairOperator]:
    """The shipped operators of a sweep, by condition."""
    found: dict[str, RepairOperator] = {}
    for config, names in stacks(base, conditions):
        found |= by_condition(_shipped(base, config), names)
    return found


def _grid(
    base: Base,
    parameters: Parameters,
    compared: Mapping[str, Defense],
    kind: str,
    n: int = 20,
    layers: Axis = "all",
    severity: float = 0.5,
) -> pd.DataFrame:
    """Language modelling with no defence and some readers: one type at one severity, and the clean cache."""
    tasks = standard_tasks(base, "test", parameters["seeds"], {"perplexity": n})
    return run_grid(base, tasks, {"none": NoDefense(), **compared}, None, layers, (kind,), (severity,))


def contraction_rows(parameters: Parameters) -> pd.DataFrame:
    """The operator trained without the contraction term, and by it alone."""
    base, standard = _standard(parameters, steps=200)
    found = defenses_of(base, _operators(base, contraction_sweep(standard)))
    chosen = {name: found[name] for name in ("lambda 0, alpha 0.8", "contraction alone")}
    return _grid(base, parameters, chosen, "gaussian").assign(setting="standard, rank 8")


def contraction_rho(parameters: Parameters) -> pd.DataFrame:
    """rho of the operator trained by the contraction term alone, on all types."""
    base, standard = _standard(parameters, steps=200)
    alone = {"contraction alone": _operators(base, contraction_sweep(standard))["contraction alone"]}
    bank = open_bank(base, BankConfig(split="test", samples=8 * len(standard.seeds)))
    return measure_contraction(base, standard, alone, bank).assign(setting="standard, rank 8")


def rank_rows(parameters: Parameters) -> pd.DataFrame:
    """All ranks."""
    base, standard = _standard(parameters)
    return _grid(base, parameters, defenses_of(base, _operators(base, rank_sweep(standard, [4, 8, 16]))), "quant_noise")


def protected_rows(parameters: Parameters) -> pd.DataFrame:
    """Four layers in the middle, which alone are hit and repaired."""
    base, standard = _standard(parameters, steps=60)
    layers = block(base.model.config.num_hidden_layers, 4, "mid")
    config = replace(standard, layers=layers, corrupted_layers="protected")
    found = {"mid 4": defense_of(base, _shipped(base, config))}
    rows = _grid(base, parameters, found, "gaussian", 12, layers, severity=1.0)
    return rows.assign(hit="protected", layers="mid 4")


def left_out_rows(parameters: Parameters) -> pd.DataFrame:
    """Operators that never saw overwriting, and those that did, with and without the contraction term."""
    base, standard = _standard(parameters, steps=100)
    kind, standard = "contiguous_overwrite", replace(standard, rank=4)
    terms = with_and_without_contraction(standard)
    trained_on = {"all types": standard.mixture, "held out": standard.mixture.without(kind)}
    configs = {
        f"{name}, {term}": replace(config, mixture=mixture)
        for name, mixture in trained_on.items()
        for term, config in terms.items()
    }
    return _grid(base, parameters, defenses_of(base, _operators(base, configs)), kind).assign(held_out=kind)


def target_rows(parameters: Parameters) -> pd.DataFrame:
    """Repair of keys, of values and of both."""
    base, standard = _standard(parameters)
    configs = {target: replace(standard, apply_to=target) for target in APPLY_TO}
    return _grid(base, parameters, defenses_of(base, _operators(base, configs)), "dropout_zero")


def stability_rows(parameters: Parameters) -> pd.DataFrame:
    """No defence, the operator and E under noise of a tenth of the cache's norm."""
    base, standard = _standard(parameters, steps=200)
    found = _operators(base, contraction_sweep(standard))["lambda 0.5, alpha 0.8"]
    sketch = _shipped(base, headline(base, parameters["seeds"])["E"])
    compared = {
        "no defence": NoDefense(),
        f"operator {standard.family}": defense_of(base, found),
        "E, sketch": defense_of(base, sketch),
    }
    task = perplexity_task(base.tokenizer, documentation("test"), parameters["seeds"], 6, scored=8)
    return sensitivity(base.model, task, clean_pass(base.model, task), compared, levels=(0.1,), draws=2)


def _valence(parameters: Parameters) -> tuple[Base, TrainConfig]:
    base, _ = _standard(parameters)
    config = standard_config(base, parameters["family"], parameters["seeds"], False, 150, "valence")
    return base, replace(config, batch=min(config.batch, 8))


def objective_rows(parameters: Parameters) -> pd.DataFrame:
    """The canonical and the valence objective."""
    base, config = _valence(parameters)
    stack = _shipped(base, replace(config, objectives=(RepairObjective(), valence_report.VALENCE)))
    return _grid(base, parameters, defenses_of(base, by_condition(stack, ["canonical", "valence"])), "gaussian", 16)


def quantised_rows(parameters: Parameters) -> pd.DataFrame:
    """The plain cache, and one of two bits with learned steps and repair."""
    base, config = _valence(parameters)
    few_bits = replace(
        config,
        objectives=(RepairObjective(),),
        mixture=Mixture(clean_share=1.0),
        steps=min(config.steps, 80),
        batch=4,
        lr=1e-2,
        quantiser=QuantiserConfig(2),
    )
    quantiser = KVQuantiser.from_pretrained(ROOT / "trained" / few_bits.key(base))
    task = standard_tasks(base, "test", parameters["seeds"], {"perplexity": 16})["perplexity"]
    caches = {"16 bits": (None, None), "2 bits, learned steps + repair": (quantiser, _shipped(base, few_bits))}
    return quantised_scores(base, task, clean_pass(base.model, task), caches)


def _from(csv: str, summarise: Summarise) -> Callable[[Parameters], pd.DataFrame]:
    """`summarise` of a committed grid."""
    return lambda parameters: summarise(pd.read_csv(ROOT / "results" / f"{csv}.csv"))


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
           _from("stability_sensitivity",
                 lambda rows: means_over_seeds(rows, ["reader", "noise"], ["sensitivity", "distance"]))),
    Sample("valence_grid", "both objectives on noisy text", (*ID_COLUMNS,), NLL, objective_rows),
    Sample("quantised_cache", "16 bits, and 2 bits with learned steps and repair", ("reader", "seed"),
           {"nll": 2e-3, "nll_clean": 2e-3, "bytes_per_token": 0.0}, quantised_rows),
    Sample("quantised_cache_summary", "all rows, from the committed quantised_cache", ("reader",),
           bounded("lost", "gain") | {"perplexity": ROUNDED}, _from("quantised_cache", valence_report.bits_table)),
)  # fmt: skip
