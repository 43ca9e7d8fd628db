"""Training of operators that repair stored tokens: the cache is repaired before the students read it."""

from __future__ import annotations

import torch
from torch import Tensor

from cachemedic.core.divergence import cache_norm, error_ratio, relative_square
from cachemedic.models.load import Base
from cachemedic.repair.operator import RepairOperator
from cachemedic.training.bank import Bank
from cachemedic.training.draws import Draw
from cachemedic.training.valence.rollouts import Read

TINY_DAMAGE = 0.01  # of the size of what is stored: rho counts less damage as so much


def repair_read(base: Base, bank: Bank, operator: RepairOperator, draw: Draw, read: Read, lossy: bool = False) -> Read:
    """The caches [R, B, L', G, T, d] that the operators of R runs make of those that are found.

    lossy: they were stored in few bits on purpose (see `Kept`).
    """
    first, runs, rows = read.first, operator.runs, draw.rows.flatten()
    index = torch.arange(len(rows)).view_as(draw.rows)  # [S, B] -> [R*B]
    index = index.repeat_interleave(runs // len(index), 0).flatten()
    keys, values = (x[rows].to(read.keys) for x in (bank.keys, bank.values))

    def whole(side: Tensor, sound: Tensor) -> Tensor:
        found = sound[index]  # layers below the first hold no fault
        found[:, first:] = side.detach().repeat_interleave(runs // len(side), 0).flatten(0, 1)
        return found

    found = whole(read.keys, keys), whole(read.values, values)
    ids = bank.ids[rows, : bank.prefix]
    repaired = operator.repair_stored(base.model, (keys, values), found, ids, index, lossy)
    result = []
    for stored, new in zip((read.keys, read.values), repaired, strict=True):
        here = torch.nan_to_num(stored.repeat_interleave(runs // len(stored), 0))
        # straight through the repair: the steps of a quantiser below it get their gradient
        result.append(new[:, first:].unflatten(0, (runs, -1)) + (here - here.detach()))
    return Read(result[0], result[1], conditions=1, first=first)


def measure_repair(bank: Bank, layers: tuple[int, ...], draw: Draw, found: Read, repaired: Read) -> dict[str, Tensor]:
    """`identity`, `rho`, `rho_k`, `rho_v` and `found`, what was changed in the cache, of protected layers [R, B, P].

    rho counts damage below a hundredth of the size of what is stored as so much: else one sample of which hardly
    anything was hit would be all of the loss.
    """
    runs = len(repaired.keys)
    rows = draw.rows.repeat_interleave(runs // len(draw.rows), 0)
    mine = [layer - found.first for layer in layers]
    clean = [x[rows][:, :, list(layers)].to(repaired.keys) for x in (bank.keys, bank.values)]
    # detached: a quantiser would lower rho by doing more damage
    before = [x[:, :, mine].detach().repeat_interleave(runs // len(x), 0) for x in (found.keys, found.values)]
    after = [x[:, :, mine] for x in (repaired.keys, repaired.values)]
    size_k, size_v = (cache_norm(x) for x in clean)
    found_k, found_v = (cache_norm(torch.nan_to_num(x) - c) for x, c in zip(before, clean, strict=True))
    left_k, left_v = (cache_norm(x - c) for x, c in zip(after, clean, strict=True))
    damage = (found_k + found_v).clamp_min(TINY_DAMAGE * (size_k + size_v))
    return {
        "identity": relative_square((left_k, left_v), (size_k, size_v)),
        "rho": error_ratio(left_k + left_v, damage),
        "rho_k": error_ratio(left_k, found_k),
        "rho_v": error_ratio(left_v, found_v),
        "found": found_k + found_v,
    }
