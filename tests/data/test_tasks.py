"""The tasks: what is cached, what is decoded, what counts."""

import lzma

import pytest
import torch
from tiny import DOCUMENTS, tiny_tokenizer

from cachemedic.data import text
from cachemedic.data.external_text import load_documents, load_reviews
from cachemedic.data.task_data import TaskData, score
from cachemedic.data.tasks import needle_task, perplexity_task, sentiment_task


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def tasks(tokenizer) -> list[TaskData]:
    return [
        perplexity_task(tokenizer, DOCUMENTS, seeds=(0, 1), n=4, prefix=20, scored=5),
        sentiment_task(tokenizer, seeds=(0, 1), n=4),
        needle_task(tokenizer, DOCUMENTS, seeds=(0, 1), n=5, context=120, pairs=2),
    ]


def decoded(tokenizer, task: TaskData, row: int) -> tuple[str, str, str]:
    """The cached text, the decoded text and the scored text of one example."""
    parts = (
        task.prefix_ids[row][task.prefix_mask[row]],
        task.continuation_ids[row],
        task.target_ids[row][task.target_mask[row]],
    )
    return tuple(tokenizer.decode(ids) for ids in parts)


def test_every_target_is_the_token_after_its_input(tokenizer) -> None:
    for task in tasks(tokenizer):
        assert torch.equal(task.target_ids[:, :-1], task.continuation_ids[:, 1:])
        assert task.target_mask.any(1).all()
        assert task.prefix_mask[:, -1].all(), "prefixes are padded on the left"
        assert (task.prefix_mask.int().diff(dim=1) >= 0).all()
        first = task.prefix_ids[torch.arange(len(task)), task.prefix_mask.int().argmax(1)]
        assert (first == tokenizer.bos_token_id).all()


def test_tasks_are_reproducible_and_seeds_share_no_example(tokenizer) -> None:
    for task, again in zip(tasks(tokenizer), tasks(tokenizer), strict=True):
        assert torch.equal(task.prefix_ids, again.prefix_ids)
        assert torch.equal(task.seeds, torch.tensor([0, 1]).repeat_interleave(len(task) // 2))
        assert len(task.prefix_ids.unique(dim=0)) == len(task)


def test_perplexity_scores_exactly_the_asked_tokens_of_a_document(tokenizer) -> None:
    task = perplexity_task(tokenizer, DOCUMENTS, n=6, prefix=20, scored=5)
    assert task.prefix_ids.shape == (6, 20)
    assert task.target_mask.all()
    assert task.target_ids.shape == (6, 5)
    for row in range(6):
        ids = torch.cat([task.prefix_ids[row, 1:], task.continuation_ids[row], task.target_ids[row, -1:]])
        assert any(tokenizer.decode(ids) in document for document in DOCUMENTS)


def test_perplexity_takes_further_windows_of_a_document_when_it_must(tokenizer) -> None:
    task = perplexity_task(tokenizer, DOCUMENTS[3:4], n=3, prefix=8, scored=2)
    assert len(task.prefix_ids.unique(dim=0)) == 3


def test_sentiment_caches_the_review_and_decodes_the_prompt(tokenizer) -> None:
    task = sentiment_task(tokenizer, n=20)
    labels = set()
    for row in range(20):
        cached, fed, scored = decoded(tokenizer, task, row)
        assert cached.startswith(f"{text.END_OF_TEXT}Review: ")
        assert cached.endswith(".")
        assert fed == "\nSentiment:"
        labels.add(scored)
    assert labels == {" negative", " positive"}
    assert [tokenizer.decode([choice]) for choice in task.choices] == [" negative", " positive"]


def test_sentiment_labels_of_several_tokens_are_compared_where_they_differ() -> None:
    letters = tiny_tokenizer(257)  # bytes only
    task = sentiment_task(letters, n=4)
    assert [letters.decode([choice]) for choice in task.choices] == ["n", "p"]
    assert decoded(letters, task, 0)[1] == "\nSentiment: "
    assert torch.equal(task.target_mask.sum(1), torch.ones(4, dtype=torch.long))


def test_sentiment_splits_draw_different_reviews_and_given_reviews_are_used(tokenizer) -> None:
    test, validation = (sentiment_task(tokenizer, n=3, split=split) for split in ("test", "validation"))
    assert decoded(tokenizer, test, 0) != decoded(tokenizer, validation, 0)
    given = sentiment_task(tokenizer, n=2, reviews=[("a fine film", 1), ("a dull film", 0)])
    found = {decoded(tokenizer, given, row) for row in range(2)}
    assert found == {
        (f"{text.END_OF_TEXT}Review: a fine film", "\nSentiment:", " positive"),
        (f"{text.END_OF_TEXT}Review: a dull film", "\nSentiment:", " negative"),
    }


def test_needle_hides_the_answer_at_the_asked_depth(tokenizer) -> None:
    task = needle_task(tokenizer, DOCUMENTS, n=5, context=140, depths=(0.0, 0.5, 1.0), pairs=2)
    assert task.prefix_mask.all()
    assert task.prefix_ids.shape == (5, 140)
    assert task.depth.tolist() == [0.0, 0.5, 1.0, 0.0, 0.5]
    for row in range(5):
        cached, fed, answer = decoded(tokenizer, task, row)
        name = fed.partition("paired with ")[2].partition("?")[0]
        assert fed.startswith(text.needle_question(name))
        fact = text.needle_fact(name, answer.strip(" ."))
        assert cached.count("Remember this pair") == 2
        before, found, after = cached.removeprefix(text.END_OF_TEXT).partition(fact)
        assert found
        if task.depth[row] == 0:
            assert not before
        if task.depth[row] == 1:
            assert not after


def test_score_matches_a_plain_loop(tokenizer) -> None:
    generator = torch.Generator().manual_seed(0)
    for task in tasks(tokenizer):
        logits = torch.randn(*task.target_ids.shape, len(tokenizer), generator=generator)
        logits[::2].scatter_(2, task.target_ids[::2, :, None], 50.0)  # every other example is right
        scores = score(task, logits)
        for row in range(len(task)):
            losses, right = [], []
            for m in task.target_mask[row].nonzero()[:, 0]:
                target = int(task.target_ids[row, m])
                losses.append(-float(logits[row, m].log_softmax(-1)[target]))
                rivals = task.choices or range(len(tokenizer))
                right.append(all(logits[row, m, target] >= logits[row, m, rival] for rival in rivals))
            assert scores["n_tokens"][row] == len(losses)
            assert scores["nll"][row] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
            if task.graded:
                assert scores["correct"][row] == all(right)
                assert row % 2 or scores["correct"][row] == 1
            else:
                assert scores["correct"][row] != scores["correct"][row]


def test_select_takes_the_named_examples(tokenizer) -> None:
    task = tasks(tokenizer)[2]
    picked = task.select(torch.tensor([4, 1]))
    assert torch.equal(picked.prefix_ids, task.prefix_ids[[4, 1]])
    assert picked.depth.tolist() == task.depth[[4, 1]].tolist()
    assert picked.graded


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda t: perplexity_task(t, DOCUMENTS, n=4, prefix=9000), "text too short.*9032"),
        (lambda t: perplexity_task(t, DOCUMENTS, n=0), "n is 0"),
        (lambda t: sentiment_task(t, n=3, reviews=[("good", 1)]), "3 reviews.*1 are given"),
        (lambda t: needle_task(t, DOCUMENTS[:1], context=150), "text too short"),
        (lambda t: needle_task(t, DOCUMENTS, context=30), "4 facts do not fit into a context of 30"),
        (lambda t: needle_task(t, DOCUMENTS, depths=(1.5,)), r"depths are \(1.5,\)"),
        (lambda t: needle_task(t, DOCUMENTS, pairs=500), "pairs is 500"),
    ],
)
def test_bad_input_is_one_clear_error(tokenizer, build, message) -> None:
    with pytest.raises(ValueError, match=message):
        build(tokenizer)


# --- text from outside ------------------------------------------------------------------------------------------------

ARTICLES = " \n = One = \n \n First text . \n \n = = Part = = \n \n More . \n \n = Two = \n \n Second . \n"


def test_documents_of_a_folder(tmp_path) -> None:
    (tmp_path / "test.txt").write_text(ARTICLES)
    with lzma.open(tmp_path / "train.txt.xz", "wt") as file:
        file.write(text.END_OF_TEXT.join(["a", "b"]))
    first, second = load_documents(tmp_path)
    assert first.startswith(" = One = ")
    assert "More" in first
    assert second.startswith(" = Two = ")
    assert load_documents(tmp_path, "train") == ["a", "b"]


def test_reviews_of_a_folder(tmp_path) -> None:
    (tmp_path / "dev.tsv").write_text('sentence\tlabel\nan " odd quote \t1\nbad\t0\n')
    assert load_reviews(tmp_path) == [('an " odd quote', 1), ("bad", 0)]
    (tmp_path / "test.tsv").write_text("sentence\tlabel\nhidden\t-1\n")
    with pytest.raises(ValueError, match="label '-1' of 'hidden'"):
        load_reviews(tmp_path, "test")


def test_text_by_the_name_of_a_hub_data_set(monkeypatch, tmp_path) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("CACHEMEDIC_CACHE", str(tmp_path))  # where nothing lies by these names
    asked = []

    def load_dataset(*name, split):
        asked.append((*name, split))
        return {"text": ARTICLES.splitlines(), "sentence": ["good"], "label": [1]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_documents("wikitext2")) == 2
    assert load_reviews("sst2") == [("good", 1)]
    assert load_documents("somebody/texts", "train")
    assert [name for name, *_ in asked] == ["Salesforce/wikitext", "stanfordnlp/sst2", "somebody/texts"]


def test_unknown_text_names_what_is_allowed(tmp_path) -> None:
    with pytest.raises(ValueError, match="unknown text 'wikitext-2'.*did you mean 'wikitext2'"):
        load_documents("wikitext-2")
    with pytest.raises(ValueError, match="unknown text '/no/such/folder'"):
        load_documents("/no/such/folder")
    with pytest.raises(ValueError, match="unknown split 'tset'; allowed: train, validation, test"):
        load_documents(tmp_path, "tset")
    with pytest.raises(ValueError, match="holds no test split; expected one of test.txt"):
        load_documents(tmp_path)
