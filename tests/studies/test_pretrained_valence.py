"""The valence probe, the texts that it reads, and the summary of notebook 26."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from tiny_training import tiny_base

from cachemedic.data.text_source import TextSource
from cachemedic.studies.computing.pretrained_valence import WORDS, moods, summary
from cachemedic.studies.computing.valence_probe import (
    EVERY,
    STEPS,
    accuracy,
    drawn,
    end_states,
    examples,
    fit,
    pieces,
    probe,
)
from cachemedic.studies.drawing import pretrained_valence as drawing

REVIEWS = [(f"{'good' if label else 'bad'}{i} film .", label) for i in range(200) for label in (0, 1)]


def test_a_text_has_one_mood_and_no_review_comes_twice() -> None:
    texts = moods(REVIEWS, 6)
    words = [text.removeprefix("Review: ").split() for text in texts]
    for number, own in enumerate(words):
        assert len(own) >= WORDS - 1
        assert all(word.startswith("good" if number % 2 else "bad") for word in own[::3])
    named = [word for own in words for word in own[::3]]
    assert len(set(named)) == len(named)
    assert moods(REVIEWS, 6) == texts
    with pytest.raises(ValueError, match=r"400 reviews make \d+ texts of 90 words; 60 are needed"):
        moods(REVIEWS, 60)


def test_parts_share_no_text() -> None:
    repeated = REVIEWS + REVIEWS[:50]
    train, validation = drawn(repeated, (300, 100))
    assert (len(train), len(validation)) == (300, 100)
    assert len({text for text, _ in train + validation}) == 400
    assert drawn(repeated, (300, 100)) == [train, validation]
    with pytest.raises(ValueError, match="401 different reviews are needed; 400 are given"):
        drawn(repeated, (300, 101))


def test_pieces_begin_documents() -> None:
    documents = ["ab " * 100, "cd " * 100]
    found = pieces(documents, 20)
    assert all(any(document.startswith(piece) for document in documents) for piece in found)
    assert len({len(piece) for piece in found}) > 5


def test_the_end_of_a_text_is_read_whatever_its_neighbours_are() -> None:
    base = tiny_base()
    texts = ["a bridge", "boats wait below, and nobody knows", "closed", "the old bridge over the river is closed"]
    together = end_states(base, texts)
    assert together.shape == (4, base.config.hidden_size)
    for text, state in zip(texts, together, strict=True):
        torch.testing.assert_close(end_states(base, [text])[0], state, rtol=1e-4, atol=1e-5)
        ids = torch.tensor([[0, *base.tokenizer(text)["input_ids"]]])
        expected = base.model.base_model(ids).last_hidden_state[0, -1]
        torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-5)


def _examples(count: int, seed: int, flipped: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    states = torch.randn(count, 8, generator=draws)
    label = (states[:, 0] > 0) ^ flipped
    return states, torch.stack([label.float(), torch.ones(count)], 1)


def test_a_head_learns_what_can_be_told_and_validation_says_when_to_stop() -> None:
    train, test = _examples(300, 0), _examples(200, 1)
    head, steps = fit(train, _examples(100, 2))
    found = accuracy(head, test)
    assert found["n_examples"] == 200
    assert found["accuracy"] == found["n_correct"] / 200 > 0.9
    assert found["accuracy_low"] < found["accuracy"] < found["accuracy_high"] <= 1
    assert EVERY <= steps <= STEPS
    assert not any(parameter.requires_grad for parameter in head.parameters())
    assert fit(train, _examples(100, 2, flipped=True))[1] == EVERY  # it only gets worse


def test_other_text_does_not_count_as_right_or_wrong() -> None:
    head, _ = fit(_examples(300, 0), _examples(100, 2))
    states, targets = _examples(50, 3)
    neutral = torch.randn(30, 8), torch.tensor([[0.5, 0.0]]).expand(30, 2)
    both = torch.cat([states, neutral[0]]), torch.cat([targets, neutral[1]])
    assert accuracy(head, both) == accuracy(head, (states, targets))


def test_states_are_kept(tmp_path) -> None:
    base = tiny_base()
    found = examples(base, REVIEWS[:4], ["boats wait"], tmp_path / "kept.safetensors")
    assert found[1].tolist() == [[0, 1], [1, 1], [0, 1], [1, 1], [0.5, 0]]
    again = examples(base, REVIEWS[4:8], ["boats"], tmp_path / "kept.safetensors")
    assert torch.equal(again[0], found[0])


def test_a_probe_needs_labels(tmp_path) -> None:
    with pytest.raises(ValueError, match="trained on labelled reviews: name a source of them"):
        probe(tiny_base(), TextSource(), (4, 2, 2), tmp_path)


def test_differences_are_paired_and_sound_caches_do_not_count() -> None:
    gaps = {"none": (0.5, 0.7), "E": (0.1, 0.2), "D": (0.3, 0.5)}
    rows = [
        {
            "type": kind,
            "severity": 0.5,
            "reader": reader,
            "seed": seed,
            "kl": gap,
            "gap": gap if kind != "none" else 9.0,
            "projected": 0.5 - gap / 2,
            "projected_teacher": 0.5,
            "sentiment_shift": gap,
        }
        for kind in ("none", "gaussian")
        for reader, own in gaps.items()
        for seed, gap in enumerate(own)
    ]
    found = summary(pd.DataFrame(rows)).set_index("reader")
    assert found.loc["D", "gap"] == pytest.approx(0.4)
    assert found.loc["D", "gap_less_none"] == pytest.approx(-0.2)
    assert found.loc["D", "gap_less_none_low"] == pytest.approx(-0.2)  # the same in both seeds
    assert found.loc["D", "gap_less_e"] == pytest.approx(0.25)
    assert found.loc["D", "ratio"] == pytest.approx(((0.35 + 0.25) / 2) / 0.5)
    assert (found.loc["E", ["gap_less_e", "kl_less_e", "ratio_less_e"]] == 0).all()
    assert (found["n_seeds"] == 2).all()


def test_the_figure_shows_every_reader_behind_damaged_caches() -> None:
    bounds = {"gap": 0.2, "gap_low": 0.1, "gap_high": 0.3, "accuracy": 0.8, "accuracy_low": 0.7, "accuracy_high": 0.9}
    kinds = ("none", "gaussian", "contiguous_overwrite")
    rows = pd.DataFrame([{"type": kind, "reader": reader} | bounds for kind in kinds for reader in ("none", "E")])
    figure = drawing.by_type(rows, rows)
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["gaussian", "contiguous overwrite"]
    for ax, value in ((left, 0.2), (right, 0.8)):
        dots = [line for line in ax.lines if line.get_marker() in ("x", "o")]
        assert [list(line.get_xdata()) for line in dots] == [[value, value]] * 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["no defence", "E, code and hashes"]
    plt.close(figure)


def test_the_table_of_answers_has_a_column_for_each_type() -> None:
    rows = [
        {"type": kind, "reader": reader, "accuracy": 0.5, "accuracy_low": 0.25, "accuracy_high": 0.75}
        for kind in ("none", "quant_noise")
        for reader in ("none", "D")
    ]
    found = drawing.sentiment_table(pd.DataFrame(rows))
    assert list(found) == ["reader", "sound cache", "quant noise"]
    assert found["reader"].tolist() == ["no defence", "D, nothing stored"]
    assert set(found["quant noise"]) == {"0.50 [0.25, 0.75]"}
