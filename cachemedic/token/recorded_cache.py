"""A cache with a record of its tokens: what checking, repairing and saving ask of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cachemedic.core.integers import seed_number
from cachemedic.token.coder import Coder
from cachemedic.token.dense import dense_shape
from cachemedic.token.forward_hook import HookedCache
from cachemedic.token.hashes import TokenHash
from cachemedic.token.joint_operator import JointOperator
from cachemedic.token.record import TokenRecord


class RecordedCache(HookedCache):
    """What `cachemedic.token.cache.SketchCache` is to those who look at its tokens."""

    record: TokenRecord | None

    def bind(self, model: PreTrainedModel, operator: JointOperator | None, seed: int) -> None:
        """Whose cache this is, and who repairs it; its record is empty. Raises what `SketchCache` raises."""
        self.shape = dense_shape(model)
        self.model, self.operator, self.seed = model, operator, seed_number(seed)
        self.coder = None if operator is None else Coder(model, operator)
        self.record = None
        self._hasher: TokenHash | None = None

    @property
    def hasher(self) -> TokenHash:
        """The hash of this cache's format. Raises `ValueError` while the cache is empty."""
        if self._hasher is None:
            layers: list[Any] = self.layers
            if not layers or not layers[0].is_initialized:
                raise ValueError("this SketchCache is empty: prefill it first")
            shape = self.shape
            self._hasher = TokenHash(shape.num_layers, shape.num_kv_heads, shape.head_dim, layers[0].dtype, self.seed)
        return self._hasher

    @property
    def kept(self) -> TokenRecord:
        """The record of the tokens. Raises `ValueError` while the cache is empty, and where tokens came unannounced."""
        recorded = 0 if self.record is None else len(self.record)
        if (stored := int(self.get_seq_length())) != recorded:
            raise ValueError(
                f"this SketchCache holds {stored} tokens, {recorded} of them written by complete forward passes of its "
                "model: call `reset` and prefill it again"
            )
        if self.record is None:
            raise ValueError("this SketchCache is empty: prefill it first")
        return self.record

    def numbers(self) -> tuple[list[Tensor], list[Tensor]]:
        """The stored keys and the values [B, G, T, d] by layer, where the record is.

        Raises `ValueError` for layers of another number, shape or number format than were written.
        """
        self._check_layers()
        record = self.kept
        if self.offloading:  # the next layer may be on its way back
            torch.cuda.default_stream(record.ids.device).wait_stream(self.prefetch_stream)
        layers: list[Any] = self.layers
        length, device = len(record), record.ids.device
        keys = [layer.keys[:, :, :length].to(device) for layer in layers]
        return keys, [layer.values[:, :, :length].to(device) for layer in layers]

    def _check_layers(self) -> None:
        """Whether the layers are still tensors like those that were written: no hash is of any use otherwise."""
        layers: list[Any] = self.layers
        if self.record is None:
            return
        if len(layers) != self.shape.num_layers:
            raise ValueError(f"this SketchCache holds {len(layers)} layers; its model has {self.shape.num_layers}")
        rows, length = self.record.ids.shape
        written, width = layers[0].dtype, self.shape.head_dim
        for number, layer in enumerate(layers):
            for side in ("keys", "values"):
                x = getattr(layer, side)
                found = [*x.shape[:2], x.shape[-1]] if isinstance(x, Tensor) and x.dim() == 4 else None
                if found != [rows, self.shape.num_kv_heads, width] or x.dtype != written or x.shape[2] < length:
                    what = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
                    raise ValueError(
                        f"the {side} of layer {number} of this SketchCache must be {written} [{rows}, "
                        f"{self.shape.num_kv_heads}, {length}, {width}], as they were written, not {what}"
                    )
