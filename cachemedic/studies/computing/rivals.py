"""Rivals that could win (notebook 24): every way to have a damaged token again, told the same, with what it keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor

from cachemedic.core.progress import tqdm
from cachemedic.core.seeds import generator
from cachemedic.corruption.spec import CorruptionSpec
from cachemedic.corruption.storage_faults import BIT_ERROR_RATES, KIVI_GROUPS, bernoulli_indices
from cachemedic.corruption.types import CORRUPTIONS
from cachemedic.data.task_data import TaskData
from cachemedic.data.text_source import TextSource
from cachemedic.defenses.by_name import create_defense
from cachemedic.defenses.defense import Around, CachedTokens, Defense
from cachemedic.defenses.ecc import CHECK_BITS
from cachemedic.defenses.golay import SYMBOL_BITS
from cachemedic.defenses.heuristics import NoDefense
from cachemedic.defenses.memory_codes import MemoryCode
from cachemedic.defenses.shadows import GroupQuantisedShadow
from cachemedic.evaluation.decoding import CleanBank, clean_pass
from cachemedic.evaluation.evaluate import evaluate
from cachemedic.evaluation.experiments import calibration_of, kept_frame
from cachemedic.models.load import Base
from cachemedic.models.shape import ModelShape
from cachemedic.repair.operator import RepairOperator
from cachemedic.studies import pretrained
from cachemedic.studies.family_evaluation import TokenByToken, bytes_per_token
from cachemedic.studies.fault_grid import Guarded, stored_bank
from cachemedic.studies.run import Run
from cachemedic.studies.summaries import in_order, means_over_seeds
from cachemedic.token.calibration_text import held_out, source_texts, windows
from cachemedic.token.hashes import HASH_BYTES, PART_BYTES
from cachemedic.token.joint_calibrate import FITTED
from cachemedic.token.joint_operator import JointOperator
from cachemedic.token.kept import Kept, hashes_of
from cachemedic.token.token_repair import TokenRepair
from cachemedic.token.trust_fit import fit_trust

SEVERITIES = (0.25, 0.5, 1.0)
EXAMPLES, FLIPPED = 6, 2  # texts a seed; and of raw bit flips
LONGER = (1 / 64, 1 / 32)  # shares of codes beside the usual one of 1/128
COPY_BITS = (1, 2, 4)
CALIBRATION = 16  # windows whose ranges clip
RIVALS = (
    "checksum_erase", "secded_ecc", "secded_ecc_in_page", "golay_ecc", "golay_ecc_in_page", "hidden_states",
    "hidden_states_8bit", "hidden_states_all", "recompute",
)  # fmt: skip
IN_PAGE = ("secded_ecc_in_page", "golay_ecc_in_page")
FLIPS = "bitflip_bf16"
AT_FLIPS = (
    "none", "checksum_erase", "D", "E, code alone", "E", "shadow_2bit, group 32", "secded_ecc", *IN_PAGE, "recompute",
)  # fmt: skip
# Those that may keep numbers as they find them: a single one that is not finite would spoil all that follows. All
# others replace or decode what changed.
GUARDED = ("none", "D")
REFERENCE = "E"
SCORES = ["reader", "seed", "example", "nll_clean", "nll", "kl"]
MEASURES = ["kl", "more"]


@dataclass(frozen=True, eq=False)
class Hashed(Around):
    """D with the hashes that E keeps: what is as it was written keeps every bit."""

    inner: TokenRepair

    @property
    def bytes_per_token(self) -> float:
        return HASH_BYTES + PART_BYTES * len(self.inner.operator.layers)

    def write(self, clean: CachedTokens) -> Kept:
        codes = torch.empty(*clean.ids.shape, 0, dtype=torch.uint8)
        return Kept(codes, hashes_of(clean.k, clean.v, self.inner.operator.layers))


@dataclass(frozen=True, eq=False)
class CheckBitsHit(Around):
    """A code in the page whose check bits, too, flip with probability `rate`."""

    inner: MemoryCode
    rate: float

    def write(self, clean: CachedTokens) -> tuple[Tensor, Tensor]:
        k, v = (flipped(x, self.rate, side) for side, x in zip("kv", self.inner.write(clean), strict=True))
        return k, v


def flipped(checks: Tensor, rate: float, name: str) -> Tensor:
    """Check bits as `MemoryCode` keeps them, eight (uint8) or twelve (int16) a number, each flipped by chance."""
    width = CHECK_BITS if checks.dtype == torch.uint8 else SYMBOL_BITS
    bits = bernoulli_indices(checks.numel() * width, rate, generator("check bits", name, str(rate)))
    flips = torch.zeros(checks.numel(), dtype=torch.int32)
    flips.index_add_(0, bits // width, (1 << bits % width).int())
    return checks ^ flips.to(checks.dtype).view(checks.shape)


def codes(base: Base, source: TextSource) -> dict[str, JointOperator]:
    """E with longer codes, its trust network fitted to each, and codes of all lengths that use no token ids."""
    usual = pretrained.operators(base, source)["E"]
    seen, _ = held_out(source_texts(base, source))
    ids, found = windows(base, seen, FITTED, pretrained.PREFIX, seed=3), {}
    for share in LONGER:
        found[of_share("E", share)] = longer = _with_code(base, usual, share=share)
        fit_trust(longer, base.model, ids, seed=0)
    for share in (usual.config.options["share"], *LONGER):
        found[of_share("code, no ids", share)] = _with_code(base, usual, share=share, with_ids=False)
    return found


def _with_code(base: Base, usual: JointOperator, **options: Any) -> JointOperator:
    operator = RepairOperator.create("E", base.config, layers="all", **options).to(base.model.device)
    assert isinstance(operator, JointOperator)
    operator.set_joint(usual.calibrated)
    return operator


def of_share(name: str, share: float) -> str:
    """The name of a reader with a code of this share of the bytes."""
    return f"{name}, 1/{1 / share:.0f}"


def copies(shape: ModelShape) -> dict[str, Defense]:
    """Copies in the layout of KIVI by bits and group."""
    return {
        f"shadow_{bits}bit, group {group}": GroupQuantisedShadow(shape, bits, group)
        for bits in COPY_BITS
        for group in KIVI_GROUPS
    }


def readers_of(run: Run, base: Base, source: TextSource) -> tuple[dict[str, Defense], str]:
    """Every reader by name, and which is the best blind heuristic: that of notebook 17, chosen on validation."""
    calibration = calibration_of(base, 4 if run.smoke else CALIBRATION, source)
    known = run.read_csv("pretrained_results")
    best = str(known.loc[known["best_heuristic"], "reader"].iloc[0])
    usual, longer = pretrained.token_readers(base, source), codes(base, source)
    d, e = usual["D"], usual["E"]
    assert isinstance(d, TokenRepair)
    assert isinstance(e, TokenRepair)
    readers: dict[str, Defense] = {"none": NoDefense(), best: create_defense(best, calibration)}
    readers |= {"D": d, "D, hashes": Hashed(d), **_by_code(base, usual, longer)}
    readers |= {f"{name}, token by token": TokenByToken(base.model, r.operator) for name, r in (("D", d), ("E", e))}
    readers |= copies(calibration.shape) | {name: create_defense(name, calibration) for name in RIVALS}
    return readers, best


def _by_code(base: Base, usual: Mapping[str, Defense], longer: Mapping[str, JointOperator]) -> dict[str, Defense]:
    """Readers that keep a code: E, its code alone, and codes without token ids."""
    estimates: dict[str, Defense] = {"E": usual["E"]}
    alone: dict[str, Defense] = {"E, code alone": usual["E, code alone"]}
    unaware: dict[str, Defense] = {}
    for name, operator in longer.items():
        restore = TokenRepair(base.model, operator, "restore")
        if name.startswith("E, "):
            estimates[name] = TokenRepair(base.model, operator)
            alone[name.replace("E,", "E, code alone,")] = restore
        else:
            unaware[name] = restore
    return {**estimates, **alone, **unaware}


def hits(base: Base, kind: str, severity: float) -> CorruptionSpec:
    """A fault of a type on all layers and heads; one that does not reach the severity goes as far as it can."""
    assert base.severity_map is not None  # `results` gives it
    shape = ModelShape.of(base.config)
    reach = base.severity_map.reach(kind, base.name, (shape.num_layers, shape.num_kv_heads, 0))
    return CorruptionSpec(kind, min(severity, reach), base=base.name, severity_map=base.severity_map)


def met(task: TaskData, severities: Sequence[float]) -> Iterator[tuple[str, float, Tensor]]:
    """Type, severity and rows of each condition, as `pretrained.balanced` has them.

    A type that takes from another text of the seed needs two there: all that meet it do so at every severity.
    """
    conditions = list(pretrained.balanced(task, severities))
    for kind, severity, rows in conditions:
        if CORRUPTIONS[kind].needs_donor:
            rows = torch.cat([others for other, _, others in conditions if other == kind]).sort().values
        yield kind, severity, rows


def main_grid(run: Run, base: Base, source: TextSource, readers: Mapping[str, Defense]) -> pd.DataFrame:
    """A row for each type, severity, reader, seed and text; the severity is the one that was asked for."""
    documents, severities = source.documents_of("test"), SEVERITIES[-1:] if run.smoke else SEVERITIES
    task = pretrained.language_task(base, documents, "test", run.parameters["seeds"], EXAMPLES)
    clean, frames = clean_pass(base.model, task), []
    for kind, severity, rows in tqdm(list(met(task, severities)), desc=f"rivals on {base.name}"):

        def scores(kind: str = kind, severity: float = severity, rows: Tensor = rows) -> pd.DataFrame:
            part = CleanBank(clean.k[rows], clean.v[rows], clean.logits[rows])
            return evaluate(base.model, task.select(rows), part, hits(base, kind, severity), readers)[SCORES]

        found = kept_frame(run.partial / f"{kind}-{severity}.csv", scores)
        frames.append(found.assign(type=kind, severity=severity))
    return pd.concat(frames, ignore_index=True)


def flip_grid(run: Run, base: Base, source: TextSource, readers: dict[str, Defense]) -> pd.DataFrame:
    """The same behind raw bit flips in a cache stored in bf16, by `rate`; they hit check bits in the page, too."""
    task = pretrained.language_task(base, source.documents_of("test"), "test", run.parameters["seeds"], FLIPPED)
    clean, frames = stored_bank(base, task), []
    for rate in tqdm(BIT_ERROR_RATES[-2:] if run.smoke else BIT_ERROR_RATES, desc="bit flips"):

        def scores(rate: float = rate) -> pd.DataFrame:
            hit = {
                name: CheckBitsHit(cast(MemoryCode, d), rate) if name in IN_PAGE else d for name, d in readers.items()
            }
            return evaluate(base.model, task, clean, CorruptionSpec(FLIPS, parameter=rate), hit)[SCORES]

        frames.append(kept_frame(run.partial / f"flips-{rate}.csv", scores).assign(rate=rate))
    return pd.concat(frames, ignore_index=True)


def beside_reference(grid: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Rows of a grid with `more`: the KL that a reader leaves above what E leaves of the same text and fault.

    keys: what names a text behind a fault. Raises `ValueError` where E, or a reader, has not read exactly the same.
    """
    own = grid.loc[grid["reader"] == REFERENCE, [*keys, "kl"]].rename(columns={"kl": "kl_reference"})
    found = grid.merge(own, on=list(keys), how="left", validate="many_to_one")
    if found["kl_reference"].isna().any() or len(grid) != len(own) * grid["reader"].nunique():
        raise ValueError(f"not every reader has read what {REFERENCE} has read")
    return found.assign(more=found["kl"] - found["kl_reference"]).drop(columns="kl_reference")


def results(run: Run, source: TextSource) -> dict[str, pd.DataFrame]:
    """`source`: the text; what the parameters record of it are names and a digest."""
    base = pretrained.base_of(run)
    readers, best = readers_of(run, base, source)
    grid = beside_reference(main_grid(run, base, source, readers), ["type", "severity", "seed", "example"])
    conditions = grid.groupby(["type", "severity", "reader", "seed"], sort=False)[MEASURES].mean().reset_index()
    overall = means_over_seeds(conditions, ["reader"], MEASURES).merge(bytes_per_token(base, readers), on="reader")
    by_type = means_over_seeds(conditions, ["type", "reader"], MEASURES)
    at_flips = {name: readers[name] for name in (best, *AT_FLIPS)}
    at_flips |= {name: Guarded(readers[name]) for name in (best, *GUARDED)}
    flips = beside_reference(flip_grid(run, base, source, at_flips), ["rate", "seed", "example"])
    by_rate = means_over_seeds(flips, ["rate", "reader"], MEASURES)
    return {
        "rivals_grid": grid,
        "rivals_results": in_order(overall, "reader", readers).assign(best_heuristic=lambda x: x["reader"] == best),
        "rivals_by_type": in_order(by_type, "reader", readers),
        "rivals_flips_grid": flips,
        "rivals_flips": in_order(by_rate, "reader", readers).sort_values("rate", kind="stable", ignore_index=True),
    }
