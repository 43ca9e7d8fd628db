"""What a training step draws: samples of the bank, faults, and the corrupted caches that come of them.

Generators are derived from (seed, step): seeds share no draw, a resumed run continues to the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from cachemedic.core.seeds import generator
from cachemedic.corruption.apply import corrupt
from cachemedic.corruption.spec import CorruptionEvent
from cachemedic.training.bank import Bank
from cachemedic.training.config import TrainConfig


@dataclass
class Draw:
    """The data of one step: S seeds x B samples, L' layers from the first corrupted or protected one on."""

    rows: torch.Tensor  # [S, B] indices into the bank
    keys: torch.Tensor  # corrupted [S, B, L', G, T, d]
    values: torch.Tensor
    events: list[list[CorruptionEvent]]
    step: int = 0


def draw_step(config: TrainConfig, bank: Bank, first: int, step: int) -> Draw:
    """Samples, events and corrupted caches (layers `first` and up) of one step, on the CPU.

    Every seed draws by its own generator from its own slice of the bank.
    """
    share = len(bank) // len(config.seeds)
    rows = []
    events: list[list[CorruptionEvent]] = []
    # a layer at a time in memory, as student and Gram matrices read them: without that they copy each layer first
    shape = len(config.seeds), config.batch
    keys, values = (
        x.new_empty(x.shape[1] - first, *shape, *x.shape[2:]).permute(1, 2, 0, 3, 4, 5)
        for x in (bank.keys, bank.values)
    )
    layers, heads, length = bank.keys.shape[1:4]
    hit = torch.zeros(layers, dtype=torch.bool)
    hit[list(config.layers) if config.corrupted_layers == "protected" else slice(None)] = True
    for position, seed in enumerate(config.seeds):
        draws = generator("train", seed, step)
        picked = torch.randint(share, (config.batch,), generator=draws)
        donors = picked + torch.randint(1, max(share, 2), (config.batch,), generator=draws)
        # donors: another text of the same seed
        picked, donors = position * share + picked, position * share + donors % share
        drawn = config.mixture.draw(draws, config.batch, (layers, heads, length))
        drawn = [replace(e, layers=(e.layers & hit)[first:], heads=e.heads[first:]) for e in drawn]
        for sample, (row, donor, event) in enumerate(zip(picked.tolist(), donors.tolist(), drawn, strict=True)):
            # one by one, from views of the bank: nothing but the result is copied
            stored = [x[i : i + 1, first:] for i in (row, donor) for x in (bank.keys, bank.values)]
            k, v = corrupt(stored[0], stored[1], [event], draws, stored[2], stored[3])
            keys[position, sample], values[position, sample] = k[0], v[0]
        rows.append(picked)
        events.append(drawn)
    return Draw(torch.stack(rows), keys, values, events, step)
