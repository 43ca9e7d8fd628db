"""Training of families D and E: the cache is repaired before the students read it."""

from __future__ import annotations

import torch
from torch import Tensor

from cachemedic.core.divergence import EPS
from cachemedic.models.load import Base
from cachemedic.token.layerwise.observation import observe
from cachemedic.token.layerwise.operator import TokenAware
from cachemedic.token.layerwise.token_vectors import KeyRotation, join, split
from cachemedic.training.bank import Bank
from cachemedic.training.draws import Draw
from cachemedic.training.valence.rollouts import Read


def repair_read(base: Base, bank: Bank, operator: TokenAware, draw: Draw, read: Read) -> Read:
    """The caches that the operators of R runs make of those that are found: [R, B, L', G, T, d], and their bias."""
    assert operator.transform is not None  # `Trainer` calibrates it
    repeats = operator.runs // len(read.keys)
    rows = draw.rows.repeat_interleave(operator.runs // len(draw.rows), 0).flatten()
    keys, values = (x.repeat_interleave(repeats, 0).flatten(0, 1) for x in (read.keys, read.values))
    mine = [layer - read.first for layer in operator.layers]
    positions = torch.arange(bank.prefix, device=keys.device).expand(len(keys), -1)
    rotation = KeyRotation(base.model).at(positions)
    transform = operator.transform
    with torch.no_grad():
        seen = observe(transform, keys[:, mine], values[:, mine], positions, rotation)
        # what the token ids tell, and what was stored, are those of the clean cache
        sound = join(*(x[rows][:, list(operator.layers)].to(keys) for x in (bank.keys, bank.values)))
        z = transform.standardise(rotation.undo(sound))
        known = z[:, : operator.known_layers]
        code, sketch = operator.code, None
        if code is not None:
            sketch = code.understand(code.write(z, seen.is_first, known), seen.is_first, known)
    repair = operator.repair(seen, known, sketch)
    result = []
    for stored, new in zip((keys, values), split(seen.stored + repair.correction, keys.shape[2]), strict=True):
        mended, here = stored.clone(), torch.nan_to_num(stored[:, mine])
        # straight through the repair: the steps of a quantiser below it get their gradient
        mended[:, mine] = new.to(stored.dtype) + (here - here.detach())
        result.append(mended.unflatten(0, (operator.runs, -1)))
    bias = None
    if operator.config.options["bias"]:
        bias = keys.new_zeros(keys.shape[:-1])
        bias[:, mine] = repair.bias.transpose(2, 3).to(bias.dtype)
        bias = bias.unflatten(0, (operator.runs, -1))
    return Read(result[0], result[1], conditions=1, first=read.first, bias=bias)


def measure_repair(bank: Bank, layers: tuple[int, ...], draw: Draw, found: Read, repaired: Read) -> dict[str, Tensor]:
    """`identity`, `rho`, `rho_k`, `rho_v` and `found`, what was changed in the cache, of protected layers [R, B, P]."""
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
    ratios = {"rho": (left[0] + left[1]) / (error[0] + error[1] + EPS)}
    ratios |= {f"rho_{side}": rest / (e + EPS) for side, rest, e in zip("kv", left, error, strict=True)}
    return {"identity": identity, "found": error[0] + error[1], **ratios}
