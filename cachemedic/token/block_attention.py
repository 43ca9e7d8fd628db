"""Attention of scattered queries that reads, block by block, only keys that do not lie ahead of all of them.

Kernels skip what lies ahead where the mask is that of a plain prefill. With a mask of its own for each query they sum
up all keys, those that count for nothing as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 4  # queries that stay together: kernels may round sums of fewer in another way


class BlockMask(Tensor):
    """A mask [R, 1, n, W] with which `scaled_dot_product_attention` takes queries of one block after the other.

    Any other function takes it as the plain tensor that it is.
    """

    pieces: tuple[list[int], list[int]]  # how many queries follow each other in a block, and where the block ends

    @staticmethod
    def of(mask: Tensor, slots: Tensor, block: int) -> Tensor:
        """The mask of queries at `slots` [R, n], each of which reads keys up to its own; as it is for one block."""
        groups = slots.amax(0).split(GROUP)
        last = torch.stack([group.amax() for group in groups])
        ends, sizes = (last // block + 1).unique_consecutive(return_counts=True)
        if len(ends) == 1:
            return mask
        counts = (GROUP * sizes).tolist()
        counts[-1] -= GROUP * len(groups) - slots.shape[1]
        found = mask.as_subclass(BlockMask)
        found.pieces = counts, (ends * block).tolist()
        return found

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.scaled_dot_product_attention:
                return _attend(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))


def _attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: BlockMask, *args: Any, **kwargs: Any) -> Tensor:
    counts, ends = attn_mask.pieces
    found = [
        F.scaled_dot_product_attention(some, key[..., :end, :], value[..., :end, :], mask[..., :end], *args, **kwargs)
        for some, mask, end in zip(query.split(counts, -2), attn_mask.split(counts, -2), ends, strict=True)
    ]
    return torch.cat(found, -2)
