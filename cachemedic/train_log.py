"""The training log: JSON lines, one for each run and step, as `schemas/log_record.schema.json` says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from cachemedic.corruption_spec import CorruptionEvent
from cachemedic.objective import StepOutputs

LOSSES = {"total": "loss", "kd": "kd", "id": "identity", "contr": "contraction"}  # in the log: in the objective


@torch.no_grad()
def log_records(
    run_ids: Sequence[str],
    step: int,
    events: Sequence[Sequence[CorruptionEvent]],
    outputs: StepOutputs,
    terms: dict[str, torch.Tensor],
    losses: dict[str, torch.Tensor],
) -> list[dict]:
    """The records of one step, one for each of R runs.

    `events`: those of the samples of every seed (seeds x B; the R runs are seed-major); `terms`: rho, rho_k and rho_v
    [R, B, P]; `losses`: what the objective returned, [R] each. A mean that nothing contributes to is None.
    """
    conditions, now = len(run_ids) // len(events), datetime.now(UTC).isoformat(timespec="seconds")
    logged = [[event.as_record() for event in of_seed] for of_seed in events]
    records = []
    for run, run_id in enumerate(run_ids):
        of_run = logged[run // conditions]
        rho, rho_k, rho_v = (terms[name][run][outputs.is_corrupted[run]] for name in ("rho", "rho_k", "rho_v"))
        records.append({
            "run_id": run_id,
            "phase": "train",
            "timestamp_utc": now,
            "step": step,
            **{f"loss_{short}": float(losses[name][run]) for short, name in LOSSES.items()},
            "rho_mean": _mean(rho),
            "rho_p95": float(rho.quantile(0.95)) if len(rho) else None,
            "rho_k_mean": _mean(rho_k),
            "rho_v_mean": _mean(rho_v),
            "corruption_type": [record["type"] for record in of_run],
            "corruption_severity": [record["severity"] for record in of_run],
            "events": of_run,
        })  # fmt: skip
    return records


def _mean(values: torch.Tensor) -> float | None:
    """Of those that are not NaN; None if all are."""
    known = values[~values.isnan()]
    return float(known.mean()) if len(known) else None


def drop_after(log: Path, step: int) -> None:
    """Cut off the lines of `log` that come after `step`, and a line that was not written to its end."""
    with open(log, "rb+") as file:
        kept = 0
        for line in file:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
            kept += len(line)
        file.truncate(kept)
