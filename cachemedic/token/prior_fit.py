"""The prior of a joint model: what the ids of a few tokens tell of the vector of the last, by a linear map of low rank.

Vectors lie where they are, in one large matrix: rows and columns of it are read a few at a time, and several of these
parts side by side (`workers`). What is a part is fixed, as sums depend on it in their last digits.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future

import torch
from torch import Tensor

from cachemedic.core.threads import give_back

BLOCK = 4096  # rows of one product
PART, COLUMNS = 1024, 2048  # rows and columns that a task takes of it
RIDGE = 0.001  # of the prior, over the mean power of what it is linear in
FOLDS = 4  # of the windows: what ids leave of one is what a prior of the others leaves
PRIOR_RANK = 256  # of what the ids tell: each costs a restored token as much as a coordinate

Map = tuple[Tensor, Tensor]
Regressors = Callable[[Tensor], Tensor]  # [N, n] of rows [N]


def reduced_rank(pool: Executor, regressors: Regressors, z: Tensor, rows: Tensor) -> Future[Map]:
    """The map of low rank from regressors to z [N, D] of least squared error (Izenman 1975) on some rows.

    All that it needs of z has been read when this returns.
    """

    def gram() -> Tensor:
        chosen = regressors(rows)
        return chosen.T @ chosen

    def add(columns: Tensor, total: Tensor) -> None:
        for block in rows.split(BLOCK):
            total += regressors(block).T @ columns[block].float()

    squares = pool.submit(gram)
    products = torch.zeros(regressors(rows[:1]).shape[1], z.shape[1])
    list(pool.map(add, z.split(COLUMNS, 1), products.split(COLUMNS, 1)))
    give_back()
    return pool.submit(_solved, squares.result(), products)


def _solved(gram: Tensor, products: Tensor) -> Map:
    gram = gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    full = torch.linalg.solve(gram, products, out=products)
    root = torch.linalg.cholesky(gram.double()).T  # |root full| is |regressors full|, but for the ridge
    axes = torch.linalg.svd(root.float() @ full, full_matrices=False).Vh[:PRIOR_RANK].clone()
    return full @ axes.T, axes


def take_prior(pool: Executor, z: Tensor, rows: Tensor, features: Tensor, prior_out: Tensor) -> None:
    """Leaves of some rows of z [N, D], in place, what their features [n, r] do not tell."""
    prior_out = prior_out.float()

    def take(part: Tensor, told: Tensor) -> None:
        z[part] = z[part].float().sub_(told @ prior_out).to(z.dtype)

    list(pool.map(take, rows.split(PART), features.split(PART)))


def take_prior_of_others(pool: Executor, z: Tensor, regressors: Regressors, rows: Tensor, length: int) -> None:
    """The same of windows of `length` rows, each by a prior that has not seen it.

    A prior tells too much of its own rows, above all of rare tokens, for which no axes would then be left.
    """
    fold = torch.arange(len(rows)) // length % FOLDS
    if len(fold.unique()) < 2:
        fold = torch.arange(len(rows)) % 2  # of a single window every other token
    numbers = fold.unique()
    priors = [reduced_rank(pool, regressors, z, rows[fold != number]) for number in numbers]
    for number, prior in zip(numbers, priors, strict=True):
        prior_in, prior_out = prior.result()
        own = rows[fold == number]
        take_prior(pool, z, own, regressors(own) @ prior_in, prior_out)
