"""Keys and values, as most of this package passes them on: two tensors of one shape."""

from __future__ import annotations

from torch import Tensor

KeysValues = tuple[Tensor, Tensor]
