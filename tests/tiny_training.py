"""A tiny base with a clean-cache bank, a calibrated severity map for it, and a sweep of four runs."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny import DOCUMENTS, tiny_model, tiny_tokenizer

from cachemedic.core.files import write_hashed
from cachemedic.core.severity_map import GRID, MAP_COLUMNS
from cachemedic.core.tensors import read_tensors, unflattened
from cachemedic.corruption import severity
from cachemedic.data import text_source
from cachemedic.models.load import Base
from cachemedic.repair.operator import RepairOperator
from cachemedic.training.bank import Bank, BankConfig, open_bank
from cachemedic.training.config import TrainConfig
from cachemedic.training.objective import RepairObjective

CONFIG = TrainConfig(
    layers=(0, 1, 2),
    rank=3,
    objectives=(RepairObjective(), RepairObjective(lambda_contr=0.0)),
    seeds=(3, 7),
    bank=BankConfig(samples=24, prefix=10, decoded=2),
    steps=5,
    batch=6,
    checkpoint_every=2,
)
AT_FULL_SEVERITY = {
    "gaussian": 2.0, "dropout_zero": 0.8, "orthogonal_rotation": 1.0, "bitflip_sparse": 0.1, "quant_noise": 1,
    "contiguous_overwrite": 128,
}  # fmt: skip


def tiny_base(architecture: str = "gpt2") -> Base:
    """3 layers of 4 query heads of 8; "llama" has 2 key/value heads."""
    return Base(tiny_model(architecture), tiny_tokenizer(), f"tiny-{architecture}")


def tiny_bank(base: Base, config: BankConfig, folder: Path) -> Bank:
    """The bank of `config` over the tiny documents."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_source, "documentation", lambda split: tuple(DOCUMENTS))
        return open_bank(base, config, folder)


def linear_map(name: str = "tiny", layers: int = 3, heads: int = 4) -> pd.DataFrame:
    """A severity map whose parameters are linear in the severity (bits: in the share of positions)."""
    rows = []
    for kind, parameter in AT_FULL_SEVERITY.items():
        for s in GRID:
            strength = (parameter, s) if kind == "quant_noise" else (parameter * s, 1.0)
            rows.append((name, layers, heads, kind, s, *strength, 1.0))
    return pd.DataFrame(rows, columns=MAP_COLUMNS)


def ship(rows: pd.DataFrame, patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Makes `rows` the map that ships, until `patch` is undone and `severity.shipped_map` cleared."""
    write_hashed(folder / "severity_map.csv", rows.to_csv(index=False).encode())
    patch.setattr(severity, "MAP", folder / "severity_map.csv")
    severity.shipped_map.cache_clear()


def parameters(operator: RepairOperator) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in operator.named_parameters()}


def log_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def saved(folder: Path) -> dict:
    """The checkpoint in a folder: its step, and the state of each part."""
    tensors, record = read_tensors(folder / "checkpoint.safetensors")
    return {"step": record["step"]} | unflattened(tensors, record["state"])
