"""Runs all benchmarks on the CPU, a few minutes, and writes results/bench_*.csv: `python -m cachemedic.bench`."""

from __future__ import annotations

import pandas as pd
import torch

from cachemedic.bank import open_bank
from cachemedic.bench import augmented, decode, scrub, training
from cachemedic.models import load_base
from cachemedic.report import ROOT, Run


def main() -> None:
    run = Run("paper", folder=ROOT, threads=torch.get_num_threads(), dtype="float32", device="cpu")
    base = load_base("embedded-gpt2")
    ladders, parts = [], []
    for setting in training.SETTINGS:
        config = training.sweep(setting, base)
        bank = open_bank(base, config.bank)
        ladders.append(training.ladder(base, bank, config).assign(setting=setting))
        trainer = training.trainer_of(training.LADDER[-1], base, config, bank)
        parts.append(training.step_parts(trainer).assign(setting=setting))
    medium = decode.gpt2_medium(max(decode.POSITIONS) + 1)
    token_aware = [scrub.scrub_cost(medium), augmented.augmented_cost(medium)]
    for name, frame in (
        ("bench_decode", decode.overhead(medium)),
        ("bench_token_aware", pd.concat(token_aware)),
        ("bench_training", pd.concat(ladders)),
        ("bench_training_step", pd.concat(parts)),
    ):
        print(f"\n{name}\n{run.write_csv(frame, name).drop(columns='config_hash').to_string(index=False)}")


if __name__ == "__main__":
    main()
