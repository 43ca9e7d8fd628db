"""What happened to a damaged token, as far as its numbers and the hashes of other tokens tell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations

import numpy as np
import torch
from torch import Tensor

from cachemedic.token.hashes import Hashes, TokenHash

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
COMPARED = 512  # keys or values of a layer that are looked at: a check takes about as long however much is damaged
PROBED = 16  # tokens that are tried in another layout before all of them are
KNOWN = 64  # sound tokens that are compared with

ByLayer = tuple[Sequence[Tensor], Sequence[Tensor]]


def kinds_of(
    hasher: TokenHash, sides: ByLayer, damaged: Tensor, parts: Tensor, sound: Tensor, written: Hashes
) -> Tensor:
    """The number in `KINDS` [n] of the n `damaged` tokens, bool [B, T], from the most to the least certain sign.

    sides: keys and values [B, G, T, d] of all layers as stored; parts [B, T, L, 2]: which of them are not what was
    written; sound [B, T]: tokens to compare with. A token is compared in some of the layers that are damaged, and in
    all of them where it is a matter of numbers that are not finite.
    """
    rows, slots = damaged.nonzero(as_tuple=True)
    changed = parts[rows, slots].flatten(1)
    places = _some_places(changed, min(changed.shape[1], max(2, COMPARED // len(rows))))
    numbers, largest = _numbers_at(sides, rows, slots, places, sound)
    found = torch.full((len(rows),), NUMBER["other numbers"], device=rows.device)
    found[_few_far(numbers, largest).flatten(1).any(1)] = NUMBER["flips"]
    found[_few_distinct(numbers).flatten(1).float().mean(1) > 0.5] = NUMBER["rounded"]
    for kind, tokens in _known_content(hasher, numbers, places, written.parts[rows, slots].flatten(1)):
        found[tokens] = NUMBER[kind]
    found[(numbers == 0).flatten(1).float().mean(1) > ZEROS] = NUMBER["zeros"]
    found[~_finite(sides, changed.any(0).tolist(), rows, slots)] = NUMBER["not finite"]
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
        step = max(1, tokens // PROBED)
        for probed in (slice(step - 1, None, step), slice(None)):  # some tokens first
            looked_at = other[:, :, probed]
            same = hasher.parts(hasher.sums([looked_at], [looked_at])[:, :, 0, side]) == parts[:, probed, layer, side]
            if not same.any():
                break
        found[:, probed] |= same
    return found


def _some_places(changed: Tensor, count: int) -> Tensor:
    """Of each token `count` of the places that are `changed`, bool [n, 2 L], spread evenly: [n, count], with repeats
    where there are fewer.
    """
    of_token = changed.sum(1, keepdim=True)
    index = torch.arange(count, device=changed.device) * of_token // count
    return changed.byte().argsort(dim=1, descending=True, stable=True).gather(1, index)


def _numbers_at(sides: ByLayer, rows: Tensor, slots: Tensor, places: Tensor, sound: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers [n, P, G, d] of tokens at `places` [n, P], which count keys and values of each layer in turn, and the
    largest magnitude [n, P, G, d] of each channel in some of the `sound` tokens, infinite if there are none.
    """
    heads, width = sides[0][0].shape[1], sides[0][0].shape[3]
    numbers = sides[0][0].new_empty(*places.shape, heads, width)
    largest = torch.full_like(numbers, torch.inf)
    known_rows, known_slots = sound.nonzero(as_tuple=True)
    step = max(1, len(known_rows) // KNOWN)
    known = known_rows[::step], known_slots[::step]
    for place in places.unique().tolist():
        stored = sides[place % 2][place // 2]
        token, at = (places == place).nonzero(as_tuple=True)
        numbers[token, at] = stored[rows[token], :, slots[token]]
        if len(known_rows):
            largest[token, at] = stored[known[0], :, known[1]].abs().amax(0)
    return numbers, largest


def _finite(sides: ByLayer, changed: list[bool], rows: Tensor, slots: Tensor) -> Tensor:
    """Which tokens [n] hold finite numbers only, in the places [2 L] that changed in any of them."""
    found = torch.ones_like(rows, dtype=torch.bool)
    for place in (place for place, hit in enumerate(changed) if hit):
        stored = sides[place % 2][place // 2]
        if not stored.sum(dtype=torch.float32).isfinite():  # a sum over numbers one of which is not finite is not
            found &= stored[rows, :, slots].abs().amax((1, 2)).isfinite()
    return found


def _few_far(numbers: Tensor, largest: Tensor) -> Tensor:
    """Heads [...] of numbers [..., d] of which a few, and a few only, are far outside."""
    far = (numbers.abs().float() > FAR * largest.float()).float().mean(-1)
    return (far > 0) & (far < FEW)


def _few_distinct(numbers: Tensor) -> Tensor:
    """Heads [...] of numbers [..., d] that hold at most a quarter as many different magnitudes as numbers."""
    magnitudes = numbers.abs().double().cpu().numpy()
    ordered = torch.from_numpy(np.sort(magnitudes)).to(numbers.device)  # torch takes several times as long
    distinct = 1 + (ordered[..., 1:] != ordered[..., :-1]).sum(-1)
    return 4 * distinct <= numbers.shape[-1]


def _known_content(hasher: TokenHash, numbers: Tensor, places: Tensor, written: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Kinds, and the tokens [n] that hold, at all `places` [n, P], something that was written, only elsewhere.

    written [n, 2 L]: the short hashes of the tokens.
    """
    shares = hasher.by_head(numbers.flatten(0, 1))  # [head, place of a head, n * P]
    heads = range(len(shares))

    def in_order(order: Sequence[int]) -> Tensor:
        h = torch.stack([shares[head, place] for head, place in enumerate(order)]).sum(0)
        return hasher.parts(h).view(places.shape)

    now, own = in_order(heads), written.gather(1, places)
    if len(heads) <= MOST_HEADS:
        permuted = [in_order(order) == own for order in list(permutations(heads))[1:]]
        yield "heads permuted", torch.stack([torch.zeros_like(now == own), *permuted]).any(0).all(1)
    yield "another layer", ((now[..., None] == written[:, None]).any(2) & (now != own)).all(1)
    yield "keys for values", (now == written.gather(1, places ^ 1)).all(1)
