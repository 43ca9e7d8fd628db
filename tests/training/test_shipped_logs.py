"""The training logs that ship beside operators are valid, as are the checks of mercy gates, and they are linked."""

import gzip
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import fastjsonschema
import pytest

from cachemedic.training.log import gate_checks

ROOT = Path(__file__).parents[2]
FOLDERS = [path for path in sorted((ROOT / "trained").iterdir()) if path.is_dir()]


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in gzip.decompress((folder / "log.jsonl.gz").read_bytes()).splitlines()]


@cache
def validator(name: str) -> Callable[[dict], dict]:
    return fastjsonschema.compile(json.loads((ROOT / "schemas" / f"{name}_record.schema.json").read_text()))


def test_some_logs_ship():
    assert FOLDERS


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_shipped_log_is_valid_and_complete(folder):
    lines = records(folder)
    for line in lines:
        validator("log")(line)
    runs = {line["run_id"] for line in lines}
    assert all(run.startswith(f"{folder.name}/seed") for run in runs)
    last = max((line["step"] for line in lines), default=0)  # an operator that was only fitted had no update
    assert len(lines) == last * len(runs)
    assert len({(line["run_id"], line["step"]) for line in lines}) == len(lines)
    checks = [{"run_id": r["run_id"], "step": r["step"], **r["gate"]} for r in lines if "gate" in r]
    assert (folder / "gate.jsonl").exists() == bool(checks)
    if checks:
        assert gate_checks(folder) == checks
        for line in (folder / "gate.jsonl").read_text().splitlines():
            validator("gate")(json.loads(line))
        assert checks[-1]["step"] == last, "the last update is always checked"
