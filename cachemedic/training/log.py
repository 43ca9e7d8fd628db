"""The training log: JSON lines, one for each run and step, as `schemas/log_record.schema.json` says.

Beside the operators that it trained it lies compressed, LOG.gz, and apart from it what a mercy gate found, GATE_LOG, as
`schemas/gate_record.schema.json` says.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from cachemedic.core.files import seal, unseal, write_atomically
from cachemedic.corruption.spec import CorruptionEvent
from cachemedic.training.step_data import StepOutputs
from cachemedic.training.valence.gate import Projection, Verdict

LOG, GATE_LOG = "log.jsonl", "gate.jsonl"
# In the objective: in the log. What an objective calls otherwise is logged as `loss_` and its name.
NAMES = {"loss": "loss_total", "identity": "loss_id", "contraction": "loss_contr", "effective": "effective_sequences"}
CANONICAL = ("loss_total", "loss_kd", "loss_id", "loss_contr")  # in every record; null where a run has no such part


@torch.no_grad()
def log_records(
    run_ids: Sequence[str],
    step: int,
    events: Sequence[Sequence[CorruptionEvent]],
    outputs: StepOutputs,
    losses: dict[str, torch.Tensor],
    verdict: Verdict | None = None,
) -> list[dict]:
    """The records of one step, one for each of R runs.

    `events`: those of the samples of every seed (seeds x B; the R runs are seed-major); `losses`: what the objective
    returned, [R] each; `verdict`: of the mercy gate, if it was asked. A mean that nothing contributes to is None.
    """
    conditions, now = len(run_ids) // len(events), datetime.now(UTC).isoformat(timespec="seconds")
    logged = [[event.as_record() for event in of_seed] for of_seed in events]
    records = []
    for run, run_id in enumerate(run_ids):
        of_run = logged[run // conditions]
        corrupted = outputs.is_corrupted[run]
        rho = outputs.rho[run][corrupted]
        records.append({
            "run_id": run_id,
            "phase": "train",
            "timestamp_utc": now,
            "step": step,
            **dict.fromkeys(CANONICAL),
            **{NAMES.get(name, f"loss_{name}"): _known(values[run]) for name, values in losses.items()},
            "rho_mean": _mean(rho),
            "rho_p95": float(rho.quantile(0.95)) if len(rho) else None,
            **{f"{name}_mean": _mean(ratio[run][corrupted]) for name, ratio in outputs.rho_by_side.items()},
            "corruption_type": [record["type"] for record in of_run],
            "corruption_severity": [record["severity"] for record in of_run],
            "events": of_run,
        })  # fmt: skip
        if verdict is not None:
            check: dict[str, Any] = {
                **_projection((verdict.projected, verdict.baseline), run),
                "blocked": bool(verdict.blocked[run]),
                "message": verdict.message[run],
            }
            if verdict.other is not None:
                check["other"] = _projection(verdict.other, run)
            records[-1]["gate"] = check
    return records


def _projection(found: Projection, run: int) -> dict[str, float | None]:
    return {name: _known(values[run]) for name, values in zip(("projected", "baseline"), found, strict=True)}


def _known(value: torch.Tensor) -> float | None:
    return None if value.isnan() else float(value)


def _mean(values: torch.Tensor) -> float | None:
    """Of those that are not NaN; None if all are."""
    known = values[~values.isnan()]
    return float(known.mean()) if len(known) else None


def drop_after(log: Path, step: int, runs: int) -> None:
    """Cut off the lines of `log` that come after `step`, and a line that was not written to its end.

    Raises `ValueError` for a line before that is no record, and where records of the steps before are missing.
    """
    with open(log, "rb+") as file:
        kept = lines = 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") or _record(log, number, line)["step"] > step:
                break
            kept, lines = kept + len(line), number
        _check_complete(log, lines, step * runs)
        file.truncate(kept)


def ship_log(log: Path, folder: Path) -> None:
    """Write `log` into `folder`, compressed, and what a mercy gate found; the same bytes for the same log."""
    write_atomically(folder / f"{LOG}.gz", gzip.compress(log.read_bytes(), mtime=0))
    kept = [{"run_id": r["run_id"], "step": r["step"], **r["gate"]} for r in _records(log) if "gate" in r]
    if kept:
        write_atomically(folder / GATE_LOG, b"".join(seal(line, indent=None) for line in kept))


def gate_checks(folder: Path) -> list[dict[str, Any]]:
    """The checks of a mercy gate that `ship_log` wrote into `folder`, one for each run and update that was checked.

    Raises `FileNotFoundError`, and `ValueError` for a line that is not as it was written.
    """
    with open(folder / GATE_LOG, "rb") as file:
        return [unseal(line, f"line {number} of {folder / GATE_LOG}") for number, line in enumerate(file, 1)]


def _records(log: Path) -> Iterator[dict[str, Any]]:
    with open(log, "rb") as file:
        for number, line in enumerate(file, 1):
            yield _record(log, number, line)


def _check_complete(log: Path, found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(
            f"{log} holds {found} records of the steps so far, not {expected}: delete {log.parent} to train from the "
            "start"
        )


def _record(log: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        return unseal(line, f"line {number} of {log}")
    except ValueError as error:
        raise ValueError(f"{error}; delete {log.parent} to train from the start") from error
