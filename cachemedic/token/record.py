"""What a cache remembers of its tokens where the faults do not reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cachemedic.token.hashes import Hashes
from cachemedic.token.joint import SINKS


@dataclass(frozen=True, eq=False)
class TokenRecord:
    """Of T cached tokens in B rows: ids [B, T]; positions [B, T], -1 for padding; hashes; erased [B, T], tokens that
    attention must not read any more; codes uint8 [B, C, bytes] of the first C <= T tokens (pages that are complete);
    sinks [B, SINKS, L, 2, G, d]: keys and values of the first positions (no numbers without an operator).
    """

    ids: Tensor
    positions: Tensor
    hashes: Hashes
    erased: Tensor
    codes: Tensor
    sinks: Tensor

    def __len__(self) -> int:
        return self.ids.shape[1]

    @classmethod
    def of(cls, ids: Tensor, positions: Tensor, hashes: Hashes, sinks: Tensor, bytes_per_token: int) -> TokenRecord:
        """Of new tokens, without codes."""
        codes = torch.zeros(len(ids), 0, bytes_per_token, dtype=torch.uint8, device=ids.device)
        return cls(ids, positions, hashes, torch.zeros_like(ids, dtype=torch.bool), codes, sinks)

    @property
    def valid(self) -> Tensor:
        """Tokens [B, T] that attention reads: no padding, not erased."""
        return (self.positions >= 0) & ~self.erased

    def rows(self, choose: Callable[[Tensor], Tensor]) -> TokenRecord:
        """The same of other rows; `choose` picks them along the first axis of a tensor."""
        return TokenRecord(
            choose(self.ids),
            choose(self.positions),
            self.hashes.rows(choose),
            choose(self.erased),
            choose(self.codes),
            choose(self.sinks),
        )

    def up_to(self, length: int) -> TokenRecord:
        """The first `length` tokens. Sinks behind them stay, and are written over with the tokens that follow."""
        return replace(
            self,
            ids=self.ids[:, :length],
            positions=self.positions[:, :length],
            hashes=self.hashes.tokens(slice(length)),
            erased=self.erased[:, :length],
            codes=self.codes[:, :length],
        )

    def then(self, new: TokenRecord) -> TokenRecord:
        """With new tokens behind these, of which no codes are known yet."""
        starts = new.sinks.numel() > 0
        return TokenRecord(
            torch.cat([self.ids, new.ids], 1),
            torch.cat([self.positions, new.positions], 1),
            self.hashes.then(new.hashes),
            torch.cat([self.erased, new.erased], 1),
            self.codes,
            torch.where(_held(new.positions, self.sinks), new.sinks, self.sinks) if starts else self.sinks,
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, as a file has it."""
        own = {name: getattr(self, name) for name in ("ids", "positions", "erased", "codes", "sinks")}
        return own | {"hashes.whole": self.hashes.whole, "hashes.parts": self.hashes.parts}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> TokenRecord:
        """The inverse of `tensors`."""
        own = {name: x for name, x in tensors.items() if "." not in name}
        return cls(**own, hashes=Hashes(tensors["hashes.whole"], tensors["hashes.parts"]))

    def to(self, device: torch.device) -> TokenRecord:
        """The same on a device."""
        return self.from_tensors({name: x.to(device) for name, x in self.tensors.items()})

    @property
    def nbytes(self) -> int:
        """All bytes that it takes, ids and hashes included."""
        return sum(x.nbytes for x in self.tensors.values())


def _held(positions: Tensor, sinks: Tensor) -> Tensor:
    """Which sinks tokens at `positions` [B, T] fill, [B, SINKS, 1, ...] beside `sinks`."""
    found = torch.stack([(positions == place).any(1) for place in range(SINKS)], 1)
    return found.view(len(found), SINKS, *[1] * (sinks.dim() - 2))


def sinks_of(keys: list[Tensor], values: list[Tensor], positions: Tensor) -> Tensor:
    """The numbers [B, SINKS, L, 2, G, d] of tokens at the first positions, zeros where there is none.

    keys, values [B, G, T, d] by layer; positions [B, T].
    """
    rows, heads, _, width = keys[0].shape
    found = keys[0].new_zeros(rows, SINKS, len(keys), 2, heads, width)
    at, slots = ((positions >= 0) & (positions < SINKS)).nonzero(as_tuple=True)
    for layer, sides in enumerate(zip(keys, values, strict=True)):
        for side, x in enumerate(sides):
            found[at, positions[at, slots], layer, side] = x[at, :, slots]
    return found
