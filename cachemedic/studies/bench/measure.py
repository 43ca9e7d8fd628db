"""Benchmarks on the CPU, into results/bench_*.csv; `python -m cachemedic bench` runs them.

About three quarters of an hour for all of them on an idle machine of two cores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd
import torch

from cachemedic.core.errors import nearest_valid
from cachemedic.models.load import load_base
from cachemedic.repair.operator import RepairOperator
from cachemedic.studies.bench import decode, training, whole_tokens
from cachemedic.studies.run import ROOT, Run
from cachemedic.token.coder import joint_operator
from cachemedic.training.bank import open_bank


def decoding() -> dict[str, pd.DataFrame]:
    """A step through folded operators."""
    return {"bench_decode": decode.overhead(decode.gpt2_medium(max(decode.POSITIONS) + 1))}


def repair() -> dict[str, pd.DataFrame]:
    """What a cache with the shipped operators of families D and E costs, beside a prefill."""
    found = []
    for setting in whole_tokens.SETTINGS:
        try:
            operator = RepairOperator.from_pretrained(f"{setting.family}/{setting.base}")
        except (FileNotFoundError, ValueError) as error:  # not made on this machine yet, or by an earlier version
            print(f"left out: {error}")
            continue
        found.append(whole_tokens.measured(setting, joint_operator(operator)))
    return {"bench_repair": pd.concat(found)}


def train() -> dict[str, pd.DataFrame]:
    """A step of training, and its parts."""
    base = load_base("embedded-gpt2")
    ladders, parts = [], []
    for setting in training.SETTINGS:
        config = training.sweep(setting, base)
        bank = open_bank(base, config.bank)
        ladders.append(training.ladder(base, bank, config).assign(setting=setting))
        trainer = training.trainer_of(training.LADDER[-1], base, config, bank)
        parts.append(training.step_parts(trainer).assign(setting=setting))
    return {"bench_training": pd.concat(ladders), "bench_training_step": pd.concat(parts)}


PARTS: dict[str, Callable[[], dict[str, pd.DataFrame]]] = {
    "decode": decoding,
    "repair": repair,
    "training": train,
}


def measure(parts: Sequence[str]) -> None:
    """Runs some of `PARTS`, or all if none is named, writes their CSVs and prints them.

    Raises `ValueError` for an unknown one, before anything is measured.
    """
    for part in parts:
        if part not in PARTS:
            raise nearest_valid("benchmark", part, PARTS)
    run = Run("paper", folder=ROOT, threads=torch.get_num_threads(), dtype="float32", device="cpu")
    for part in parts or PARTS:
        for name, frame in PARTS[part]().items():
            print(f"\n{name}\n{run.write_csv(frame, name).drop(columns='config_hash').to_string(index=False)}")
