"""What the experiment with the mercy gate reports: checks, what they cost, and the valence that training ends with."""

from __future__ import annotations

import gzip
import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd

from cachemedic.evaluation import statistics as stats
from cachemedic.models.load import Base
from cachemedic.repair.attach import IdleOperatorWarning
from cachemedic.repair.operator import RepairOperator
from cachemedic.studies.summaries import summary
from cachemedic.training.bank import WITH_REVIEWS, open_bank
from cachemedic.training.config import TrainConfig
from cachemedic.training.forward import Students
from cachemedic.training.log import LOG, gate_checks
from cachemedic.training.valence.gate import MercyGate
from cachemedic.training.valence.head import shipped_valence
from cachemedic.training.valence.projection import project

CURVES = ("loss_kd", "loss_id", "loss_contr", "rho_mean", "rho_p95")


def projected_ratio(
    base: Base, config: TrainConfig, operator: RepairOperator | None, split: str, prompts: int
) -> pd.DataFrame:
    """Valence of sampled rollouts behind the damaged and repaired cache over that behind the clean one, by seed.

    `prompts` texts of a documentation split and reviews for each seed, each with a fault and a rollout; operator: one
    run a seed, None to leave caches as they are. Columns seed, student, teacher, ratio.
    """
    seeds = config.seeds
    bank = open_bank(base, replace(config.bank, split=split + WITH_REVIEWS, samples=prompts * len(seeds)))
    if operator is None:
        operator = RepairOperator.create(
            "A", base.model.config, layers=config.layers, seed=list(seeds), runs=len(seeds)
        )
    students = Students(base, config, bank, operator, config.first_layer, valence=shipped_valence(base))
    with warnings.catch_warnings(action="ignore", category=IdleOperatorWarning):  # to leave caches as they are
        student, teacher = project(students, MercyGate(probe=prompts, greedy=False))
    found = {"seed": seeds, "student": student.tolist(), "teacher": teacher.tolist()}
    return pd.DataFrame(found).assign(ratio=lambda x: x["student"] / x["teacher"])


def checks_of(folders: Mapping[str, Path]) -> pd.DataFrame:
    """The checks of mercy gates beside trained operators, by a name for each folder.

    Columns gate, seed, step; rollout and proxy, what either projects over the teacher's valence (NaN where it was not
    measured); blocked; kept, the ratio by the gate's own projection of the state that the run goes on from (NaN: that
    of before training).
    """
    rows = []
    for name, folder in folders.items():
        for check in gate_checks(folder):
            seed = int(check["run_id"].split("/")[1].removeprefix("seed"))
            ratio = {"own": check["projected"] / check["baseline"]}
            if other := check.get("other"):
                ratio["other"] = other["projected"] / other["baseline"]
            by = ("proxy", "rollout") if name.endswith("proxy") else ("rollout", "proxy")
            measured = {projection: ratio.get(which) for projection, which in zip(by, ("own", "other"), strict=True)}
            rows.append({"gate": name, "seed": seed, "step": check["step"], **measured, "blocked": check["blocked"]})
    checks = pd.DataFrame(rows)
    own = checks["proxy"].where(checks["gate"].str.endswith("proxy"), checks["rollout"])
    kept = own.mask(checks["blocked"]).groupby([checks["gate"], checks["seed"]]).ffill()
    return checks[["gate", "seed", "step", "rollout", "proxy", "blocked"]].assign(kept=kept)


def agreement(checks: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Of the updates that were projected both ways, how many each way would block, by gate.

    `missed`: the proxy passes what the rollouts would block; `false_alarms`: the other way round.
    """
    both = checks.dropna(subset=["rollout", "proxy"])
    low = {name: both[name] < threshold for name in ("rollout", "proxy")}
    counted = pd.DataFrame({
        "gate": both["gate"],
        "compared": 1,
        "by_rollouts": low["rollout"],
        "by_proxy": low["proxy"],
        "missed": low["rollout"] & ~low["proxy"],
        "false_alarms": low["proxy"] & ~low["rollout"],
    })  # fmt: skip
    return counted.groupby("gate", sort=False).sum().astype(int).reset_index()


def outcome(ratios: pd.DataFrame, grid: pd.DataFrame, reference: str) -> pd.DataFrame:
    """One row per reader: projected ratio over seeds, its paired difference to `reference`, and `summary` of the grid.

    ratios: rows of `projected_ratio` with a column reader.
    """
    by_reader = ratios.set_index("seed").groupby("reader", sort=False)["ratio"]
    values = {name: rows.sort_index() for name, rows in by_reader}
    rows = []
    for name, own in values.items():
        gain = stats.paired_interval(own, values[reference])
        rows.append({"reader": name, **stats.t_interval(own).columns("ratio"), **gain.columns("difference")})
    return pd.DataFrame(rows).merge(summary(grid), on="reader")


def cost(conditions: Mapping[str, TrainConfig], checks: pd.DataFrame) -> pd.DataFrame:
    """What each gate did and took, per run: means over seeds.

    Columns gate; checks; blocked; passes: forward passes of students and teacher in turn for the checks; tokens: those
    that both read or said for the checks; training_tokens: those of the students' passes of training, without checks.
    """
    rows = []
    for name, config in conditions.items():
        gate, own = config.gate, checks[checks["gate"] == name]
        assert gate is not None
        runs, by_proxy = own["seed"].nunique(), gate.projection == "proxy"
        judged = 0.0 if gate.threshold == 0 else len(own) / runs  # one that only watches costs what one chooses to
        decoded = config.batch * config.bank.decoded
        rows.append({
            "gate": name,
            "checks": judged,
            "blocked": own["blocked"].sum() / runs,
            "passes": judged * 2 * (1 if by_proxy else gate.horizon),
            "tokens": judged * 2 * (decoded if by_proxy else gate.probe * gate.horizon),
            "training_tokens": config.steps * decoded,
        })  # fmt: skip
    return pd.DataFrame(rows)


def training_curves(folders: Mapping[str, Path]) -> pd.DataFrame:
    """Losses and contraction ratios of the training logs beside operators: means over the runs of a folder, by step."""
    frames = []
    for name, folder in folders.items():
        lines = gzip.decompress((folder / f"{LOG}.gz").read_bytes()).splitlines()
        records = pd.DataFrame([{key: record[key] for key in ("step", *CURVES)} for record in map(json.loads, lines)])
        means = records.astype(float).groupby("step").mean().reset_index()
        frames.append(means.assign(reader=name, step=means["step"].astype(int)))
    return pd.concat(frames, ignore_index=True)[["reader", "step", *CURVES]]
