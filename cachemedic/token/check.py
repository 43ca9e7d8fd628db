"""What is wrong with a cache: which tokens and layers are not what was written, and what happened to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from typing import Any

import torch
from torch import Tensor

from cachemedic.token.damage_kinds import KINDS, NUMBER, in_other_layout, kinds_of
from cachemedic.token.hashes import Hashes, TokenHash

SHOWN = 8  # ranges of tokens that a report spells out


@dataclass(frozen=True, eq=False)
class CheckReport:
    """What a check found in B rows of T cached tokens.

    valid [B, T]: tokens that attention reads; changed [B, T]: those that are not what was written, and tokens that it
    does not read, of padding or erased, if they are not finite, as it multiplies them by zero; parts [B, T, L, 2]:
    where, by layer, keys and values; kind_numbers [B, T]: of `KINDS`; origin [B, T, 2]: row and slot of the token of
    this cache that was found in its place, -1 where there is none; erased: how many a repair erased.
    """

    valid: Tensor
    changed: Tensor
    parts: Tensor
    kind_numbers: Tensor
    origin: Tensor = field(repr=False)
    erased: int = 0

    @property
    def read(self) -> int:
        """How many tokens attention reads."""
        return int(self.valid.sum())

    def __bool__(self) -> bool:
        """Whether anything is damaged."""
        return bool(self.changed.any())

    @property
    def tokens(self) -> list[tuple[int, int]]:
        """(row, slot) of each damaged token."""
        return [(int(row), int(slot)) for row, slot in self.changed.nonzero()]

    @property
    def layers(self) -> list[int]:
        """The layers that hold damage."""
        return self.parts.any(3).flatten(0, 1).any(0).nonzero().squeeze(1).tolist()

    @property
    def whole_layers(self) -> list[int]:
        """The layers of which no checked token is as it was written."""
        hit = self.parts.any(3) | ~self.valid[..., None]
        return hit.all(0).all(0).nonzero().squeeze(1).tolist() if self.read else []

    @property
    def kinds(self) -> dict[str, int]:
        """How many damaged tokens there are of each kind, most first."""
        counts = Counter(KINDS[number] for number in self.kind_numbers[self.changed].tolist())
        return dict(counts.most_common())

    def kind(self, row: int, slot: int) -> str:
        """What happened to one token, one of `KINDS`."""
        return KINDS[int(self.kind_numbers[row, slot])]

    def __str__(self) -> str:
        if not self:
            erased = f"; {self.erased} tokens are erased, and not read" if self.erased else ""
            return f"all {self.read} tokens are as they were last written or repaired{erased}"
        return "\n".join(f"{name}: {text}" for name, text in self.lines())

    def _repr_html_(self) -> str:
        if not self:
            return f"<p>{escape(str(self))}</p>"
        rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in self.lines())
        return f"<table>{rows}</table>"

    def lines(self) -> Iterable[tuple[str, str]]:
        """What is said of the damage, by name."""
        yield "damaged", f"{int(self.changed.sum())} of {self.read} tokens"
        if self.erased:
            yield "erased", f"{self.erased} tokens, which are not read"
        for row in self.changed.any(1).nonzero().squeeze(1).tolist():
            yield f"row {row}", f"tokens {ranges(self.changed[row].nonzero().squeeze(1).tolist())}"
        sides = self.parts.flatten(0, 2).any(0).tolist()
        where = " and ".join(name for name, hit in zip(("keys", "values"), sides, strict=True) if hit)
        yield "layers", f"{ranges(self.layers)}, {where}"
        if self.whole_layers and len(self.layers) < self.parts.shape[2]:
            yield "whole layers", ranges(self.whole_layers)
        yield "kinds", ", ".join(f"{kind} ({count})" for kind, count in self.kinds.items())


def ranges(numbers: list[int]) -> str:
    """3-5, 9 for 3, 4, 5, 9."""
    ends: list[list[int]] = []
    for number in numbers:
        if ends and number == ends[-1][1] + 1:
            ends[-1][1] = number
        else:
            ends.append([number, number])
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in ends[:SHOWN]]
    return ", ".join(shown + ["..."] * (len(ends) > SHOWN))


def check(
    hasher: TokenHash,
    keys: list[Tensor],
    values: list[Tensor],
    written: Hashes,
    valid: Tensor,
    others: Iterable[Tensor] = (),
) -> CheckReport:
    """Compares the keys and values [B, G, T, d] of all layers with the hashes that were `written`.

    valid [B, T]: tokens that attention reads; others: the hashes [N] of whole tokens that may have come here from
    elsewhere.
    """
    sums = hasher.sums(keys, values)
    now = hasher.finish(sums)
    changed = now.whole != written.whole
    if (unread := changed & ~valid).any():
        changed &= valid | ~_finite(keys, values, unread)
    parts = (now.parts != written.parts) & changed[..., None, None]
    unplaced = changed & ~parts.flatten(2).any(2)  # the short hashes of a changed layer agree by chance
    parts |= unplaced[..., None, None]
    kinds = torch.zeros_like(changed, dtype=torch.long)
    origin = torch.full((*changed.shape, 2), -1, device=changed.device)
    if changed.any():
        kinds[changed] = kinds_of(hasher, (keys, values), changed, parts, valid & ~changed, written)
        _find_layouts(hasher, (keys, values), written, parts, changed, valid, kinds)
        _find_tokens(now, written, changed, valid, others, kinds, origin)
    return CheckReport(valid, changed, parts, kinds, origin)


def _finite(keys: list[Tensor], values: list[Tensor], tokens: Tensor) -> Tensor:
    """Whether all numbers of each of `tokens`, bool [B, T], are finite; true for the others."""
    rows, slots = tokens.nonzero(as_tuple=True)
    found = torch.ones_like(tokens)
    for side in (*keys, *values):
        found[rows, slots] &= side[rows, :, slots].isfinite().all(2).all(1)
    return found


def _find_layouts(
    hasher: TokenHash, sides: Any, written: Hashes, parts: Tensor, changed: Tensor, valid: Tensor, kinds: Tensor
) -> None:
    """Marks tokens whose changed layers all hold the right numbers in another layout."""
    often = parts[valid].float().mean(0) > 0.5  # a layout is that of all tokens
    possible = changed & ~(parts & ~often).flatten(2).any(2)
    for layer, side in often.nonzero().tolist():
        if not possible.any():
            return
        possible &= ~parts[:, :, layer, side] | in_other_layout(hasher, sides[side][layer], side, layer, written.parts)
    kinds[possible] = NUMBER["another layout"]


def _find_tokens(
    now: Hashes,
    written: Hashes,
    changed: Tensor,
    valid: Tensor,
    others: Iterable[Tensor],
    kinds: Tensor,
    origin: Tensor,
) -> None:
    """Marks tokens that are what was written for another one that is read, and where that one belongs."""
    looked_for = now.whole[changed]
    from_other = torch.zeros_like(looked_for, dtype=torch.bool)
    for other in others:
        from_other |= torch.isin(looked_for, other)
    kinds[changed] = torch.where(from_other, NUMBER["another token"], kinds[changed])
    if not valid.any():
        return
    known, order = written.whole[valid].sort()
    place = torch.searchsorted(known, looked_for).clamp_max(len(known) - 1)
    here = known[place] == looked_for
    kinds[changed] = torch.where(here, NUMBER["another token"], kinds[changed])
    origin[changed] = torch.where(here[:, None], valid.nonzero()[order[place]], -1)
