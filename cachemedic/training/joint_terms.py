"""Training of families D and E under the joint model: the cache is repaired before the students read it."""

from __future__ import annotations

import torch
from torch import Tensor

from cachemedic.core.divergence import EPS
from cachemedic.models.load import Base
from cachemedic.token.joint_operator import JointOperator
from cachemedic.token.vectors import TokenVectors
from cachemedic.training.bank import Bank
from cachemedic.training.draws import Draw
from cachemedic.training.valence.rollouts import Read

TINY_DAMAGE = 0.01  # of the size of what is stored: rho counts less damage as so much


def repair_read(base: Base, bank: Bank, operator: JointOperator, draw: Draw, read: Read, lossy: bool = False) -> Read:
    """The caches [R, B, L', G, T, d] that the operators of R runs make of those that are found.

    lossy: they were stored in few bits on purpose (see `Kept`).
    """
    model, first, runs = base.model, read.first, operator.runs
    seeds, samples = draw.rows.shape
    rows = draw.rows.flatten()
    positions = torch.arange(bank.prefix, device=read.keys.device).expand(len(rows), -1)
    vectors = TokenVectors(model, operator.layers)
    with torch.no_grad():  # what the ids tell, and what was kept, are those of the clean cache
        prior = operator.prior(model, bank.ids[rows, : bank.prefix], positions)
        clean = [x[rows].to(read.keys) for x in (bank.keys, bank.values)]
        kept = operator.write_tokens(model, clean[0], clean[1], bank.ids[rows, : bank.prefix], positions, lossy)

    def by_run(x: Tensor) -> Tensor:  # [S*B, ...] -> [R*B, ...]
        x = x.unflatten(0, (seeds, samples)).repeat_interleave(runs // seeds, 0)
        return x.flatten(0, 1)

    index = by_run(torch.arange(len(rows)))

    def found(side: Tensor, sound: Tensor) -> Tensor:
        whole = sound[index].clone()  # layers below the first hold no fault
        whole[:, first:] = side.detach().repeat_interleave(runs // len(side), 0).flatten(0, 1)
        return whole

    repaired = operator.repair_with_prior(
        vectors,
        found(read.keys, clean[0]),
        found(read.values, clean[1]),
        None if prior is None else prior.rows(index),
        positions[index],
        None if kept is None else kept.rows(index),
    )
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

    def norms(xs: list[Tensor]) -> list[Tensor]:  # vector_norm has a zero gradient at zero
        return [torch.linalg.vector_norm(x.flatten(3), dim=3) for x in xs]

    size = norms(clean)
    error = norms([torch.nan_to_num(b) - c for b, c in zip(before, clean, strict=True)])
    left = norms([a - c for a, c in zip(after, clean, strict=True)])
    identity = (left[0].square() + left[1].square()) / (size[0].square() + size[1].square() + EPS)
    damage = (error[0] + error[1]).clamp_min(TINY_DAMAGE * (size[0] + size[1]))
    ratios = {"rho": (left[0] + left[1]) / (damage + EPS)}
    ratios |= {f"rho_{side}": rest / (e + EPS) for side, rest, e in zip("kv", left, error, strict=True)}
    return {"identity": identity, "found": error[0] + error[1], **ratios}
