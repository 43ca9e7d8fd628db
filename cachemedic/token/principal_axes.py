"""The principal axes of vectors of tokens.

By a randomised subspace iteration (Halko, Martinsson and Tropp 2011) with a seeded start, on parts of the vectors side
by side, as in `prior_fit`.
"""

from __future__ import annotations

from concurrent.futures import Executor
from functools import partial

import torch
from torch import Tensor

from cachemedic.core.progress import tqdm
from cachemedic.core.threads import add_up, give_back
from cachemedic.token.prior_fit import BLOCK, COLUMNS, PART

OVERSAMPLED, ITERATIONS = 48, 2


def principal_axes(pool: Executor, z: Tensor, rows: Tensor, count: int, seed: int) -> Tensor:
    """The first principal axes [count, D] of some rows of z [N, D], bf16, orthonormal up to rounding.

    Products run in float32: processors without instructions for bf16 take sixty times as long for them.
    """
    generator = torch.Generator().manual_seed(seed)
    width = min(count + OVERSAMPLED, len(rows), z.shape[1])
    basis = torch.randn(z.shape[1], width, generator=generator)
    for _ in tqdm(range(ITERATIONS), desc="principal axes"):
        basis = torch.linalg.qr(_spread(pool, z, rows, basis)).Q
        give_back()

    def gram(block: Tensor) -> Tensor:
        found = torch.cat([z[part].float() @ basis for part in block.split(PART)])
        return found.T @ found

    turn = torch.linalg.eigh(add_up(pool.map(gram, rows.split(BLOCK)))).eigenvectors.flip(1)[:, :count]
    give_back()
    axes = (basis @ turn).T
    sign = axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()  # an axis has no direction of its own
    return axes.mul_(sign).bfloat16().contiguous()


def _spread(pool: Executor, z: Tensor, rows: Tensor, basis: Tensor) -> Tensor:
    """A basis [D, width] times the sum of outer products [D, D] of the rows."""

    def along(part: Tensor) -> Tensor:
        return z[part].float() @ basis

    def add(block: Tensor, found: Tensor, columns: Tensor, total: Tensor) -> None:
        total += columns[block].float().T @ found

    wide = torch.zeros_like(basis)
    for block in rows.split(BLOCK):
        found = torch.cat([*pool.map(along, block.split(PART))])
        list(pool.map(partial(add, block, found), z.split(COLUMNS, 1), wide.split(COLUMNS)))
    return wide
