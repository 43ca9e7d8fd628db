"""The training log: JSON lines, one for each run and step, as `schemas/log_record.schema.json` says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from cachemedic.corruption.spec import CorruptionEvent
from cachemedic.training.step_data import StepOutputs
from cachemedic.training.valence.gate import Verdict

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
            records[-1]["gate"] = {
                "projected": _known(verdict.projected[run]),
                "baseline": _known(verdict.baseline[run]),
                "blocked": bool(verdict.blocked[run]),
                "message": verdict.message[run],
            }
    return records


def _known(value: torch.Tensor) -> float | None:
    return None if value.isnan() else float(value)


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


def gate_lines(log: Path) -> bytes:
    """The checks of the mercy gate in `log`, one JSON line each: run_id, step and what the record says of the gate."""
    records = map(json.loads, log.read_text().splitlines())
    kept = ({"run_id": r["run_id"], "step": r["step"], **r["gate"]} for r in records if "gate" in r)
    return "".join(json.dumps(line) + "\n" for line in kept).encode()
