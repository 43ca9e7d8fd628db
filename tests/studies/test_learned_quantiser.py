"""Caches of few bits: what is measured behind them, their bytes, and what is compared with what."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from small_models import shaken
from tiny import DOCUMENTS, tiny_tokenizer
from tiny_repair import joint_of
from tiny_training import CONFIG, tiny_base

from cachemedic.core.divergence import kd_per_token
from cachemedic.data.task_data import score
from cachemedic.data.tasks import perplexity_task
from cachemedic.defenses.defense import CachedTokens
from cachemedic.evaluation.decoding import clean_pass
from cachemedic.models.cache import unstack_cache
from cachemedic.repair.operator import RepairOperator
from cachemedic.studies.computing.learned_quantiser import REPAIRED, SHARE, paired, summary
from cachemedic.studies.quantised_evaluation import code_alone, fixed_ranges, full, quantised, quantised_scores
from cachemedic.token.token_repair import TokenRepair
from cachemedic.training.valence.quantiser import KVQuantiser, QuantiserConfig


def feeling(hidden: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(hidden[..., :2].float())


@pytest.fixture(scope="module")
def base():
    return tiny_base()


@pytest.fixture(scope="module")
def task():
    return perplexity_task(tiny_tokenizer(), DOCUMENTS, CONFIG.seeds, n=2, prefix=10, scored=3)


@pytest.fixture(scope="module")
def clean(base, task):
    return clean_pass(base.model, task)


def repair_of(base, family: str, way: str = "estimate", lossy: bool = True) -> TokenRepair:
    options = {"share": 1 / 16} if family == "E" else {}
    operator = RepairOperator.create(family, base.model.config, runs=2, seed=[0, 1], **options)
    operator.set_joint(joint_of("gpt2"))
    return TokenRepair(base.model, shaken(operator, 0.1), way, lossy)


@pytest.mark.parametrize("family", ["D", "E"])
def test_what_is_measured_is_what_the_model_says_behind_the_repaired_cache(family, base, task, clean):
    repair = repair_of(base, family)
    quantiser = KVQuantiser.calibrated(QuantiserConfig(2), clean.k, clean.v, runs=2)
    storages = {"KIVI": quantised("KIVI", quantiser), "E": quantised("E", quantiser, repair), "16 bits": full(base)}
    rows = quantised_scores(base, task, clean, storages, feeling).set_index(["storage", "seed"])
    kept = repair.write(CachedTokens.behind_padding(clean.k, clean.v, task.prefix_ids, task.prefix_mask))
    k, v = (x.flatten(0, 1) for x in quantiser(*(x.unflatten(0, (2, -1)) for x in (clean.k, clean.v))))
    read = repair.read(CachedTokens.behind_padding(k, v, task.prefix_ids, task.prefix_mask), kept)
    assert not torch.equal(read.k, k)

    def decoded(keys, values):
        with torch.no_grad():
            cache = unstack_cache(keys, values)
            return base.model(task.continuation_ids, past_key_values=cache, output_hidden_states=True)

    student, teacher = decoded(read.k, read.v), decoded(clean.k, clean.v)
    gap = (feeling(student.hidden_states[-1]) - feeling(teacher.hidden_states[-1]))[..., 0].abs().mean(1)
    kl = kd_per_token(teacher.logits, student.logits, 1.0)
    kl = (kl * task.target_mask).sum(1) / task.target_mask.sum(1)
    expected = {"nll": score(task, student.logits)["nll"], "kl": kl.numpy(), "valence_gap": gap.numpy()}
    for name, values in expected.items():
        by_seed = pd.Series(values).groupby(task.seeds.numpy()).mean()
        assert rows.loc["E"][name].tolist() == pytest.approx(by_seed.tolist(), rel=1e-3, abs=1e-6)
    more = rows.loc["E", "bytes_per_token"] - rows.loc["KIVI", "bytes_per_token"]
    assert more.tolist() == [repair.operator.bytes_per_token] * 2
    assert rows.loc["16 bits", ["kl", "valence_gap"]].to_numpy() == pytest.approx(0, abs=1e-6)
    assert (rows.loc["16 bits", "nll"] == rows.loc["16 bits", "nll_clean"]).all()


def test_fixed_ranges_are_those_of_the_channels(base, clean):
    storage = fixed_ranges("fixed", 2, clean.k)
    keys, values = storage.read(clean.k, clean.v)
    low, high = clean.k.amin((0, 3), keepdim=True), clean.k.amax((0, 3), keepdim=True)
    levels = low[..., None] + (high - low)[..., None] * torch.arange(4) / 3
    nearest = (clean.k[..., None] - levels).abs().amin(-1)
    torch.testing.assert_close((keys - clean.k).abs(), nearest, rtol=1e-3, atol=1e-5)
    assert (storage.read(10 * clean.k, clean.v)[0].amax((0, 3)) <= high[0, :, :, 0] + 1e-5).all()
    plain = KVQuantiser.calibrated(QuantiserConfig(2), clean.k, clean.v)
    assert torch.equal(values, plain(clean.k[None], clean.v[None])[1][0])
    assert storage.stored < plain.bits_per_token()  # ranges of keys are not stored


def test_a_code_alone_reads_nothing_of_the_cache(base, task, clean):
    repair = repair_of(base, "E", "restore", lossy=False)
    storages = {"code": code_alone("code", repair)}
    rows = quantised_scores(base, task, clean, storages, feeling)
    whole = replace(storages["code"], read=lambda keys, values: (keys + 1, values - 1))
    again = quantised_scores(base, task, clean, {"code": whole}, feeling)
    assert rows["kl"].tolist() == pytest.approx(again["kl"].tolist(), rel=1e-4)
    assert (rows["kl"] > 1e-4).all()
    stored = repair.operator.bytes_per_token + repair.cache_bytes / 10  # ten cached tokens share the first four
    assert rows["bytes_per_token"].tolist() == [stored] * 2


def test_repaired_caches_have_the_bytes_of_kivi_in_groups_half_as_long():
    bits, group = REPAIRED
    clean = torch.zeros(1, 12, 4, 1, 32)
    whole = 2 * 2 * 12 * 4 * 32  # bytes of a token in bf16
    stored, rival = (
        KVQuantiser.calibrated(QuantiserConfig(bits, g), clean, clean).bits_per_token() / 8 for g in (group, group // 2)
    )
    assert stored + SHARE * whole == rival


def rows_of(method: str, kl: list[float], stored: float = 960.0) -> pd.DataFrame:
    told = {"storage": method, "method": method, "bits": 2, "group": 64, "bytes_per_token": stored, "seed": range(3)}
    scores = {"nll": [x + 2 for x in kl], "nll_clean": 2.0, "kl": kl, "valence_gap": 0.01, "n_examples": 4}
    return pd.DataFrame(told | scores)


def test_methods_are_paired_with_those_of_the_same_bytes():
    parts = [
        rows_of("KIVI", [0.3, 0.4, 0.6]),
        rows_of("learned steps", [0.2, 0.3, 0.5]),
        rows_of("KIVI", [1, 1, 1], 864),
    ]
    rows = pd.concat([*parts, rows_of("learned steps, valence", [0.1, 0.2, 0.4])], ignore_index=True)
    found = paired(rows).set_index(["method", "against"])
    assert set(found.index) == {
        ("learned steps", "KIVI"), ("learned steps, valence", "KIVI"), ("learned steps, valence", "learned steps")
    }  # fmt: skip
    row = found.loc["learned steps", "KIVI"]
    assert row[["kl", "kl_low", "kl_high", "lost"]].tolist() == pytest.approx([0.1] * 4)  # paired: no spread
    assert summary(rows).set_index(["storage", "bytes_per_token"]).loc[("KIVI", 864.0), "kl"] == 1
