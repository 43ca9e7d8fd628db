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
from cachemedic.defenses.defense import CachedTokens, cache_bytes_per_token
from cachemedic.defenses.heuristics import NoDefense, Reset
from cachemedic.evaluation.decoding import clean_pass
from cachemedic.evaluation.evaluate import evaluate
from cachemedic.models.load import load_base
from cachemedic.repair.operator import RepairOperator
from cachemedic.token.layerwise.calibration import calibrate, vectors_of
from cachemedic.token.layerwise.observation import KNOWN_TOLERANCE
from cachemedic.token.layerwise.operator import DEAD_ZONE
from cachemedic.token.layerwise.scrub import Scrubber, positions_of
from cachemedic.token.scalar_codes import pack


def test_positions_begin_behind_the_padding():
    valid = torch.tensor([[True, True, True], [False, False, True]])
    assert positions_of(valid).tolist() == [[0, 1, 2], [-1, -1, 0]]


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_it_is_a_defense_of_the_evaluation(architecture):
    base = base_of(architecture)
    task = sentiment_task(base.tokenizer, seeds=(3, 5), n=3)
    assert not task.prefix_mask.all()
    clean = clean_pass(base.model, task)
    operators = {
        "new": calibrated(architecture, strength=0.0),
        "layerwise-E": calibrated(architecture, share=0.2, coordinates=8),
        "runs": calibrated(architecture, share=0.2, coordinates=8, runs=2, seed=5),
        "layerwise-D": calibrated(architecture, "layerwise-D"),
    }
    readers = {name: Scrubber(base.model, operator) for name, operator in operators.items()} | {"none": NoDefense()}
    gaussian = CorruptionSpec("gaussian", parameter=1.0, share=0.5)
    scores = evaluate(base.model, task, clean, gaussian, readers)
    scores = scores.set_index(["reader", "seed", "example"]).sort_index()
    kl = {name: scores.loc[name, "kl"].to_numpy() for name in readers}
    np.testing.assert_array_equal(kl["new"], kl["none"])
    assert kl["layerwise-E"].mean() < 0.5 * kl["none"].mean()
    for run, seed in enumerate((3, 5)):  # each run repairs its own seed
        part = task.select(torch.arange(3) + 3 * run)
        alone = {"alone": Scrubber(base.model, operators["runs"].select(run))}
        own = evaluate(base.model, part, clean_pass(base.model, part), gaussian, alone)["kl"]
        np.testing.assert_allclose(own, scores.loc[("runs", seed), "kl"], rtol=1e-3, atol=1e-5)
    for spec in (CorruptionSpec("none"), CorruptionSpec("gaussian", parameter=0.0)):
        unharmed = evaluate(base.model, task, clean, spec, {"layerwise-E": readers["layerwise-E"]})
        np.testing.assert_array_equal(unharmed["nll"], unharmed["nll_clean"])


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1])
def test_its_bytes_are_those_of_the_packed_codes(share):
    base = base_of("gpt2")
    operator = calibrated("gpt2", share=share)
    scrubber = Scrubber(base.model, operator)
    assert 8 * scrubber.bytes_per_token == int(operator.code.bits.sum())
    assert 0.9 * share <= scrubber.bytes_per_token / cache_bytes_per_token(operator.config.model) <= share
    task = perplexity_task(base.tokenizer, DOCUMENTS, n=2, prefix=10, scored=3)
    clean = clean_pass(base.model, task)
    codes = scrubber.write(CachedTokens.behind_padding(clean.k, clean.v, task.prefix_ids, task.prefix_mask))
    taken = sum(8 * pack(c, bits).shape[-1] for c, bits in zip(codes, operator.code.bits, strict=True))
    assert 0 <= taken - 8 * scrubber.bytes_per_token < 8 * len(codes)
    assert Scrubber(base.model, calibrated("gpt2", "layerwise-D")).bytes_per_token == 0


@pytest.fixture(scope="module", params=["embedded-gpt2", "embedded-llama"])
def embedded(request):
    """An embedded base, an untrained E of 1/32 of the cache's bytes at full strength, a task and its clean pass."""
    base = load_base(request.param)
    documents = documentation("operator_train")[:300]
    operator = RepairOperator.create("layerwise-E", base.model.config, layers=range(12), share=1 / 32)
    calibrate(operator, base, vectors_of(base, sample_windows(base, documents, 8, 128, seed=1)))
    operator.strength.data.fill_(1.0)
    task = perplexity_task(base.tokenizer, documentation("operator_train")[300:600], (0,), n=18, prefix=128, scored=16)
    return base, Scrubber(base.model, operator), task, clean_pass(base.model, task)


@torch.inference_mode()
def test_it_raises_no_false_alarm_on_the_embedded_bases(embedded):
    base, scrubber, task, clean = embedded
    ids, valid = task.prefix_ids, task.prefix_mask
    assert int(valid.sum()) > 2000
    codes = scrubber.write(CachedTokens.behind_padding(clean.k, clean.v, ids, valid))
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
    readers = {"none": NoDefense(), "reset": Reset(), "layerwise-E": scrubber}
    overwrite = CorruptionSpec("contiguous_overwrite", severity=0.25)
    scores = evaluate(base.model, few, part, overwrite, readers)
    lost = {name: (rows["nll"] - rows["nll_clean"]).mean() for name, rows in scores.groupby("reader")}
    assert lost["reset"] > lost["none"] > 0.05
    assert 1 - lost["layerwise-E"] / lost["none"] > 0.8
    sound = evaluate(base.model, few, part, CorruptionSpec("none"), {"layerwise-E": scrubber})
    np.testing.assert_array_equal(sound["nll"], sound["nll_clean"])
