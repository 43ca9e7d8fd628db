"""The shipped valence heads, and how they are trained."""

import json
import re

import numpy as np
import pytest
import torch

from cachemedic.data import text
from cachemedic.models.load import EMBEDDED, WEIGHTS, load_base
from cachemedic.training.bank import BankConfig
from cachemedic.training.valence import head as valence_head
from cachemedic.training.valence.head import last_hidden, shipped_valence


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_shipped_head_knows_reviews_as_well_as_its_card_says(name):
    base = load_base(name)
    head = shipped_valence(base)
    card = json.loads((WEIGHTS / name / "valence.json").read_text())
    rng = np.random.default_rng(5)  # none of the seeds of training
    right, strengths = [], []
    for _ in range(60):
        review, label = text.sentiment_review(rng)
        ids = [base.tokenizer.bos_token_id, *base.tokenizer(review)["input_ids"]]
        valence, strength = head(last_hidden(base, torch.tensor([ids]))[0, -1]).tolist()
        right.append((valence > 0.5) == (label == 1))
        strengths.append(strength)
    assert abs(np.mean(right) - card["accuracy"]) < 3.5 * np.sqrt(card["accuracy"] * (1 - card["accuracy"]) / 60)
    assert card["accuracy"] > 0.85
    assert np.mean(strengths) == pytest.approx(card["strength_reviews"], abs=0.1)


def test_a_head_is_differentiable_and_frozen():
    head = shipped_valence(load_base("embedded-gpt2"))
    hidden = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(0), requires_grad=True)
    values = head(hidden)
    assert values.shape == (2, 3, 2)
    assert ((values > 0) & (values < 1)).all()
    values.sum().backward()
    assert (hidden.grad != 0).any()
    assert not any(p.requires_grad for p in head.parameters())


def test_a_damaged_head_is_refused(tmp_path, monkeypatch):
    base = load_base("embedded-gpt2")
    folder = tmp_path / base.name
    folder.mkdir()
    for name in ("valence.json", "valence.safetensors"):
        (folder / name).write_bytes((WEIGHTS / base.name / name).read_bytes()[: -8 if "safe" in name else None])
    monkeypatch.setattr(valence_head, "WEIGHTS", tmp_path)
    with pytest.raises(OSError, match=r"valence.safetensors is damaged"):
        shipped_valence(base)


def test_training_learns_polarity_and_strength(base, monkeypatch):
    monkeypatch.setattr(valence_head, "REVIEWS", {"train": 40, "test": 20})
    monkeypatch.setattr(
        text, "documentation", lambda split: tuple(f"def call_{i}(x): return {i} and more" * 3 for i in range(50))
    )
    head, scores = valence_head.train_head(base)
    again, _ = valence_head.train_head(base)
    assert all(torch.equal(p, q) for p, q in zip(head.parameters(), again.parameters(), strict=True))
    assert scores["n_test"] == 20
    assert scores["strength_reviews"] > scores["strength_documentation"] + 0.2


def test_strength_is_the_margin_of_the_majority():
    assert valence_head._strength("The film was lovely, and the meal was charming.") == 1
    assert valence_head._strength("The film was lovely, the meal was awful, the book was dull.") == pytest.approx(1 / 3)


def test_the_states_of_a_base_hold_the_balance_of_a_review_but_hardly_its_size():
    base, rng = load_base("embedded-llama"), np.random.default_rng(6)
    reviews = [text.sentiment_review(rng)[0] for _ in range(500)]
    states = []
    for review in reviews:
        ids = [base.tokenizer.bos_token_id, *base.tokenizer(review)["input_ids"]]
        states.append(last_hidden(base, torch.tensor([ids]))[0, -1])
    x = torch.stack(states).double()
    x = torch.cat([(x - x.mean(0)) / x.std(0), torch.ones(len(x), 1)], 1)
    words = [re.findall(r"\w+", review) for review in reviews]
    margins = [sum((w in text.POSITIVE) - (w in text.NEGATIVE) for w in own) for own in words]
    adjectives = [sum(w in text.POSITIVE or w in text.NEGATIVE for w in own) for own in words]
    balance = torch.tensor(margins).double() / torch.tensor(adjectives)
    fitted, unseen = slice(0, 350), slice(350, None)
    ridge = x[fitted].T @ x[fitted] + 100 * torch.eye(x.shape[1], dtype=torch.double)
    found = x[unseen] @ torch.linalg.solve(ridge, x[fitted].T @ balance[fitted])
    assert np.corrcoef(found, balance[unseen])[0, 1] > 0.7
    assert np.corrcoef(found.abs(), balance[unseen].abs())[0, 1] < 0.5


def test_a_bank_may_hold_reviews():
    assert BankConfig(split="operator_train+reviews").split == "operator_train+reviews"
    with pytest.raises(ValueError, match="did you mean 'test.reviews'"):
        BankConfig(split="tests+reviews")
