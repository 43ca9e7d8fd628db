"""Language modelling on a cache of few bits: what is lost, what learning wins back, and what is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd
import torch

from cachemedic.data.task_data import TaskData, score
from cachemedic.defenses.heuristics import NoDefense
from cachemedic.evaluation.decoding import CleanBank, batches, decode_through, tokens_of
from cachemedic.models.load import Base
from cachemedic.repair.operator import RepairOperator
from cachemedic.studies.run import Run
from cachemedic.studies.sweeps import defense_of
from cachemedic.training.bank import open_bank
from cachemedic.training.config import Objective, TrainConfig
from cachemedic.training.trainer import CALIBRATION, load_or_train
from cachemedic.training.valence.quantiser import KVQuantiser, QuantiserConfig

FULL_BITS = 16  # of a number of the usual cache
NEAREST = "nearest"

Readers = dict[str, tuple[KVQuantiser | None, RepairOperator | None]]


def quantised_readers(
    base: Base, config: TrainConfig, bits: Sequence[int], kinds: Mapping[str, tuple[Objective, bool]], run: Run
) -> Readers:
    """Rounding to nearest, and every kind of training, at each number of bits: readers named "2 bits, kind".

    kinds: the objective, and whether the steps are trained alone or with the operator of `config`.
    """
    bank, readers = open_bank(base, config.bank), Readers()
    keys, values = (x[:CALIBRATION] for x in (bank.keys, bank.values))
    for b in bits:
        readers[f"{b} bits, {NEAREST}"] = KVQuantiser.calibrated(QuantiserConfig(b), keys, values), None
        for kind, (objective, alone) in kinds.items():
            own = replace(config, objectives=(objective,), quantiser=QuantiserConfig(b, alone=alone))
            retrain = run.retrain or run.parameters["profile"] == "smoke"
            operator = load_or_train(base, own, run.trained, run.work, retrain)
            quantiser = KVQuantiser.from_pretrained(run.trained / own.key(base)).to(base.model.device)
            readers[f"{b} bits, {kind}"] = quantiser, None if alone else operator
    return readers


@torch.inference_mode()
def quantised_scores(
    base: Base,
    task: TaskData,
    clean: CleanBank,
    readers: Readers,
) -> pd.DataFrame:
    """The NLL of every reader on caches without other faults: one row per reader and seed.

    A reader is a quantiser of the whole cache (None: 16 bits) and an operator (None: no repair); run i of R reads the
    i-th block of N / R examples. Columns reader, bits, bytes_per_token (scales of the values and sketches included),
    seed, nll, nll_clean, n_examples.
    """
    nll_clean = score(task, clean.logits)["nll"]
    seeds = pd.Series(task.seeds.numpy(), name="seed")
    frames = []
    for name, (quantiser, operator) in readers.items():
        keys, values = clean.k, clean.v
        stored, bits = float(FULL_BITS * keys[0, :, :, 0].numel() * 2), FULL_BITS
        if quantiser is not None:
            stored, bits = quantiser.bits_per_token(), quantiser.config.bits
            by_run = (x.unflatten(0, (quantiser.runs, -1)) for x in (keys, values))
            keys, values = (x.flatten(0, 1) for x in quantiser(*by_run))
        defense = NoDefense() if operator is None else defense_of(base, operator)
        stored += 8 * defense.bytes_per_token
        logits = torch.empty_like(clean.logits)
        for rows in batches(base.model, task, defense.runs):
            part = task.select(rows)
            stored_tokens = tokens_of(part, keys[rows], values[rows])
            logits[rows] = decode_through(base.model, part, defense, clean.tokens(task, rows), stored_tokens)
        nll = score(task, logits)["nll"]
        scores = pd.DataFrame({"nll": nll, "nll_clean": nll_clean}, dtype=float).groupby(seeds)
        rows = scores.mean().reset_index().assign(n_examples=scores.size().to_numpy())
        rows.insert(0, "reader", name)
        rows.insert(1, "bits", bits)
        rows.insert(2, "bytes_per_token", stored / 8)
        frames.append(rows)
    return pd.concat(frames, ignore_index=True)
