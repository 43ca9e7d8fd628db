"""What the augmented read costs a decoding step, against the model that reads its cache as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from cachemedic.repair.attach import protect
from cachemedic.repair.operator import RepairOperator
from cachemedic.studies.bench.decode import LAYERS, POSITIONS, ROUNDS, decode, random_cache
from cachemedic.studies.bench.materialised import RepeatableLayer
from cachemedic.studies.bench.timing import interleave, row, timed
from cachemedic.token.layerwise.augmented import AugmentedRead, extra_width
from cachemedic.token.layerwise.operator import TokenAware

RANKS = (8, 16)


class RepeatableWideLayer(RepeatableLayer):
    """A repeatable layer of wide heads."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See `RepeatableLayer.update`; what the token [B, G, 1, d] lacks is zero."""
        wide = [F.pad(x, (0, self.keys.shape[-1] - x.shape[-1])) for x in (key_states, value_states)]
        return super().update(*wide, *args, **kwargs)


def random_repair(
    model: PreTrainedModel, layers: Sequence[int], rank: int, length: int, family: str = "layerwise-E"
) -> AugmentedRead:
    """The augmented read of one row of `length` tokens, of random numbers."""
    operator = RepairOperator.create(family, model.config, layers=layers, rank=rank)
    assert isinstance(operator, TokenAware)
    shape, numbers = operator.config.model, torch.Generator().manual_seed(0)

    def draw(*size: int) -> tuple[Tensor, Tensor]:
        return torch.randn(size, generator=numbers), torch.randn(size, generator=numbers)

    head = len(layers), shape.num_kv_heads
    limit = torch.full((*head, shape.head_dim), torch.inf)
    bases, tails = draw(*head, shape.head_dim, rank), draw(1, *head, length, extra_width(operator))
    for tail in tails:
        tail[..., rank:] = 0
    return AugmentedRead(operator, (limit, limit), bases, tails)


def wide_cache(read: AugmentedRead, k: Tensor, v: Tensor) -> Cache:
    """Keys and values k, v [1, L, G, T + 1, d], whose last position is free, laid out for the augmented read."""
    layers: list[Any] = read.cache(k, v).layers
    return Cache([RepeatableWideLayer(x.keys, x.values) for x in layers])


@torch.inference_mode()
def augmented_cost(
    model: PreTrainedModel,
    positions: Sequence[int] = POSITIONS,
    few: Sequence[int] = LAYERS,
    ranks: Sequence[int] = RANKS,
    rounds: int = ROUNDS,
) -> pd.DataFrame:
    """One row for each cache length, rank and number of layers (`few`, and all), over the plain decoding step.

    The wide cache stands ready, as in a server that lays its cache out so; `rank` is a column of its own.
    """
    rows: list[dict[str, object]] = []
    depth = model.config.num_hidden_layers
    for length in positions:
        k, v = random_cache(model, length + 1)
        plain = Cache([RepeatableLayer(k[:, layer], v[:, layer]) for layer in range(depth)])
        for rank in ranks:
            everywhere = random_repair(model, range(depth), rank, length)
            wide = wide_cache(everywhere, k, v)
            caches = {"step": plain, "all": wide}
            caches["few"] = Cache([(wide if i in few else plain).layers[i] for i in range(depth)])
            reads = {"few": random_repair(model, few, rank, length), "all": everywhere}

            def step(name: str, caches: dict = caches, reads: dict = reads) -> float:
                work = timed(lambda: decode(model, caches[name]))
                if name == "step":
                    return work()
                with protect(model, reads[name]):
                    return work()

            contenders = {name: lambda name=name: step(name) for name in caches}
            times = interleave(contenders, rounds, f"augmented reads of {length} tokens, rank {rank}")
            for name, read in reads.items():
                found = row("augmented read", length, len(read.layers), times, name, "step")
                rows.append(found | {"rank": rank, "stored_bits": read.bits_per_token()})
    return pd.DataFrame(rows)
