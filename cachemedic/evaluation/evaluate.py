"""Every defense of a corrupted cache, scored on the same examples and the same corruption draws.

A condition costs one decode of the continuations per defense, no prefill.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from cachemedic.corruption.apply import corrupt
from cachemedic.corruption.spec import CorruptionEvent, CorruptionSpec, draw_event
from cachemedic.corruption.types import ROTATION_SEED_TEST
from cachemedic.data.task_data import TaskData, score
from cachemedic.defenses.defense import Defense
from cachemedic.evaluation.decoding import CleanBank, batches, common_runs, decode_through, tokens_of


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel,
    task: TaskData,
    clean: CleanBank,
    spec: CorruptionSpec,
    defenses: Mapping[str, Defense],
    draw: int = 0,
) -> pd.DataFrame:
    """Scores every defense on the same corrupted caches: one row per defense and example.

    Each example draws its event and its noise from (its seed, its number, `draw`) alone: defenses are paired,
    and so are conditions and severities. What overwrites an example is the cache of the next example of its seed.
    An operator of R > 1 runs repairs with run i the i-th block of N / R examples (one block per seed).

    Columns: reader (the name of the defense), seed, example, depth, nll, nll_clean, kl (of the clean model's next-token
    distribution from this one, mean over the scored tokens), correct, n_tokens, and the event: type, severity,
    parameter, share, n_layers, n_heads, n_positions. Raises `ValueError` if the examples do not split into the runs of
    an operator.
    """
    seeds = pd.Series(task.seeds.numpy())
    examples = seeds.groupby(seeds).cumcount().to_numpy()
    frames: dict[str, list[pd.DataFrame]] = {name: [] for name in defenses}
    for rows in batches(model, task, common_runs(defenses.values())):
        part, clean_logits = task.select(rows), clean.logits[rows]
        index = np.arange(len(task))[rows]
        k, v, events = corrupt_examples(clean, task, spec, index, draw)
        written, damaged = clean.tokens(task, rows), tokens_of(part, k, v)
        common = {
            "seed": seeds[index].to_numpy(),
            "example": examples[index],
            "depth": part.depth.numpy(),
            "nll_clean": score(part, clean_logits)["nll"],
        }
        common |= pd.DataFrame([event.as_record() | {"severity": event.severity} for event in events]).to_dict("list")
        for name, defense in defenses.items():
            logits = decode_through(model, part, defense, written, damaged)
            scores = score(part, logits) | {"kl": divergence(part, clean_logits, logits)}
            frames[name].append(pd.DataFrame({"reader": name, **common, **scores}, index=index))
    return pd.concat([pd.concat(parts).sort_index() for parts in frames.values()], ignore_index=True)


def corrupt_examples(
    clean: CleanBank, task: TaskData, spec: CorruptionSpec, rows: np.ndarray, draw: int = 0
) -> tuple[torch.Tensor, torch.Tensor, list[CorruptionEvent]]:
    """The corrupted caches k, v [B, L, G, T, d] of the examples `rows`, and their events, drawn as `evaluate` says.

    Example by example, without its padding: its draws then depend neither on the batch nor on the lengths of others.
    """
    seeds = pd.Series(task.seeds.numpy())
    examples = seeds.groupby(seeds).cumcount().to_numpy()
    donors = seeds.groupby(seeds).transform(lambda same: np.roll(same.index, -1)).to_numpy()
    k, v, events = clean.k[rows], clean.v[rows], []
    lengths = task.prefix_mask.sum(1).tolist()
    for i, row in enumerate(rows):
        donor, generator = donors[row], _generator(seeds[row], examples[row], draw)
        own_k, own_v = (x[i : i + 1, ..., -lengths[row] :, :] for x in (k, v))
        donor_k = donor_v = None
        if spec.needs_donor and donor != row:
            donor_k = _donate(own_k, clean.k[donor, ..., -lengths[donor] :, :])
            donor_v = _donate(own_v, clean.v[donor, ..., -lengths[donor] :, :])
        event = draw_event(spec, (*own_k.shape[1:3], lengths[row]), generator)
        corrupted = corrupt(own_k, own_v, [event], generator, donor_k, donor_v, ROTATION_SEED_TEST)
        own_k.copy_(corrupted[0])
        own_v.copy_(corrupted[1])
        events.append(event)
    return k, v, events


def _donate(x: torch.Tensor, donor: torch.Tensor) -> torch.Tensor:
    """The `donor` [L, G, T', d] at the positions of `x` [1, L, G, T, d]; what lies past its end is left to x."""
    given, length = x.clone(), min(x.shape[3], donor.shape[2])
    given[0, ..., :length, :] = donor[..., :length, :]
    return given


def _generator(*key: int) -> torch.Generator:
    state = np.random.SeedSequence([int(i) for i in key]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def divergence(task: TaskData, clean_logits: torch.Tensor, logits: torch.Tensor) -> np.ndarray:
    """KL(clean || this) in nats, mean over the scored tokens of each example [N]."""
    scored = task.target_mask
    log_p, log_q = (x[scored].float().log_softmax(-1) for x in (clean_logits, logits))
    total = torch.zeros(scored.shape)
    terms = log_p.exp() * (log_p - log_q)
    terms[log_p == -torch.inf] = 0.0  # a token that is ruled out adds nothing
    total[scored] = terms.sum(-1)
    return (total.sum(1) / scored.sum(1)).numpy()
