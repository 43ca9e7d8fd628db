"""How far noise in the cache moves the logits: sensitivity against the size of the noise, and amplification by place.

A reader of the cache is a blind defence, a repair operator or a safeguard; z is what the model says through it. Logits
are compared over the clean model's top k at every scored token. Noise is Gaussian, of a stated Frobenius norm relative
to that of the clean state it falls on: keys and values together, of a layer (sensitivity) or a head (amplification).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from pandas.api.typing import DataFrameGroupBy
from transformers import PreTrainedModel

from cachemedic.core.seeds import generator
from cachemedic.data.task_data import TaskData
from cachemedic.defenses.safeguards import Safeguard
from cachemedic.evaluation.decoding import CleanBank, batches, decode_logits
from cachemedic.evaluation.evaluate import Reader, common_runs, read_logits

NOISE = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)  # norm of the noise over that of the clean layer
HEAD_NOISE = 0.1  # the same for a head
TOP = 1000  # logits that are compared, fewer in smaller vocabularies
EPS = 1e-8
PLACES = {"layer": (2, 3, 4), "head": (3, 4)}  # the axes of [B, L, G, T, d] that one norm runs over


@dataclass(frozen=True, eq=False)
class _Batch:
    """Some examples with their clean caches k, v [B, L, G, T, d]."""

    model: PreTrainedModel
    task: TaskData
    k: torch.Tensor
    v: torch.Tensor
    top: torch.Tensor  # ids of the top clean logits [B, M, k]
    reference: torch.Tensor  # these logits
    numbers: np.ndarray  # of the examples within their seeds
    kept: dict[Safeguard, Any] = field(default_factory=dict)  # of the clean cache

    @property
    def seeds(self) -> np.ndarray:
        return self.task.seeds.numpy()

    def read(self, k: torch.Tensor, v: torch.Tensor, reader: Reader) -> torch.Tensor:
        """The compared logits [B, M, k] of a reader of the cache k, v."""
        ids, valid = self.task.prefix_ids, self.task.prefix_mask
        if isinstance(reader, Safeguard):
            if reader not in self.kept:  # written once, before all noise
                self.kept[reader] = reader.write(self.k, self.v, ids, valid)
            read = reader.read(k, v, ids, valid, self.kept[reader])
            logits = decode_logits(self.model, read.k, read.v, self.task, read.keep)
        else:
            logits = read_logits(self.model, k, v, self.task, reader, truth=None)
        return logits.gather(-1, self.top)

    def distance(self, z: torch.Tensor, reference: torch.Tensor) -> np.ndarray:
        """The 2-norm over the compared logits, mean over the scored tokens of each example [B]."""
        scored = self.task.target_mask
        norms = torch.linalg.vector_norm((z - reference).float(), dim=-1) * scored
        return (norms.sum(1) / scored.sum(1)).numpy()

    def noise(self, what: str, draw: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noise for k and v of the norm of the clean state, and that norm, one for each `what` ("layer", "head").

        Example by example from the generator named ("stability", what, seed, number, draw), without its padding.
        """
        states = torch.zeros_like(self.k), torch.zeros_like(self.v)
        drawn = torch.zeros_like(self.k), torch.zeros_like(self.v)
        for i, (seed, number) in enumerate(zip(self.seeds, self.numbers, strict=True)):
            draws = generator("stability", what, int(seed), int(number), draw)
            length = int(self.task.prefix_mask[i].sum())
            for clean, state, result in zip((self.k, self.v), states, drawn, strict=True):
                state[i, ..., -length:, :] = clean[i, ..., -length:, :]
                numbers = torch.randn(result[i, ..., -length:, :].shape, generator=draws)
                result[i, ..., -length:, :] = numbers.to(result.dtype)
        size, found = (
            (k.float().square() + v.float().square()).sum(PLACES[what], keepdim=True).sqrt() for k, v in (states, drawn)
        )
        scale = (size / found).to(drawn[0].dtype)
        return drawn[0] * scale, drawn[1] * scale, size


def _batches(
    model: PreTrainedModel, task: TaskData, clean: CleanBank, readers: Mapping[str, Reader]
) -> Iterator[_Batch]:
    seeds = pd.Series(task.seeds.numpy())
    numbers = seeds.groupby(seeds).cumcount().to_numpy()
    for rows in batches(model, task, common_runs(readers)):
        top = clean.logits[rows].topk(min(TOP, clean.logits.shape[-1]), dim=-1)
        part, places = task.select(rows), np.arange(len(task))[rows]
        yield _Batch(model, part, clean.k[rows], clean.v[rows], top.indices, top.values, numbers[places])


@torch.inference_mode()
def sensitivity(
    model: PreTrainedModel,
    task: TaskData,
    clean: CleanBank,
    readers: Mapping[str, Reader],
    levels: Sequence[float] = NOISE,
    draws: int = 1,
) -> pd.DataFrame:
    """Sens(n) = E ||z(S + delta) - z(S)||_2 of every reader, level n of the noise and seed (the paper).

    S is the clean cache; delta is Gaussian with n times the norm of S in every layer, in one direction for all levels
    and readers. Level 0 is measured like the others.

    Columns: reader, noise (n), seed, sensitivity, distance (to the logits of the clean model: ||z(S + delta) - z0(S)||,
    so that a reader that always says the same is no winner), top (k), draws, n_examples. Means over examples and draws.
    Raises `ValueError` if the examples do not split into the runs of an operator.
    """
    frames = []
    for batch in _batches(model, task, clean, readers):
        at_rest = {name: batch.read(batch.k, batch.v, reader) for name, reader in readers.items()}
        for draw in range(draws):
            noise_k, noise_v, _ = batch.noise("layer", draw)
            for level in levels:
                k, v = batch.k + level * noise_k, batch.v + level * noise_v
                for name, reader in readers.items():
                    z = batch.read(k, v, reader)
                    frames.append(pd.DataFrame({
                        "reader": name, "noise": level, "seed": batch.seeds, "top": z.shape[-1],
                        "sensitivity": batch.distance(z, at_rest[name]),
                        "distance": batch.distance(z, batch.reference),
                    }))  # fmt: skip
    groups = pd.concat(frames).groupby(["reader", "noise", "seed"], sort=False)
    return _counted(groups[["sensitivity", "distance"]].mean(), groups, draws)


@torch.inference_mode()
def amplification(
    model: PreTrainedModel,
    task: TaskData,
    clean: CleanBank,
    readers: Mapping[str, Reader],
    level: float = HEAD_NOISE,
    draws: int = 1,
) -> pd.DataFrame:
    """gamma(l, h) = median ||z(S + delta_lh) - z(S)||_2 / (||delta_lh||_F + 1e-8), noise on one head at a time.

    delta_lh has `level` times the norm of that head's clean keys and values (h: key/value heads), the same for all
    readers; the median is over the examples and draws of a seed.

    Columns: reader, layer, head, seed, gamma, noise (the level), top (k), draws, n_examples. Raises `ValueError` if the
    examples do not split into the runs of an operator.
    """
    frames = []
    for batch in _batches(model, task, clean, readers):
        at_rest = {name: batch.read(batch.k, batch.v, reader) for name, reader in readers.items()}
        for draw in range(draws):
            noise_k, noise_v, size = batch.noise("head", draw)
            k, v = batch.k.clone(), batch.v.clone()
            for layer, head in np.ndindex(*batch.k.shape[1:3]):
                k[:, layer, head] += level * noise_k[:, layer, head]
                v[:, layer, head] += level * noise_v[:, layer, head]
                norm = level * size[:, layer, head, 0, 0].numpy()
                for name, reader in readers.items():
                    z = batch.read(k, v, reader)
                    gamma = batch.distance(z, at_rest[name]) / (norm + EPS)
                    place = {"reader": name, "layer": layer, "head": head, "seed": batch.seeds}
                    frames.append(pd.DataFrame(place | {"top": z.shape[-1], "gamma": gamma}))
                k[:, layer, head], v[:, layer, head] = batch.k[:, layer, head], batch.v[:, layer, head]
    groups = pd.concat(frames).groupby(["reader", "layer", "head", "seed"], sort=False)
    return _counted(groups[["gamma"]].median(), groups, draws).assign(noise=level)


def _counted(values: pd.DataFrame, groups: DataFrameGroupBy, draws: int) -> pd.DataFrame:
    """With the settings, in the columns top, draws and n_examples."""
    return values.assign(top=groups["top"].first(), draws=draws, n_examples=groups.size() // draws).reset_index()
