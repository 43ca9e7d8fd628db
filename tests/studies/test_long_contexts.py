"""What notebook 23 runs: facts hidden in long texts, the damage to them, and what is counted."""

from __future__ import annotations

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from tiny import DOCUMENTS
from tiny_training import linear_map, tiny_base

from cachemedic.core.severity_map import SeverityMap
from cachemedic.corruption.spec import CorruptionSpec
from cachemedic.data.chats import KINDS
from cachemedic.data.tasks import perplexity_task
from cachemedic.defenses.heuristics import NoDefense
from cachemedic.evaluation.decoding import clean_pass, decode_logits
from cachemedic.studies.computing import long_contexts
from cachemedic.studies.computing.hidden_facts import DEPTHS, hidden_facts
from cachemedic.studies.drawing import long_contexts as drawing
from cachemedic.token.token_recompute import TokenRecompute

CHAT = "{% for turn in messages %}<user>{{ turn.content }}<end>{% endfor %}<model>"
LENGTH = 1200  # tokens; the tiny tokenizer has few words


@pytest.fixture(scope="module")
def base():
    base = tiny_base("llama")
    base.tokenizer.chat_template = CHAT
    base.model.config.max_position_embeddings = 2 * LENGTH
    return replace(base, severity_map=SeverityMap(linear_map(base.name, heads=2)))


@pytest.fixture(scope="module")
def texts(base):
    return [hidden_facts(base.tokenizer, 8 * DOCUMENTS, LENGTH, seed, turn=seed) for seed in (0, 1)]


def test_every_fact_is_stated_in_the_text_that_all_questions_share(base, texts):
    for turn, hidden in enumerate(texts):
        task, decode = hidden.task, base.tokenizer.decode
        assert task.prefix_ids.shape == (len(KINDS), LENGTH)
        assert (task.prefix_ids == task.prefix_ids[0]).all()
        stated = decode(task.prefix_ids[0][hidden.stated])
        assert decode(task.prefix_ids[0]).startswith("<user>")
        for i, kind in enumerate(KINDS):
            fact = decode(task.target_ids[i][task.target_mask[i]]).strip()
            assert fact in kind.facts
            before, _, after = kind.text.rpartition("{name}")[2].partition("{fact}")
            if after:  # no name lies between these words and the fact
                assert f"{before}{fact}{after}" in stated
            asked = decode(task.continuation_ids[i])
            assert kind.question in asked
            assert asked.index("<model>") < asked.index(kind.text.partition(" {fact}")[0].split(". ")[-1])
        assert task.depth.tolist() == pytest.approx([DEPTHS[(i + turn) % 4] for i in range(4)])


def test_passages_lie_at_their_depths(texts):
    for hidden in texts:
        starts = (hidden.stated.int().diff() == 1).nonzero().squeeze(1) + 1
        lengths = int(hidden.stated.sum())
        outside = [int((~hidden.stated[:start]).sum()) / (LENGTH - lengths) for start in starts]
        assert outside == pytest.approx(DEPTHS, abs=0.1)


def test_texts_that_cannot_be_made_are_named(base):
    with pytest.raises(ValueError, match="passages do not fit into 300 tokens"):
        hidden_facts(base.tokenizer, DOCUMENTS, 300, 0)
    with pytest.raises(ValueError, match="text too short"):
        hidden_facts(base.tokenizer, DOCUMENTS[:1], 4 * LENGTH, 0)
    with pytest.raises(ValueError, match="no chat format"):
        hidden_facts(tiny_base("llama").tokenizer, DOCUMENTS, LENGTH, 0)


def test_a_fault_hits_every_passage_and_its_share_of_the_rest(texts):
    spec = CorruptionSpec("gaussian", parameter=1.0, share=0.25)
    for hidden in texts:
        event = hidden.event(spec, 3, 2)
        assert event.time[hidden.stated].all()
        assert event.time[~hidden.stated].float().mean() == pytest.approx(0.25, abs=0.12)
        assert event.n_layers == 3
        assert torch.equal(event.time, hidden.event(spec, 3, 2).time)


def test_answers_are_those_of_the_sound_cache_where_it_is_recomputed(base, texts):
    caches = [clean_pass(base.model, (own := hidden.task.select(slice(0, 1)))).tokens(own) for hidden in texts]
    readers = {"none": NoDefense(), "recompute": TokenRecompute(base.model)}
    rows = long_contexts.answers(base, texts[0], *caches, readers)
    assert list(rows["type"].unique()) == ["none", "noise", "another text"]
    sound, exact = rows[rows.reader == "clean"], rows[rows.reader == "recompute"]
    assert len(sound) == len(KINDS)
    assert exact["kl"].abs().max() < 1e-4
    assert exact["nll"].to_numpy() == pytest.approx(np.tile(sound["nll"], 2), abs=1e-3)
    assert (rows[rows.reader == "none"]["kl"] > 1e-3).all()
    assert (rows[rows.reader == "none"]["damaged"] > texts[0].stated.float().mean().item()).all()


def test_questions_decoded_together_do_not_see_each_other(base, texts):
    task = texts[0].task
    cache = clean_pass(base.model, (own := task.select(slice(0, 1)))).tokens(own)
    readable = torch.rand(1, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.5
    for read in (cache, replace(cache, readable=readable)):
        together = long_contexts.ask(base, read, task, NoDefense())
        for i in range(len(task)):
            apart = decode_logits(base.model, read, task.select(slice(i, i + 1)))[0]
            torch.testing.assert_close(together[i], apart, rtol=1e-3, atol=1e-3)


def test_a_text_is_continued_after_any_number_of_its_tokens(base):
    task = perplexity_task(base.tokenizer, [" ".join(DOCUMENTS)], (3,), 2, prefix=60, scored=5)
    shorter, same = long_contexts.continued(task, 20), long_contexts.continued(task, 60)
    for name in ("prefix_ids", "continuation_ids", "target_ids", "target_mask", "seeds"):
        assert torch.equal(getattr(same, name), getattr(task, name)), name
    assert torch.equal(shorter.prefix_ids, task.prefix_ids[:, :20])
    assert torch.equal(shorter.continuation_ids[:, 0], task.prefix_ids[:, 20])
    assert torch.equal(shorter.target_ids[shorter.target_mask].view(2, 5), task.prefix_ids[:, 21:26])
    whole, part = clean_pass(base.model, task), clean_pass(base.model, shorter)
    torch.testing.assert_close(whole.k[..., :20, :], part.k, rtol=1e-4, atol=1e-4)


def test_damage_at_equal_parameters_is_a_share_of_the_value_of_the_context():
    conditions = [("erased", "none", 0.0, 4.0), ("none", "gaussian", 0.5, 3.0), ("none", "dropout_zero", 0.5, 2.5)]
    rows = [
        (length, kind, severity, reader, seed, 2.0, 2.0 + (nll - 2.0) * (1 + (length > 128) * (reader == "none")), 0.0)
        for length in (128, 1024)
        for reader, kind, severity, nll in conditions
        for seed in (0, 1)
    ]
    columns = ["length", "type", "severity", "reader", "seed", "nll_clean", "nll", "kl"]
    found = long_contexts.transferred(pd.DataFrame(rows, columns=columns)).set_index(["length", "type"])
    assert found["damage"].to_dict() == pytest.approx({
        (128, "gaussian"): 0.5, (128, "dropout_zero"): 0.25, (1024, "gaussian"): 1.0, (1024, "dropout_zero"): 0.5,
    })  # fmt: skip
    assert (found["value"] == 2.0).all()


@pytest.fixture
def summaries():
    facts = [
        ("test", length, kind, reader, seed, 0.3, right, 1.0, 0.1)
        for length in (1024, 4096)
        for kind, reader, share in (("none", "clean", 1.0), ("noise", "none", 0.0), ("noise", "E", 0.5),
                                    ("another text", "none", 0.25), ("another text", "E", 0.75))
        for seed in (0, 1)
        for right in [1.0] * round(4 * share) + [0.0] * round(4 - 4 * share)
    ]  # fmt: skip
    columns = ["split", "length", "type", "reader", "seed", "damaged", "named", "nll", "kl"]
    texts = [
        (length, "gaussian", long_contexts.SEVERITY, reader, seed, 2.0, 2.0 + kl, kl + 0.01 * seed)
        for length in (128, 4096)
        for reader, kl in (("none", 1.0), ("E", 0.1))
        for seed in (0, 1)
    ]
    names = ["length", "type", "severity", "reader", "seed", "nll_clean", "nll", "kl"]
    named = long_contexts.named(pd.DataFrame(facts, columns=columns))
    kl = long_contexts.repaired(pd.DataFrame(texts, columns=names), ["none", "E"]).assign(share=[0, 0, 0.01, 0.01])
    severity = pd.DataFrame({"length": [128, 4096], "type": "gaussian", "damage": [0.5, 0.8]})
    return named, kl, severity.assign(damage_low=severity.damage - 0.1, damage_high=severity.damage + 0.1)


def test_answers_are_counted_with_bounds_that_have_a_width(summaries):
    named, kl, _ = summaries
    row = named[(named.type == "noise") & (named.reader == "E") & (named.length == 4096)].iloc[0]
    assert (row.n_named, row.n_examples, row.n_seeds, row.named) == (4, 8, 2, 0.5)
    sound = named[named.reader == "clean"].iloc[0]
    assert sound.named_low < 1.0 == sound.named
    assert kl[kl.reader == "E"].kl.tolist() == pytest.approx([0.105, 0.105])
    assert (kl[kl.reader == "E"].kl_advantage == 0).all()


def test_figure_and_table_show_what_was_counted(summaries):
    named, kl, severity = summaries
    figure = drawing.figure(named, kl, severity)
    assert [ax.get_title() for ax in figure.axes][:2] == ["facts, noise", "facts, another text"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["sound cache", "no defence", "E, code and hashes"]
    table = drawing.table(named, kl).set_index("reader")
    assert table.loc["E, code and hashes", "text, 4,096"] == "6/8"
    assert table.loc["no defence", "noise, 1,024"] == "0/8"
    assert table.loc["E, code and hashes", "KL, 128"].startswith("0.105 [")
    assert "8 of 8 at 1,024, 8 of 8 at 4,096" in drawing.caption(named, kl)
    plt.close(figure)
