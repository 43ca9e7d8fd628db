"""Memory that is written again and again, where to allocate it anew would cost more than the arithmetic on it."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor


class Scratch:
    """Memory by name, for the argument `out` of torch's functions. It lasts until the name is asked for again.

    Where gradients are recorded every result has to be a tensor of its own: then it gives None.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def __call__(self, name: str, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """Memory with the shape and on the device of a tensor."""
        if torch.is_grad_enabled():
            return None
        size, held = prod(like.shape), self._held.get(name)
        if held is None or held.numel() < size or held.dtype != dtype:
            held = self._held[name] = torch.empty(size, dtype=dtype, device=like.device)
        return held[:size].view(like.shape)
