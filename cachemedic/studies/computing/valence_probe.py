"""A valence head for a base that none comes with: trained on labelled sentences, chosen and tested on others.

The targets follow those of the heads that ship (`cachemedic.training.valence.head`): the end of a sentence of a review
has its label as valence and full strength, that of a piece of other text a valence in the middle and no strength.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from cachemedic.core.files import write_atomically
from cachemedic.core.progress import tqdm
from cachemedic.core.seeds import generator
from cachemedic.core.tensors import read_tensors, tensor_bytes
from cachemedic.data.text_source import Review, TextSource
from cachemedic.models.load import Base
from cachemedic.studies.base_report import proportion
from cachemedic.training.valence.head import DECAY, LR, ValenceHead, last_hidden

BATCH = 32  # sentences
STEPS, EVERY = 200, 5  # updates, and after how many the head is validated
SPLITS = ("train", "validation", "test")
CHARACTERS = (60, 200)  # of a piece of other text

Examples = tuple[torch.Tensor, torch.Tensor]  # states [N, width] and targets [N, 2]


def drawn(reviews: Sequence[Review], counts: Sequence[int], seed: int = 0) -> list[list[Review]]:
    """Parts of so many reviews, no text in two of them. Raises `ValueError` if there are too few."""
    distinct = list(dict(reviews).items())
    if len(distinct) < sum(counts):
        raise ValueError(f"{sum(counts)} different reviews are needed; {len(distinct)} are given")
    order = torch.randperm(len(distinct), generator=generator("valence probe", seed)).tolist()
    bounds = np.cumsum([0, *counts])
    return [[distinct[i] for i in order[start:stop]] for start, stop in zip(bounds, bounds[1:], strict=False)]


def pieces(documents: Sequence[str], count: int, seed: int = 0) -> list[str]:
    """The beginnings of `count` documents, of several lengths."""
    rng = np.random.default_rng([seed, *b"valence probe"])
    return [documents[i].strip()[: int(rng.integers(*CHARACTERS))] for i in rng.choice(len(documents), count)]


def end_states(base: Base, texts: Sequence[str]) -> torch.Tensor:
    """The last hidden states [N, width] at the ends of texts, each behind the token that begins a text."""
    start = base.tokenizer.eos_token_id if base.tokenizer.bos_token_id is None else base.tokenizer.bos_token_id
    ids = [[start, *base.tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"]] for t in texts]
    states = torch.empty(len(ids), base.config.hidden_size)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # alike lengths together: little padding
    for at in tqdm(range(0, len(order), BATCH), desc=f"hidden states of {base.name}"):
        rows = order[at : at + BATCH]
        lengths = torch.tensor([len(ids[i]) for i in rows])
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids[i]) for i in rows], batch_first=True)
        states[rows] = last_hidden(base, padded)[torch.arange(len(rows)), lengths - 1]
    return states


def examples(base: Base, reviews: Sequence[Review], other: Sequence[str], path: Path) -> Examples:
    """States and targets of the ends of reviews and of other text; `path`: where the states are kept."""
    if not path.exists():
        states = end_states(base, [*(text for text, _ in reviews), *other])
        write_atomically(path, tensor_bytes({"states": states}, {}))
    targets = [(float(label), 1.0) for _, label in reviews] + [(0.5, 0.0)] * len(other)
    return read_tensors(path)[0]["states"], torch.tensor(targets)


def fit(train: Examples, validation: Examples, seed: int = 0) -> tuple[ValenceHead, int]:
    """The head of the least validation loss along its training, frozen, and after how many updates that was."""
    states, targets = train
    head = ValenceHead(states.shape[-1], torch.Generator().manual_seed(seed))
    head.mean.copy_(states.mean(0))
    head.std.copy_(states.std(0).clamp_min(1e-6))
    optimizer = torch.optim.AdamW([p for p in head.parameters() if p.requires_grad], lr=LR, weight_decay=DECAY)
    best, at, kept = float("inf"), 0, head.state_dict()
    for step in range(1, STEPS + 1):
        loss = F.binary_cross_entropy_with_logits(head.logits(states), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % EVERY == 0:
            with torch.no_grad():
                unseen = float(F.binary_cross_entropy_with_logits(head.logits(validation[0]), validation[1]))
            if unseen < best:
                best, at, kept = unseen, step, {name: x.clone() for name, x in head.state_dict().items()}
    head.load_state_dict(kept)
    return head.requires_grad_(False), at


def accuracy(head: ValenceHead, found: Examples) -> dict[str, float]:
    """n_correct and n_examples of the reviews among some examples, and the share with Wilson's 95% interval."""
    states, targets = found
    reviews = targets[:, 1] == 1
    right = (head(states)[reviews, 0] > 0.5) == (targets[reviews, 0] > 0.5)
    share = proportion(int(right.sum()), len(right))
    return {"n_correct": int(right.sum()), "n_examples": len(right), **share.columns("accuracy")}


def probe(
    base: Base, source: TextSource, counts: tuple[int, int, int], folder: Path, seed: int = 0
) -> tuple[ValenceHead, pd.DataFrame]:
    """A head for `base`, and its accuracy: a row for each of the splits train, validation and test.

    counts: reviews to train and to validate on, from the training split of the source, with a quarter as many pieces
    of other text beside; and to test on, of its test split. Only the validation split chooses. folder: where states are
    kept until the run ends. Raises `ValueError` for a source without reviews, or with too few.
    """
    training, unseen = source.reviews_of("train"), source.reviews_of("test")
    if training is None or unseen is None:
        raise ValueError("a valence probe is trained on labelled reviews: name a source of them, such as sst2")
    parts = [*drawn(training, counts[:2], seed), *drawn(unseen, counts[2:], seed)]
    sizes = [count // 4 for count in counts[:2]]
    other = pieces(source.documents_of("train"), sum(sizes), seed)
    beside: tuple[list[str], ...] = (other[: sizes[0]], other[sizes[0] :], [])
    found = {
        split: examples(base, reviews, more, folder / f"{split}.safetensors")
        for split, reviews, more in zip(SPLITS, parts, beside, strict=True)
    }
    head, steps = fit(found["train"], found["validation"], seed)
    rows = [{"split": split, **accuracy(head, own), "updates": steps} for split, own in found.items()]
    return head.to(base.model.device), pd.DataFrame(rows)
