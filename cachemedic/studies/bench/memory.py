"""Peak memory of a computation, counted by the bytes of live tensors: the same number on every machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _LiveTensors(TorchDispatchMode):
    """Follows the storages that operations within make, and the most bytes that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and (key := x.untyped_storage()._cdata) not in given | self.live.keys():
                self.live[key] = (StorageWeakRef(x.untyped_storage()), x.untyped_storage().nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that tensors made within `work` took at once; not counted: what kernels use inside."""
    with _LiveTensors() as tensors:
        work()
    return tensors.peak
