"""The augmented read: attention reads a stored cache, left as it is, as if a scrub had written its repair back.

The repair of a token is kept in few numbers a head: r coordinates f of its key's correction and r coordinates g of its
value's, on bases U, U_v [d, r] shared by all tokens, and a number b that is added to its logits. They enter attention
as further dimensions of the head,

    scaling q k_hat^T + b = scaling [q, q U, 1 / scaling] [k, f, b]^T,
    A v_hat = o + o_g U_v^T with [o, o_g] = A [v, g],

so that every query of a prefill or of a decoding step is served by whatever attention the model uses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from cachemedic.defenses.defense import WORD_BITS
from cachemedic.models.cache import unstack_cache
from cachemedic.repair.attention import Attention, Gates
from cachemedic.token.layerwise.observation import sane
from cachemedic.token.layerwise.operator import Repair, TokenAware
from cachemedic.token.layerwise.token_vectors import split

MULTIPLE = 8  # of the width of a head: other widths, or unequal ones for keys and values, leave the fast kernels


@dataclass(frozen=True, eq=False)
class AugmentedRead:
    """Reads N rows of T cached tokens with their repair; attach it with `cachemedic.repair.attach.protect`.

    For the caches that were scrubbed: row i of the batch holds the tokens of row i, and more behind them, which are
    read as they are. limits, bases, tails: of keys and of values. limits [P, G, d]: magnitudes from which on a stored
    number is read as zero, as a scrub reads it; bases [P, G, d, r], orthonormal; tails [N, P, G, T, w]: what the head
    is widened by, the features, for keys the bias, and zeros.
    """

    operator: TokenAware
    limits: tuple[Tensor, Tensor]
    bases: tuple[Tensor, Tensor]
    tails: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, operator: TokenAware, repair: Repair) -> AugmentedRead:
        """Keeps the repair that the operator found in a cache; of rank r = d exactly, else its best part of that rank.

        The bases are the principal axes of this cache's corrections: no others leave less of them out (Eckart and
        Young 1936).
        """
        assert operator.transform is not None  # it has repaired
        heads, rank = operator.config.model.num_kv_heads, operator.rank
        extra = extra_width(operator)
        limits = tuple(x[0, :, :, 0] for x in split(sane(operator.transform)[None, :, None], heads))
        bases, tails = [], []
        for side, correction in enumerate(split(repair.correction.detach(), heads)):
            gram = (correction.mT @ correction).sum(0)
            basis = torch.linalg.eigh(gram).eigenvectors[..., -rank:]
            tail = correction.new_zeros(*correction.shape[:-1], extra)
            tail[..., :rank] = correction @ basis
            if side == 0 and operator.config.options["bias"]:
                tail[..., rank] = repair.bias.detach().transpose(2, 3)
            bases.append(basis)
            tails.append(tail)
        return cls(operator, (limits[0], limits[1]), (bases[0], bases[1]), (tails[0], tails[1]))

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose repair it holds."""
        return self.operator.layers

    @property
    def runs(self) -> int:
        """Of the operator; rows are run-major."""
        return self.operator.runs

    @property
    def device(self) -> torch.device:
        """Where its numbers are."""
        return self.tails[0].device

    def bits_per_token(self) -> float:
        """What is stored beside a token, in 16-bit words, padding included; not the bases, which a cache has once."""
        shape = self.operator.config.model
        return WORD_BITS * 2 * extra_width(self.operator) * shape.num_kv_heads * len(self.layers)

    def check_model(self, model_config: PreTrainedConfig) -> None:
        """See `RepairOperator.check_model`."""
        self.operator.check_model(model_config)

    def of_rows(self, rows: slice | Tensor) -> AugmentedRead:
        """The same for some of the rows."""
        return replace(self, tails=(self.tails[0][rows], self.tails[1][rows]))

    def cache(self, k: Tensor, v: Tensor) -> Cache:
        """Stored k, v [N, L, G, T, d] in a cache of wide heads: nothing is left to copy when a step reads it."""
        cache = unstack_cache(k, v)
        for place, layer in enumerate(self.layers):
            cache.layers[layer] = wide = WideLayer(k.shape[-1] + self.tails[0].shape[-1])
            wide.update(*self._widen(place, k[:, layer], v[:, layer]))
        return cache

    def attend(
        self, layer: int, attention: Attention, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor | None, Gates]:
        """See `RepairOperator.attend`; keys and values may be wide already (`cache`). No gates.

        Raises `ValueError` for other rows, or fewer tokens, than were scrubbed.
        """
        rows, _, _, length, _ = self.tails[0].shape
        if len(query) != rows or key.shape[2] < length:
            raise ValueError(
                f"this repair is for {rows} rows of {length} cached tokens; attention reads {len(query)} rows of "
                f"{key.shape[2]}"
            )
        place, head_dim, rank = self.layers.index(layer), query.shape[-1], self.bases[0].shape[-1]
        if key.shape[-1] == head_dim:
            key, value = self._widen(place, key, value)
        shared = query.shape[1] // key.shape[1]  # query heads that read one key head
        to_key, to_value = (x[place].to(query.dtype).repeat_interleave(shared, 0) for x in self.bases)
        wide = F.pad(torch.cat([query, query @ to_key], -1), (0, key.shape[-1] - head_dim - rank))
        if self.operator.config.options["bias"]:
            wide[..., head_dim + rank] = 1 / attention.scaling
        output, weights = attention(wide, key, value)
        features = output[..., head_dim : head_dim + rank].transpose(1, 2) @ to_value.mT
        return output[..., :head_dim] + features.transpose(1, 2), weights, (None, None)

    def _widen(self, place: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stored key, value [N, G, T', d], T' >= T, as wide heads; numbers that no clean token holds are zero."""
        results = []
        for x, limit, tail in zip((key, value), self.limits, self.tails, strict=True):
            length = tail.shape[3]
            wide = F.pad(x, (0, tail.shape[-1]))
            stored = x[:, :, :length]
            wide[:, :, :length, : x.shape[-1]] = torch.where(stored.abs() < limit[place, :, None], stored, 0.0)
            wide[:, :, :length, x.shape[-1] :] = tail[:, place]
            results.append(wide)
        return results[0], results[1]


class WideLayer(DynamicLayer):
    """A cache layer of heads that are `width` wide; what new tokens lack is zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends tokens [N, G, M, d]; returns all keys and values [N, G, T, width]."""
        wide = [F.pad(x, (0, self.width - x.shape[-1])) for x in (key_states, value_states)]
        return super().update(*wide, *args, **kwargs)


def extra_width(operator: TokenAware) -> int:
    """By how much heads grow: by the features, the bias, and what fills the width up to a multiple of `MULTIPLE`."""
    wide = operator.head_dim + operator.rank + int(operator.config.options["bias"])
    return -(-wide // MULTIPLE) * MULTIPLE - operator.head_dim
