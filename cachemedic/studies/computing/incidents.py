"""The damage benchmark (notebook 16): what users reported, and what each defense finds and repairs of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cachemedic.core.divergence import kd_per_token
from cachemedic.core.progress import tqdm
from cachemedic.core.seeds import generator
from cachemedic.corruption.incidents import INCIDENTS, KeysValues, Turn, strike
from cachemedic.data.task_data import TaskData
from cachemedic.defenses.by_name import create_defense
from cachemedic.defenses.defense import CachedTokens, Defense
from cachemedic.defenses.heuristics import NoDefense, damaged_vectors
from cachemedic.evaluation import statistics as stats
from cachemedic.evaluation.decoding import CleanBank, decode_logits, tokens_of
from cachemedic.evaluation.detection import detection_auroc
from cachemedic.evaluation.experiments import calibration_of, standard_tasks
from cachemedic.models.cache import unstack_cache
from cachemedic.models.load import Base, load_base
from cachemedic.repair.operator import RepairOperator
from cachemedic.studies.family_evaluation import bytes_per_token, code_alone
from cachemedic.studies.fault_grid import Guarded, stored_bank
from cachemedic.studies.run import Run
from cachemedic.token.coder import joint_operator
from cachemedic.token.joint_calibration import clean_caches
from cachemedic.token.kept import hashes_of
from cachemedic.token.plausible import Plausibility, check_cache
from cachemedic.token.token_repair import TokenRepair
from cachemedic.token.vectors import KeyRotation, turn_

ALARM_RATE = 0.01  # of false alarms that the check by ids alone is set to
FLOOR = 1e-3  # nats: an incident of less KL did no damage, of which a share would say nothing
ALL = "all"  # the incidents that are registered


def examples(run: Run) -> int:
    """Texts a seed; each is struck by the cache of the next one of its seed."""
    return 2 if run.smoke else 4


def incidents_of(run: Run) -> list[str]:
    """The incidents by name: those of the parameter, or all that are registered."""
    given = run.parameters["incidents"]
    return list(INCIDENTS) if given == ALL else list(given)


def readers_on(run: Run, base: Base) -> dict[str, Defense]:
    """Every reader of a base, by name: no defense, those of the parameter `defenses`, and D and E as they ship.

    Raises `FileNotFoundError` or `ValueError` for a base without operators, `ValueError` for an unknown defense.
    """
    operators = {family: RepairOperator.from_pretrained(f"{family}/{base.name}") for family in ("D", "E")}
    repairs = {name: TokenRepair(base.model, found) for name, found in operators.items()}
    calibration = calibration_of(base, 8 if run.smoke else 64)
    named = {name: create_defense(name, calibration) for name in run.parameters["defenses"]}
    if "range_restriction" in named:  # a range says nothing about what is not finite
        named["range_restriction"] = Guarded(named["range_restriction"])
    return {"none": NoDefense(), **named, "E, code alone": code_alone(repairs["E"]), **repairs}


def number_tables(base: Base, rows: int, length: int) -> Tensor:
    """Token ids [rows, length] of random numbers between commas: a kind of text that no calibration saw."""
    draws = np.random.default_rng(16)
    found = []
    for _ in range(rows):
        text = "".join(f"{a},{b:.3f},{c:.2e}\n" for a, b, c in draws.normal(0, 50, (length, 3)).round(3))
        found.append(base.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: length - 1])
    start = base.tokenizer.bos_token_id
    start = base.tokenizer.eos_token_id if start is None else start
    return torch.cat([torch.full((rows, 1), start), torch.tensor(found)], 1)


def turn_of(base: Base) -> Turn | None:
    """How this base's keys [L, G, T, d] are rotated by n positions more; None if it does not rotate them."""
    rotation = KeyRotation(base.model)
    if rotation.embedding is None:
        return None

    def turn(keys: Tensor, n: int) -> Tensor:
        tokens = keys.permute(2, 0, 1, 3)[None].clone()  # [1, T, L, G, d]
        angles = rotation.angles(torch.full(tokens.shape[:2], abs(n)), tokens.dtype)
        return turn_(tokens, angles, 1 if n > 0 else -1)[0].permute(1, 2, 0, 3)

    return turn


def damaged_caches(base: Base, task: TaskData, clean: CleanBank, incident: str) -> KeysValues:
    """The clean caches [N, L, G, T, d] of a task after an incident, stored in bf16.

    An example draws from the incident, its seed and its number alone, and its donor is the next example of its seed.
    """
    seeds = pd.Series(task.seeds.numpy())
    numbers = seeds.groupby(seeds).cumcount()
    donors = seeds.groupby(seeds).transform(lambda same: np.roll(same.index, -1)).to_list()
    draws = [generator("incident", incident, int(s), int(n)) for s, n in zip(seeds, numbers, strict=True)]
    struck = strike(incident, clean.k, clean.v, clean.k[donors], clean.v[donors], draws, turn_of(base))
    k, v = (x.bfloat16().to(x.dtype) for x in struck)
    return k, v


def divergence(task: TaskData, clean: Tensor, logits: Tensor) -> Tensor:
    """KL in nats from the clean model, mean over the scored tokens of each example [N].

    A token whose logits are not all finite is scored as a guess: all tokens alike. So no failure goes uncounted.
    """
    guessed = ~logits.isfinite().all(-1, keepdim=True)
    per_token = kd_per_token(clean.float(), logits.float().masked_fill(guessed, 0.0), temperature=1.0)
    return (per_token * task.target_mask).sum(1) / task.target_mask.sum(1)


def checks(base: Base, repair: TokenRepair, clean: CachedTokens, incidents: Mapping[str, KeysValues]) -> pd.DataFrame:
    """What the hashes that E keeps, and `check_cache` with the ids alone, find of each incident.

    One row per incident. damaged: share of the tokens; found, named, precise: share of the damaged caches in which the
    hashes saw a change, of the damaged tokens that they name, and of the named tokens that are damaged; found_by_ids,
    named_by_ids: the same without anything stored; auroc: of damaged tokens against those of clean caches, by ids;
    false_alarms, false_alarms_other: tokens of clean caches that the ids make suspicious, of the same kind of text and
    of another.
    """
    operator = joint_operator(repair.operator)
    written = hashes_of(clean.k, clean.v, operator.layers).whole

    def by_ids(k: Tensor, v: Tensor, ids: Tensor) -> Plausibility:
        return check_cache(base.model, operator, unstack_cache(k, v), ids, ALARM_RATE)

    sound = by_ids(clean.k, clean.v, clean.ids)
    other = number_tables(base, *clean.ids.shape)
    ((_, cache),) = clean_caches(base, other, len(other))
    alarms = check_cache(base.model, operator, cache, other, ALARM_RATE)
    rows = []
    for name, (k, v) in incidents.items():
        damaged = damaged_vectors(clean, tokens_like(clean, k, v)).any(2).any(1)
        changed = hashes_of(k, v, operator.layers).whole != written
        judged, hit = by_ids(k, v, clean.ids), damaged.any(1)
        scores = torch.cat([judged.score[damaged], sound.score.flatten()])
        labels = torch.arange(len(scores)) < damaged.sum()
        rows.append({
            "incident": name,
            "damaged": float(damaged.double().mean()),
            "found": _mean(changed.any(1)[hit]),
            "named": _mean(changed[damaged]),
            "precise": _mean(damaged[changed]),
            "found_by_ids": _mean((judged.suspicious & damaged).any(1)[hit]),
            "named_by_ids": _mean(judged.suspicious[damaged]),
            "auroc": detection_auroc(scores, labels),
            "false_alarms": _mean(sound.suspicious),
            "false_alarms_other": _mean(alarms.suspicious),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _mean(found: Tensor) -> float:
    """The share that is True; NaN of nothing."""
    return float(found.double().mean())


def tokens_like(clean: CachedTokens, k: Tensor, v: Tensor) -> CachedTokens:
    """The same tokens with other keys and values."""
    return CachedTokens(k, v, clean.ids, clean.positions)


@torch.inference_mode()
def repairs(
    base: Base, task: TaskData, clean: CleanBank, readers: Mapping[str, Defense], incidents: Mapping[str, KeysValues]
) -> pd.DataFrame:
    """The KL of every reader after every incident: columns incident, reader, seed, kl, n_examples."""
    written, rows = clean.tokens(task), []
    kept = {name: defense.write(written) for name, defense in readers.items()}
    for incident, (k, v) in tqdm(incidents.items(), desc=f"incidents on {base.name}"):
        for name, defense in readers.items():
            read = defense.read(tokens_of(task, k, v), kept[name])
            kl = divergence(task, clean.logits, decode_logits(base.model, read, task, defense))
            own = pd.Series(kl.double().numpy()).groupby(task.seeds.numpy())
            rows += [
                {"incident": incident, "reader": name, "seed": seed, "kl": part.mean(), "n_examples": len(part)}
                for seed, part in own
            ]
    return pd.DataFrame(rows)


def repaired_shares(grid: pd.DataFrame) -> pd.DataFrame:
    """By incident and reader, over seeds: kl, kl_before (without a defense), and repaired, the share of it removed.

    With t intervals. No share where an incident did no damage (`FLOOR`).
    """
    rows = []
    for incident, part in grid.groupby("incident", sort=False):
        before = part[part["reader"] == "none"].set_index("seed")["kl"]
        for reader, own in part.groupby("reader", sort=False):
            kl = own.set_index("seed")["kl"]
            share = stats.Interval(np.nan, np.nan, np.nan)
            if before.mean() >= FLOOR:
                share = stats.ratio_interval(before - kl, before)
            row = {"incident": incident, "reader": reader, "kl_before": before.mean()}
            row |= stats.t_interval(kl).columns("kl") | share.columns("repaired")
            rows.append(row | {"n_seeds": len(kl), "n_examples": int(own["n_examples"].sum())})
    return pd.DataFrame(rows)


def benchmark(base: Base, task: TaskData, readers: Mapping[str, Defense], incidents: Sequence[str]) -> pd.DataFrame:
    """One row per incident and reader: what `checks` and `repaired_shares` say, and what the reader costs.

    readers: with "none" and with a `TokenRepair` of family E as "E"; time: of the repair, as a share of a prefill of
    the cache, 0 for a reader that takes no forward pass; bits_per_token, share, cache_bytes, fixed_bytes: see
    `bytes_per_token`. Raises `ValueError` for an unknown incident.
    """
    clean = stored_bank(base, task)
    struck = {name: damaged_caches(base, task, clean, name) for name in incidents}
    found = checks(base, cast(TokenRepair, readers["E"]), clean.tokens(task), struck)
    rows = repaired_shares(repairs(base, task, clean, readers, struck))
    rows = rows.merge(bytes_per_token(base, readers), on="reader").merge(found, on="incident")
    rows["time"] = rows["prefill_share"] * rows["damaged"]
    return rows.drop(columns="prefill_share").assign(base=base.name)


def results(run: Run) -> dict[str, pd.DataFrame]:
    frames = []
    for name in dict.fromkeys((run.parameters["base"], run.parameters["second"])):
        base = load_base(name, device=run.parameters["device"])
        task = standard_tasks(base, "test", run.parameters["seeds"], {"perplexity": examples(run)})["perplexity"]
        frames.append(benchmark(base, task, readers_on(run, base), incidents_of(run)))
    return {"incidents": pd.concat(frames, ignore_index=True)}
