"""Evaluation against slow references: plain forward passes, one example and one reader at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import CONTEXT, DOCUMENTS, VOCABULARY, tiny_model, tiny_tokenizer

from cachemedic.corruption.spec import CorruptionSpec
from cachemedic.data.task_data import TaskData, score
from cachemedic.data.tasks import needle_task, perplexity_task, sentiment_task
from cachemedic.defenses.heuristics import NoDefense, Reset, Smoothing, blind_defenses, oracles
from cachemedic.defenses.registry import Calibration
from cachemedic.defenses.storage_defenses import storage_defenses
from cachemedic.evaluation import decoding
from cachemedic.evaluation.decoding import CleanBank, clean_pass, decode_logits, tokens_of
from cachemedic.evaluation.evaluate import evaluate
from cachemedic.models.cache import unstack_cache
from cachemedic.repair.operator import RepairOperator

NONE = CorruptionSpec("none")
GAUSSIAN = CorruptionSpec("gaussian", parameter=1.0)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def padded(tokenizer) -> TaskData:
    """Examples of different lengths, in two seeds."""
    task = sentiment_task(tokenizer, seeds=(3, 5), n=4)
    assert not task.prefix_mask.all()
    return task


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_model()


@pytest.fixture(scope="module")
def clean(model, padded) -> CleanBank:
    return clean_pass(model, padded)


def operator_of(model, runs: int = 1, size: float = 0.5) -> RepairOperator:
    """An operator that changes something."""
    operator = RepairOperator.create("A", model.config, [0, 2], rank=2, runs=runs, seed=list(range(runs)))
    generator = torch.Generator().manual_seed(0)
    for parameter in operator.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return operator


def one_by_one(model, task: TaskData) -> torch.Tensor:
    """The slow reference: each example alone, without padding and without a cache."""
    rows = []
    for row in range(len(task)):
        prefix = task.prefix_ids[row][task.prefix_mask[row]]
        ids = torch.cat([prefix, task.continuation_ids[row]])
        rows.append(model(ids[None]).logits[0, len(prefix) :])
    return torch.stack(rows)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_clean_pass_is_a_plain_forward_pass(architecture, tokenizer, padded) -> None:
    model = tiny_model(architecture)
    needle = needle_task(tokenizer, DOCUMENTS, n=3, context=100, pairs=2)
    for task in (padded, needle, perplexity_task(tokenizer, DOCUMENTS, n=3, prefix=10, scored=6)):
        bank = clean_pass(model, task)
        assert bank.k.shape == (len(task), 3, 4 if architecture == "gpt2" else 2, task.prefix_ids.shape[1], 8)
        torch.testing.assert_close(bank.logits, one_by_one(model, task), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_unreadable_positions_are_as_if_cut_out_at_the_same_position_ids(architecture, tokenizer) -> None:
    model = tiny_model(architecture)
    task = perplexity_task(tokenizer, DOCUMENTS, n=3, prefix=12, scored=5)
    bank = clean_pass(model, task)
    cache, readable = bank.tokens(task), torch.ones(3, 12, dtype=torch.bool)
    readable[:, [2, 3, 9]] = False
    cut = unstack_cache(*(x[..., readable[0], :] for x in (bank.k, bank.v)))
    positions = torch.arange(12, 17).expand(3, -1)
    expected = model(task.continuation_ids, past_key_values=cut, position_ids=positions).logits
    torch.testing.assert_close(
        decode_logits(model, replace(cache, readable=readable), task), expected, rtol=1e-3, atol=1e-4
    )
    erased = decode_logits(model, replace(cache, readable=torch.zeros_like(readable)), task)
    alone = model(task.continuation_ids, position_ids=positions).logits
    torch.testing.assert_close(erased, alone, rtol=1e-3, atol=1e-4)


def test_a_task_longer_than_the_context_is_an_error(model, tokenizer) -> None:
    task = perplexity_task(tokenizer, ["words and words " * 200], n=1, prefix=CONTEXT - 10, scored=11)
    with pytest.raises(
        ValueError, match=f"{CONTEXT - 10} cached and 11 decoded tokens.*context of the model is {CONTEXT}"
    ):
        clean_pass(model, task)


def test_batches_change_nothing_but_rounding(model, padded, clean, monkeypatch) -> None:
    readers = {"none": NoDefense(), "repaired": operator_of(model), "runs": operator_of(model, runs=2)}
    whole = evaluate(model, padded, clean, GAUSSIAN, readers)
    monkeypatch.setattr(decoding, "BATCH_BYTES", 1)  # one example of every run at a time
    pieces = evaluate(model, padded, clean, GAUSSIAN, readers)
    assert pieces.columns.tolist() == whole.columns.tolist()
    for column in ("reader", "seed", "example", "type", "n_positions"):
        assert (pieces[column] == whole[column]).all()
    np.testing.assert_allclose(pieces[["nll", "kl"]], whole[["nll", "kl"]], rtol=1e-3, atol=1e-5)


def test_runs_of_an_operator_repair_their_own_seed(model, padded, clean) -> None:
    both = operator_of(model, runs=2)
    stacked = decode_logits(model, clean.tokens(padded), padded, both)
    for run in range(2):
        rows = torch.arange(4) + 4 * run
        alone = decode_logits(model, clean.tokens(padded, rows), padded.select(rows), both.select(run))
        torch.testing.assert_close(stacked[rows], alone, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(stacked[:4], decode_logits(model, clean.tokens(padded), padded)[:4], atol=1e-2)


def test_runs_that_do_not_fit_are_errors(model, padded, clean) -> None:
    with pytest.raises(ValueError, match="8 examples do not split into 3 runs"):
        evaluate(model, padded, clean, NONE, {"repaired": operator_of(model, runs=3)})
    with pytest.raises(ValueError, match=r"operators of \[2, 4\] runs"):
        evaluate(model, padded, clean, NONE, {"two": operator_of(model, runs=2), "four": operator_of(model, runs=4)})


def test_without_corruption_reading_the_cache_as_it_is_costs_nothing(model, padded, clean) -> None:
    frame = evaluate(model, padded, clean, NONE, {"none": NoDefense(), "repaired": operator_of(model)})
    none, repaired = (frame[frame.reader == name] for name in ("none", "repaired"))
    assert (none.kl == 0).all()
    assert (none.nll == none.nll_clean).all()
    assert (repaired.kl > 0).all(), "the clean regression of an operator is measured, not assumed"
    assert (none.n_tokens == 1).all()
    assert set(none.correct) <= {0.0, 1.0}
    assert none.seed.tolist() == [3] * 4 + [5] * 4
    assert none.example.tolist() == [0, 1, 2, 3] * 2


def test_scores_are_those_of_the_decoded_logits(model, padded, clean) -> None:
    frame = evaluate(model, padded, clean, NONE, {"reset": Reset()})
    logits = decode_logits(model, Reset().read(clean.tokens(padded), None), padded)
    np.testing.assert_allclose(frame.nll, score(padded, logits)["nll"])
    scored = padded.target_mask
    log_p, log_q = clean.logits[scored].log_softmax(-1), logits[scored].log_softmax(-1)
    expected = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    np.testing.assert_allclose(frame.kl, expected, rtol=1e-4)
    np.testing.assert_allclose(frame.nll_clean, score(padded, clean.logits)["nll"])


def test_references_bound_the_scale(model, padded, clean) -> None:
    calibration = Calibration(model, clean.tokens(padded))
    readers = blind_defenses(calibration) | oracles(calibration)
    frame = evaluate(model, padded, clean, GAUSSIAN, readers)
    assert frame.reader.unique().tolist() == list(readers)
    assert frame.groupby("reader").size().eq(len(padded)).all()
    kl = frame.groupby("reader").kl.mean()
    assert kl["prefill"] == 0
    assert kl["none"] > 0
    assert kl["erase_damaged"] == pytest.approx(kl["reset"]), "everything is damaged here"


def test_storage_defenses_keep_the_clean_cache_and_read_the_corrupted_one(model, padded, clean) -> None:
    calibration = Calibration(model, clean.tokens(padded))
    readers = storage_defenses(calibration)
    untouched = evaluate(model, padded, clean, NONE, readers)
    assert untouched.reader.unique().tolist() == list(readers)
    assert (untouched.kl == 0).all()
    frame = evaluate(model, padded, clean, GAUSSIAN, {"none": NoDefense()} | oracles(calibration) | readers)
    kl = frame.groupby("reader").kl.mean()
    assert kl["checksum_erase"] == pytest.approx(kl["erase_damaged"])
    assert kl["shadow_4bit"] < 0.5 * kl["none"]
    assert kl["secded_ecc_in_page"] == pytest.approx(kl["none"]), "a change of every value is written with its code"


def test_readers_and_conditions_are_paired(model, padded, clean) -> None:
    alone = evaluate(model, padded, clean, GAUSSIAN, {"none": NoDefense()})
    among = evaluate(model, padded, clean, GAUSSIAN, {"smoothing": Smoothing(), "none": NoDefense()})
    assert (among[among.reader == "none"].nll.to_numpy() == alone.nll).all()
    other = evaluate(model, padded, clean, GAUSSIAN, {"none": NoDefense()}, draw=1)
    assert (other.nll != alone.nll).all()
    # an example's draws do not depend on the other seeds that are evaluated with it
    rows = torch.arange(4, 8)
    part = CleanBank(clean.k[rows], clean.v[rows], clean.logits[rows])
    second = evaluate(model, padded.select(rows), part, GAUSSIAN, {"none": NoDefense()})
    np.testing.assert_allclose(second.nll, alone.nll[4:], rtol=1e-5)


def test_the_event_is_reported(model, padded, clean) -> None:
    spec = CorruptionSpec("dropout_zero", parameter=0.5, share=0.8, layers=[1], time=("old_only", 3))
    frame = evaluate(model, padded, clean, spec, {"none": NoDefense()})
    assert (frame.type == "dropout_zero").all()
    assert (frame.parameter == 0.5).all()
    assert frame.severity.isna().all()
    assert (frame.n_layers == 1).all()
    assert (frame.n_positions <= padded.prefix_mask.sum(1).numpy() - 3).all(), "padding is never hit"


def test_an_overwritten_cache_is_that_of_the_next_example_of_the_seed(model, tokenizer) -> None:
    task = perplexity_task(tokenizer, DOCUMENTS, seeds=(0, 1), n=3, prefix=12, scored=5)
    bank = clean_pass(model, task)
    spec = CorruptionSpec("contiguous_overwrite", parameter=12)
    frame = evaluate(model, task, bank, spec, {"none": NoDefense()})
    donors = [1, 2, 0, 4, 5, 3]
    swapped = decode_logits(model, tokens_of(task, bank.k[donors], bank.v[donors]), task)
    np.testing.assert_allclose(frame.nll, score(task, swapped)["nll"], rtol=1e-5)


def test_a_donor_shorter_than_the_example_leaves_the_rest(model, padded, clean) -> None:
    spec = CorruptionSpec("contiguous_overwrite", parameter=10)
    frame = evaluate(model, padded, clean, spec, {"none": NoDefense()})
    assert frame.nll.notna().all()
    assert (frame.kl > 0).all()


def test_an_example_without_a_donor_is_an_error(model, padded, clean) -> None:
    one = torch.tensor([0])
    bank = CleanBank(clean.k[one], clean.v[one], clean.logits[one])
    with pytest.raises(ValueError, match="donor"):
        evaluate(
            model, padded.select(one), bank, CorruptionSpec("contiguous_overwrite", parameter=4), {"none": NoDefense()}
        )


def test_logits_cover_the_vocabulary(clean, padded) -> None:
    assert clean.logits.shape == (*padded.continuation_ids.shape, VOCABULARY)
