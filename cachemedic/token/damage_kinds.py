"""What happened to a damaged token, as far as its numbers and the hashes of other tokens tell."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

import torch
from torch import Tensor

from cachemedic.token.hashes import TokenHash

KINDS = (
    "sound",
    "not finite",  # NaN or infinity
    "zeros",  # numbers that are exactly zero
    "another token",  # all layers hold what was written for another token: a stale or swapped page
    "another layer",  # keys and values that were written for another layer
    "keys for values",  # and the other way round
    "heads permuted",  # the right heads in another order
    "another layout",  # heads and tokens of a layer laid out in the other order
    "rounded",  # few distinct values a head
    "flips",  # a few numbers far outside of what the sound tokens hold in their place
    "other numbers",  # noise, or anything else that does not show
)
NUMBER = {kind: number for number, kind in enumerate(KINDS)}
ZEROS = 0.05  # of the changed numbers; sound ones are hardly ever zero exactly
FAR = 3.0  # times the largest magnitude of the same channel in the sound tokens
FEW = 0.15  # of the numbers of a head
MOST_HEADS = 4  # whose orders are all tried


def kinds_of(
    hasher: TokenHash, keys: Tensor, values: Tensor, parts: Tensor, changed: Tensor, largest: Tensor
) -> Tensor:
    """The number in `KINDS` [n] of damaged tokens, from the most to the least certain sign.

    keys, values [n, L, G, d]: as stored; parts [n, L, 2]: what their hashes were, see `Hashes.parts`; changed
    [n, L, 2]: where they are not that; largest [L, 2, G, d]: magnitudes in the sound tokens.
    """
    numbers = torch.stack([keys, values], 2).float()  # [n, L, 2, G, d]
    found = torch.full((len(keys),), NUMBER["other numbers"], device=keys.device)
    hit = changed[..., None].expand(numbers.shape[:4])  # by head
    finite = numbers.isfinite()
    found[_share(_few_far(numbers, largest), hit) > 0] = NUMBER["flips"]
    found[_share(_few_distinct(numbers), hit) > 0.5] = NUMBER["rounded"]
    for kind, tokens in _known_content(hasher, keys, values, parts, changed):
        found[tokens] = NUMBER[kind]
    found[_share((numbers == 0).float().mean(-1), hit) > ZEROS] = NUMBER["zeros"]
    found[(~finite & hit[..., None]).flatten(1).any(1)] = NUMBER["not finite"]
    return found


def in_other_layout(hasher: TokenHash, stored: Tensor, side: int, layer: int, parts: Tensor) -> Tensor:
    """Which tokens [B, T] of a layer's keys or values are as written once heads and tokens change their places.

    stored [B, G, T, d]: numbers that were written as [T, G, d] and are read as [G, T, d], or the other way round.
    """
    rows, heads, tokens, width = stored.shape
    found = torch.zeros(rows, tokens, dtype=torch.bool, device=stored.device)
    for other in (
        stored.reshape(rows, tokens, heads, width).transpose(1, 2),
        stored.transpose(1, 2).reshape(stored.shape),
    ):
        sums = hasher.sums([other], [other])[:, :, 0, side]
        found |= hasher.parts(sums) == parts[:, :, layer, side]
    return found


def _share(of_heads: Tensor, hit: Tensor) -> Tensor:
    """The mean [n] over the heads [n, L, 2, G] that are hit."""
    return (of_heads * hit).flatten(1).sum(1) / hit.flatten(1).sum(1).clamp_min(1)


def _few_far(numbers: Tensor, largest: Tensor) -> Tensor:
    """Heads [n, L, 2, G] of numbers [n, L, 2, G, d] of which a few, and a few only, are far outside."""
    far = (numbers.abs() > FAR * largest).float().mean(-1)
    return ((far > 0) & (far < FEW)).float()


def _few_distinct(numbers: Tensor) -> Tensor:
    """Heads [...] of numbers [..., d] that hold at most a quarter as many different magnitudes as numbers."""
    ordered = numbers.abs().sort(-1).values
    distinct = 1 + (ordered.diff(dim=-1) != 0).sum(-1)
    return (4 * distinct <= numbers.shape[-1]).float()


def _known_content(
    hasher: TokenHash, keys: Tensor, values: Tensor, parts: Tensor, changed: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Kinds, and the tokens [n] for which every changed layer holds something that was written, only elsewhere."""
    both = hasher.sums(
        [k[None].transpose(1, 2) for k in keys.unbind(1)], [v[None].transpose(1, 2) for v in values.unbind(1)]
    )
    now = hasher.parts(both[0])  # [n, L, 2]

    def everywhere(right: Tensor) -> Tensor:
        return (right | ~changed).flatten(1).all(1)

    if keys.shape[2] <= MOST_HEADS:
        yield "heads permuted", everywhere(_permuted(hasher, keys, values, parts))
    yield "keys for values", everywhere(now == parts.flip(-1))
    elsewhere = (now[:, :, None] == parts[:, None]).any(2) & ~(now == parts)
    yield "another layer", everywhere(elsewhere)


def _permuted(hasher: TokenHash, keys: Tensor, values: Tensor, parts: Tensor) -> Tensor:
    """Where [n, L, 2] an order of the heads other than the stored one has the hash that was written."""
    count, layers, heads, _ = keys.shape
    found = torch.zeros(count, layers, 2, dtype=torch.bool, device=keys.device)
    for side, x in enumerate((keys, values)):
        shares = hasher.by_head(x.flatten(0, 1))  # [head, place, n * L]
        for order in list(permutations(range(heads)))[1:]:
            h = torch.stack([shares[head, place] for head, place in enumerate(order)]).sum(0)
            found[..., side] |= hasher.parts(h).view(count, layers) == parts[..., side]
    return found
