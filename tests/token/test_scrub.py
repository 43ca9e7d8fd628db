"""The scrubber as a reader of the evaluation, on tiny and on embedded bases."""

import numpy as np
import pytest
import torch
from tiny import DOCUMENTS
from tiny_repair import base_of, calibrated, repair_at_once

from cachemedic.corruption.spec import CorruptionSpec
from cachemedic.data.tasks import perplexity_task, sentiment_task
from cachemedic.data.text import documentation
from cachemedic.data.windows import sample_windows
from cachemedic.defenses.heuristics import NoDefence, Reset
from cachemedic.defenses.safeguards import share_of_cache
from cachemedic.evaluation.decoding import clean_pass
from cachemedic.evaluation.evaluate import evaluate
from cachemedic.models.load import load_base
from cachemedic.repair.operator import RepairOperator
from cachemedic.token.calibration import calibrate, vectors_of
from cachemedic.token.observation import KNOWN_TOLERANCE
from cachemedic.token.operator import DEAD_ZONE
from cachemedic.token.scalar_codes import pack
from cachemedic.token.scrub import Scrubber, positions_of


def test_positions_begin_behind_the_padding():
    valid = torch.tensor([[True, True, True], [False, False, True]])
    assert positions_of(valid).tolist() == [[0, 1, 2], [-1, -1, 0]]


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_it_is_a_safeguard_of_the_evaluation(architecture):
    base = base_of(architecture)
    task = sentiment_task(base.tokenizer, seeds=(3, 5), n=3)
    assert not task.prefix_mask.all()
    clean = clean_pass(base.model, task)
    operators = {
        "new": calibrated(architecture, strength=0.0),
        "E": calibrated(architecture, share=0.2, coordinates=8),
        "runs": calibrated(architecture, share=0.2, coordinates=8, runs=2, seed=5),
        "D": calibrated(architecture, "D"),
    }
    readers = {name: Scrubber(base.model, operator) for name, operator in operators.items()} | {"none": NoDefence()}
    gaussian = CorruptionSpec("gaussian", parameter=1.0, share=0.5)
    scores = evaluate(base.model, task, clean, gaussian, readers)
    scores = scores.set_index(["reader", "seed", "example"]).sort_index()
    kl = {name: scores.loc[name, "kl"].to_numpy() for name in readers}
    np.testing.assert_array_equal(kl["new"], kl["none"])
    assert kl["E"].mean() < 0.5 * kl["none"].mean()
    for run, seed in enumerate((3, 5)):  # each run repairs its own seed
        part = task.select(torch.arange(3) + 3 * run)
        alone = {"alone": Scrubber(base.model, operators["runs"].select(run))}
        own = evaluate(base.model, part, clean_pass(base.model, part), gaussian, alone)["kl"]
        np.testing.assert_allclose(own, scores.loc[("runs", seed), "kl"], rtol=1e-3, atol=1e-5)
    for spec in (CorruptionSpec("none"), CorruptionSpec("gaussian", parameter=0.0)):
        unharmed = evaluate(base.model, task, clean, spec, {"E": readers["E"]})
        np.testing.assert_array_equal(unharmed["nll"], unharmed["nll_clean"])


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1])
def test_its_bytes_are_those_of_the_packed_codes(share):
    base = base_of("gpt2")
    operator = calibrated("gpt2", share=share)
    scrubber = Scrubber(base.model, operator)
    assert scrubber.bits_per_token() == int(operator.code.bits.sum())
    assert 0.9 * share <= share_of_cache(scrubber, operator.config.model) <= share
    task = perplexity_task(base.tokenizer, DOCUMENTS, n=2, prefix=10, scored=3)
    clean = clean_pass(base.model, task)
    codes = scrubber.write(clean.k, clean.v, task.prefix_ids, task.prefix_mask)
    taken = sum(8 * pack(c, bits).shape[-1] for c, bits in zip(codes, operator.code.bits, strict=True))
    assert scrubber.bits_per_token() <= taken < scrubber.bits_per_token() + 8 * len(codes)
    assert Scrubber(base.model, calibrated("gpt2", "D")).bits_per_token() == 0


@pytest.fixture(scope="module", params=["embedded-gpt2", "embedded-llama"])
def embedded(request):
    """An embedded base, an untrained E of 1/32 of the cache's bytes at full strength, a task and its clean pass."""
    base = load_base(request.param)
    documents = documentation("operator_train")[:300]
    operator = RepairOperator.create("E", base.model.config, layers=range(12), share=1 / 32)
    calibrate(operator, base, vectors_of(base, sample_windows(base, documents, 8, 128, seed=1)))
    operator.strength.data.fill_(1.0)
    task = perplexity_task(base.tokenizer, documentation("operator_train")[300:600], (0,), n=18, prefix=128, scored=16)
    return base, Scrubber(base.model, operator), task, clean_pass(base.model, task)


@torch.inference_mode()
def test_it_raises_no_false_alarm_on_the_embedded_bases(embedded):
    base, scrubber, task, clean = embedded
    ids, valid = task.prefix_ids, task.prefix_mask
    assert int(valid.sum()) > 2000
    codes = scrubber.write(clean.k, clean.v, ids, valid)
    for rows in (torch.arange(18), torch.tensor([5, 2, 9]), torch.tensor([17])):  # other shapes round otherwise
        kept = [c[rows] for c in codes]
        stored = clean.k[rows], clean.v[rows]
        k, v, _ = scrubber.scrub(*stored, ids[rows], positions_of(valid[rows]), kept)
        assert torch.equal(k, stored[0])
        assert torch.equal(v, stored[1])
        _, _, repair = repair_at_once(scrubber, *stored, ids[rows], valid[rows], kept)
        assert not repair.correction.any()
        assert repair.suspicion[:, 0].max() < KNOWN_TOLERANCE / 10, "far from the tolerances"
        assert repair.suspicion[:, 1:].max() < DEAD_ZONE / 10


def test_an_untrained_operator_recovers_what_an_overwrite_takes(embedded):
    base, scrubber, task, clean = embedded
    few = task.select(slice(0, 6))
    part = type(clean)(clean.k[:6], clean.v[:6], clean.logits[:6])
    readers = {"none": NoDefence(), "reset": Reset(), "E": scrubber}
    overwrite = CorruptionSpec("contiguous_overwrite", severity=0.25)
    scores = evaluate(base.model, few, part, overwrite, readers)
    lost = {name: (rows["nll"] - rows["nll_clean"]).mean() for name, rows in scores.groupby("reader")}
    assert lost["reset"] > lost["none"] > 0.05
    assert 1 - lost["E"] / lost["none"] > 0.8
    sound = evaluate(base.model, few, part, CorruptionSpec("none"), {"E": scrubber})
    np.testing.assert_array_equal(sound["nll"], sound["nll_clean"])
