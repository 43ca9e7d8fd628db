"""Language modelling on a cache of few bits: what is stored, how it is read back, and how far the model then is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from cachemedic.core.keys_values import KeysValues
from cachemedic.core.quantise import SCALE_BITS, UniformLevels, quantise_cache
from cachemedic.data.task_data import TaskData, score
from cachemedic.defenses.defense import cache_bytes_per_token
from cachemedic.defenses.heuristics import NoDefense
from cachemedic.evaluation.decoding import CleanBank, batches, decode_through, tokens_of
from cachemedic.evaluation.evaluate import divergence
from cachemedic.models.load import Base
from cachemedic.models.shape import ModelShape
from cachemedic.token.token_repair import TokenRepair
from cachemedic.training.valence.head import Valence
from cachemedic.training.valence.quantiser import KVQuantiser
from cachemedic.training.valence.rollouts import observing

FULL_BITS = 16  # of a number of the usual cache


@dataclass(frozen=True)
class Storage:
    """One way to store a cache.

    method: its name; bits: of a number; group: numbers that share a range (0: neither applies); stored: bits of a
    token, all layers, without what the repair keeps; read: keys and values [N, L, G, T, d] as they come back, R runs
    reading N / R rows each, run-major; repair: what reads them then.
    """

    method: str
    bits: int
    group: int
    stored: float
    read: Callable[[Tensor, Tensor], KeysValues]
    repair: TokenRepair | None = None

    def bytes_per_token(self, length: int) -> float:
        """In a cache of `length` tokens, over which what E keeps of the first positions is spread.

        Hashes do not count: here is no damage to find.
        """
        kept = 0.0
        if self.repair is not None:
            kept = self.repair.operator.bytes_per_token + self.repair.cache_bytes / length
        return self.stored / 8 + kept


def quantised(method: str, quantiser: KVQuantiser, repair: TokenRepair | None = None) -> Storage:
    """A cache in the layout of KIVI, by a quantiser of R runs."""

    def read(keys: Tensor, values: Tensor) -> KeysValues:
        by_run = (x.unflatten(0, (quantiser.runs, -1)) for x in (keys, values))
        k, v = quantiser(*by_run)
        return k.flatten(0, 1), v.flatten(0, 1)

    return Storage(method, quantiser.config.bits, quantiser.config.group, quantiser.bits_per_token(), read, repair)


def fixed_ranges(method: str, bits: int, keys: Tensor) -> Storage:
    """Rounding with one range for each channel of keys, that of the clean `keys` [N, L, G, T, d]; values as in KIVI.

    The ranges are constants of the model.
    """
    by_channel = keys.movedim(-2, 1).flatten(0, 1)  # [N*T, L, G, d]
    low, high = (x[:, :, None] for x in by_channel.aminmax(dim=0))
    largest, group = 2**bits - 1, 32
    levels = UniformLevels.spanning(low, high, largest)
    numbers = low.numel()

    def read(k: Tensor, v: Tensor) -> KeysValues:
        valid = torch.ones(k.shape[-2], dtype=torch.bool, device=k.device)
        return levels.read(levels.codes(k, 0, largest)), quantise_cache(k, v, valid, bits, group)[1]

    return Storage(method, bits, group, 2 * numbers * bits + 2 * SCALE_BITS * numbers / group, read)


def code_alone(method: str, repair: TokenRepair) -> Storage:
    """No cache but the code of E and the first positions: a repair that goes the way "restore", and reads nothing."""
    return Storage(method, 0, 0, 0.0, lambda keys, values: (torch.zeros_like(keys), torch.zeros_like(values)), repair)


def full(base: Base) -> Storage:
    """The usual cache."""
    stored = 8 * cache_bytes_per_token(ModelShape.of(base.model.config))
    return Storage("16 bits", FULL_BITS, 0, stored, lambda keys, values: (keys, values))


@torch.inference_mode()
def quantised_scores(
    base: Base, task: TaskData, clean: CleanBank, storages: Mapping[str, Storage], valence: Valence
) -> pd.DataFrame:
    """How far the model is from itself on caches that are stored each way, by name: one row per storage and seed.

    Columns storage, method, bits, group, bytes_per_token, seed, nll, nll_clean, kl (to the clean model, nats a token),
    valence_gap (mean |v_S - v_T| over the decoded tokens, v the head's first dimension on the last hidden states),
    n_examples.
    """
    _, teacher = _decoded(base, task, clean, full(base))
    expected = _valence(base, valence, teacher)
    seeds, frames = pd.Series(task.seeds.numpy(), name="seed"), []
    for name, storage in storages.items():
        logits, hidden = _decoded(base, task, clean, storage)
        scores = {
            "nll": score(task, logits)["nll"],
            "nll_clean": score(task, clean.logits)["nll"],
            "kl": divergence(task, clean.logits, logits),
            "valence_gap": (_valence(base, valence, hidden) - expected).abs().mean(1).numpy(),
        }
        by_seed = pd.DataFrame(scores, dtype=float).groupby(seeds)
        rows = by_seed.mean().reset_index().assign(n_examples=by_seed.size().to_numpy())
        stored = storage.bytes_per_token(clean.k.shape[-2])
        columns = {"storage": name, "method": storage.method, "bits": storage.bits, "group": storage.group}
        for place, (column, value) in enumerate((columns | {"bytes_per_token": stored}).items()):
            rows.insert(place, column, value)
        frames.append(rows)
    return pd.concat(frames, ignore_index=True)


def _valence(base: Base, valence: Valence, hidden: Tensor) -> Tensor:
    """The scalar valence [N, M] of last hidden states [N, M, width], on the CPU."""
    return valence(hidden.to(base.model.device))[..., 0].cpu()


def _decoded(base: Base, task: TaskData, clean: CleanBank, storage: Storage) -> tuple[Tensor, Tensor]:
    """Logits [N, M, V] and last hidden states [N, M, width] of the continuations behind the cache as it is read."""
    keys, values = storage.read(clean.k, clean.v)
    defense = NoDefense() if storage.repair is None else storage.repair
    logits, hidden = torch.empty_like(clean.logits), torch.empty(0)
    for rows in batches(base.model, task, defense.runs):
        part = task.select(rows)
        with observing(base.model) as observation:
            decoded = decode_through(
                base.model, part, defense, clean.tokens(task, rows), tokens_of(part, keys[rows], values[rows])
            )
        last = observation.hidden[-1].float().cpu()
        hidden = hidden if len(hidden) else torch.empty(len(task), *last.shape[1:])
        logits[rows], hidden[rows] = decoded, last
    return logits, hidden
