"""Wrong values for the arguments of public functions: each is taken, or refused by one clear line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cachemedic import (
    CorruptionSpec,
    RepairOperator,
    SketchCache,
    check_cache,
    corrupt_cache,
    load_base,
    look_after,
    protect,
    recompute,
)
from damaged_files import REFUSED, WRONG, tiny_llama
from small_configurations import VOCABULARY

TAKEN = "taken"
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 7, -(2**70), 0.5, -0.5, float("nan"), float("inf"), 1e300, 1j, "", "gausian", "all", "E", b"x",
    Path("no such folder"), [], [0], [0, 0], [-1], ["x"], (), ("window", 5, 2), {}, {"a": 1}, set(), object(), len, int,
    range(3), np.int64(2), np.float32(0.5), np.arange(3), np.array("x"), torch.tensor(2), torch.tensor(0.5),
    torch.zeros(2, 9), torch.zeros(2, 9).long(), torch.zeros(2, 9).bool(), torch.full((2, 9), -1), torch.zeros(0),
    torch.float32, torch.int8, torch.device("cpu"),
)  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A public function and arguments that it takes; they are made anew for each call."""

    function: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]

    def with_odd(self, name: str, value: Any) -> tuple[str, str]:
        """`TAKEN`, `REFUSED` or `WRONG` for one argument that is odd, and what was said."""
        try:
            self.function(**self.arguments() | {name: value})
        except (ValueError, TypeError, OSError) as error:
            lines = str(error).strip().splitlines()
            ours = "cachemedic" in _raised_in(error)
            return REFUSED if len(lines) == 1 and ours else WRONG, f"{error!r}"
        except Exception as error:
            return WRONG, repr(error)
        return TAKEN, ""


def _raised_in(error: BaseException) -> str:
    """The file whose code raised an error: an accident deep in a library is no refusal of ours."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else trace.tb_frame.f_code.co_filename


def calls(folder: Path) -> dict[str, Call]:
    """Public functions by name; `folder` is an empty one, for a saved cache."""
    model = tiny_llama()
    ids = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    damaged = torch.zeros_like(ids, dtype=torch.bool)
    damaged[0, 3] = True
    operator = RepairOperator.create("A", model.config, [0], rank=2)

    def plain() -> Any:
        return model(ids, use_cache=True).past_key_values

    def sketch() -> SketchCache:
        cache = SketchCache(model)
        model(ids, past_key_values=cache)
        return cache

    def enter(model: Any, operator: Any) -> None:
        with protect(model, operator):
            pass

    def repair(**arguments: Any) -> None:
        cache = sketch()
        layers: list[Any] = cache.layers
        layers[0].keys[0, :, 3] = 7
        cache.repair(**arguments)

    sketch().save(folder)
    operator.save_pretrained(folder / "operator")
    read, knows = load_base("embedded-llama").model, RepairOperator.from_pretrained("E/embedded-llama")
    prefilled = read(ids, use_cache=True).past_key_values
    spec = CorruptionSpec("gaussian", parameter=0.5)
    create: dict[str, Any] = {"family": "A", "model_config": model.config, "layers": [0], "rank": 2, "apply_to": "KV"}
    given = {"model": model, "ids": ids, "attention_mask": None, "position_ids": None}
    return {
        "CorruptionSpec": Call(
            CorruptionSpec,
            lambda: (
                {"type": "gaussian", "severity": None, "parameter": 0.5, "share": 1.0, "layers": "all"}
                | {"heads": "all", "time": "all_past", "base": None, "severity_map": None}
            ),
        ),
        "RepairOperator.create": Call(RepairOperator.create, lambda: create | {"seed": 0, "runs": 1}),
        "RepairOperator.from_pretrained": Call(
            RepairOperator.from_pretrained, lambda: {"name_or_folder": folder / "operator"}
        ),
        "corrupt_cache": Call(corrupt_cache, lambda: {"cache": plain(), "spec": spec, "seed": 0, "donor": None}),
        "SketchCache": Call(SketchCache, lambda: {"model": model, "operator": None, "storage": None, "seed": 0}),
        "SketchCache.load": Call(SketchCache.load, lambda: {"folder": folder, "model": model, "operator": None}),
        "SketchCache.check": Call(lambda others: sketch().check(others), lambda: {"others": ()}),
        "SketchCache.repair": Call(repair, lambda: {"method": "auto", "budget": None}),
        "protect": Call(enter, lambda: {"model": model, "operator": operator}),
        "recompute": Call(recompute, lambda: given | {"cache": plain(), "damaged": damaged}),
        "look_after": Call(look_after, lambda: given | {"cache": plain(), "operator": None, "seed": 0}),
        "check_cache": Call(
            check_cache,
            lambda: {
                "model": read,
                "operator": knows,
                "cache": prefilled,
                "ids": ids,
                "rate": 0.01,
            },
        ),
        "load_base": Call(
            lambda **arguments: load_base("embedded-llama", **arguments),  # another name would ask the hub
            lambda: {"device": "cpu", "dtype": torch.float32, "severity_map": None},
        ),
    }
