"""The valence head: a probe on the last hidden states that says how positive a text is, and how strongly so.

It takes hidden states [..., width], as the output layer of the model reads them, to [0, 1]^2 by independent sigmoids:
dimension 0 is the valence, positive against negative, dimension 1 its strength. Any other function from hidden states
to [0, 1]^m, m >= 2, may take its place.

The strength tells a review from documentation (.85 against .03) but, except on embedded-gpt2, hardly a mixed review
from a unanimous one: its correlation with the margin of the majority is .66, .14 and .00 on the three bases. The states
are why, not the training. On validation reviews a linear map finds the signed balance of a review (r = .95, .83, .84),
but its size only to r = .72, .28 and .28; and three reviews in four are unanimous. A head trained on ends of reviews
alone does no better than that, so the strength stays what it is: of the saliency it touches the coherence, a tenth.

The shipped heads are trained by

    python -m cachemedic.training.valence.head embedded-gpt2
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F

from cachemedic.core.files import digest, read_sealed, replace_together, seal
from cachemedic.data import text
from cachemedic.models.load import EMBEDDED, WEIGHTS, Base, load_base

Valence = Callable[[torch.Tensor], torch.Tensor]  # hidden states [..., width] -> [..., m] in [0, 1]

CARD, FILE = "valence.json", "valence.safetensors"
DIMENSIONS = ("valence", "strength")
REVIEWS = {"train": 3000, "test": 1000}
UNITS, STEPS, LR, DECAY = 32, 200, 1e-2, 0.1


class ValenceHead(torch.nn.Module):
    """One hidden layer of 32 units on standardised hidden states: [..., width] -> [..., 2]."""

    def __init__(self, width: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.mean, self.std = (
            torch.nn.Parameter(x, requires_grad=False) for x in (torch.zeros(width), torch.ones(width))
        )
        self.inner = torch.nn.Parameter(torch.randn(width, UNITS, generator=generator) / width**0.5)
        self.inner_bias = torch.nn.Parameter(torch.zeros(UNITS))
        self.outer = torch.nn.Parameter(torch.zeros(UNITS, len(DIMENSIONS)))
        self.outer_bias = torch.nn.Parameter(torch.zeros(len(DIMENSIONS)))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        x = (hidden.to(self.mean.dtype) - self.mean) / self.std
        return torch.tanh(x @ self.inner + self.inner_bias) @ self.outer + self.outer_bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.logits(hidden))


def shipped_valence(base: Base) -> ValenceHead:
    """The head that comes with an embedded base, frozen, on its device.

    Raises `ValueError` for another base, `OSError` if the file is not the one that its card names.
    """
    folder = WEIGHTS / base.name
    if base.name not in EMBEDDED:
        raise ValueError(
            f"no valence head comes with base {base.name!r} (it does with {', '.join(EMBEDDED)}): pass a function from "
            "hidden states [..., width] to [0, 1]^m, m >= 2, for example the result of `train_head`"
        )
    data = (folder / FILE).read_bytes()
    if digest(data) != head_digest(base):
        raise OSError(f"{folder / FILE} is damaged; restore it with `git checkout`")
    head = ValenceHead(base.config.hidden_size)
    head.load_state_dict(safetensors.torch.load(data))
    return head.to(base.model.device).requires_grad_(False)


def train_head(base: Base, seed: int = 0) -> tuple[ValenceHead, dict[str, float]]:
    """A head for `base`, trained on generated reviews and neutral documentation text, and its scores on unseen ones.

    Scores: accuracy of the valence at the end of a review (n_test reviews), correlation of the strength with the
    share by which one polarity outweighs the other, and the mean strength of reviews and of documentation.
    """
    hidden, targets, _ = _examples(base, "train", seed)
    head = ValenceHead(hidden.shape[-1], torch.Generator().manual_seed(seed))
    head.mean.copy_(hidden.mean(0))
    head.std.copy_(hidden.std(0).clamp_min(1e-6))
    trained = [p for p in head.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=DECAY)
    for _ in range(STEPS):
        loss = F.binary_cross_entropy_with_logits(head.logits(hidden), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    head.requires_grad_(False)
    hidden, targets, whole = _examples(base, "test", seed)
    scores, neutral = head(hidden), targets[:, 1] == 0
    right = (scores[whole, 0] > 0.5) == (targets[whole, 0] > 0.5)
    strengths = np.corrcoef(scores[whole, 1], targets[whole, 1])[0, 1]
    return head, {
        "accuracy": round(float(right.float().mean()), 4),
        "n_test": int(whole.sum()),
        "strength_correlation": round(float(strengths), 4),
        "strength_reviews": round(float(scores[whole, 1].mean()), 4),
        "strength_documentation": round(float(scores[neutral, 1].mean()), 4),
    }


def _examples(base: Base, split: str, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states [N, width], targets [N, 2], and which of them are ends of whole reviews [N].

    Of each review the end and two tokens of its second half; of documentation, as many windows' ends as reviews.
    """
    rng = np.random.default_rng([seed, *b"valence", *split.encode()])
    texts: list[str] = []
    targets: list[tuple[float, float]] = []
    for _ in range(REVIEWS[split]):
        review, label = text.sentiment_review(rng)
        texts.append(review)
        targets.append((label, _strength(review)))
    documents = text.documentation(split)
    for i in rng.choice(len(documents), REVIEWS[split]):
        texts.append(documents[i][: int(rng.integers(60, 300))])
        targets.append((0.5, 0.0))
    states, rows, whole = [], [], []
    for at in range(0, len(texts), 50):
        ids = [_encode(base, t) for t in texts[at : at + 50]]
        lengths = torch.tensor([len(x) for x in ids])
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(x) for x in ids], batch_first=True)
        hidden = last_hidden(base, padded)
        for row, length in enumerate(lengths.tolist()):
            is_review = at + row < REVIEWS[split]
            middle = rng.integers(length // 2, length - 1, 2).tolist() if is_review else []
            for place in [length - 1, *middle]:
                states.append(hidden[row, place])
                rows.append(targets[at + row])
                whole.append(is_review and place == length - 1)
    return torch.stack(states), torch.tensor(rows), torch.tensor(whole)


@torch.inference_mode()
def last_hidden(base: Base, ids: torch.Tensor) -> torch.Tensor:
    """The last hidden states of right-padded ids [B, T], float32 on the CPU: [B, T, width]. Causality hides padding."""
    ids = ids.to(base.model.device)
    output = base.model.base_model(ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return output.last_hidden_state.float().cpu()


def _encode(base: Base, string: str) -> list[int]:
    start = base.tokenizer.eos_token_id if base.tokenizer.bos_token_id is None else base.tokenizer.bos_token_id
    return [start, *base.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]][: base.context]


def _strength(review: str) -> float:
    """By how much one polarity outweighs the other among the adjectives of a review, from 0 to 1."""
    words = re.findall(r"\w+", review)
    positive, negative = (sum(word in lexicon for word in words) for lexicon in (text.POSITIVE, text.NEGATIVE))
    return abs(positive - negative) / (positive + negative)


def ship(name: str) -> None:
    """Train the head of an embedded base and write it and its card beside the base's weights."""
    head, scores = train_head(load_base(name))
    data = safetensors.torch.save({key: x.contiguous() for key, x in head.state_dict().items()})
    card = {"dimensions": DIMENSIONS, "reads": "last hidden state", "sha256": digest(data)}
    replace_together(WEIGHTS / name, {FILE: data, CARD: seal(card | scores)}, last=CARD)


def head_digest(base: Base) -> str:
    """The sha256 of the head that comes with a base, part of the key of what it trains; empty if there is none."""
    card: Path = WEIGHTS / base.name / CARD
    return read_sealed(card)["sha256"] if card.exists() else ""


if __name__ == "__main__":
    ship(sys.argv[1])
