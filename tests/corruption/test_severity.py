"""The severity axis: calibration, the map, and what is read off it."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import DOCUMENTS
from tiny_training import AT_FULL_SEVERITY, linear_map

from cachemedic.core.severity_map import GRID, MAP_COLUMNS, SeverityMap
from cachemedic.corruption import severity
from cachemedic.corruption.spec import CorruptionSpec, draw_event
from cachemedic.corruption.types import CORRUPTIONS
from cachemedic.data.task_data import TaskData
from cachemedic.data.tasks import perplexity_task
from cachemedic.defenses.heuristics import NoDefense
from cachemedic.evaluation import severity_calibration
from cachemedic.evaluation.decoding import CleanBank, clean_pass
from cachemedic.evaluation.evaluate import evaluate

SHAPE = (3, 4, 128)
pytestmark = pytest.mark.usefixtures("_calibrated")


@pytest.fixture(scope="module")
def task(base) -> TaskData:
    """Continuations in which the clean model is right, so that its context is worth something."""
    documents = ["".join(DOCUMENTS[i:] + DOCUMENTS[:i]) for i in range(6)]
    task = perplexity_task(base.tokenizer, documents, n=6, prefix=128, scored=8)
    return replace(task, target_ids=clean_pass(base.model, task).logits.argmax(-1))


@pytest.fixture(scope="module")
def clean(base, task) -> CleanBank:
    return clean_pass(base.model, task)


def thousandths(x: float) -> float:
    return math.floor(x * 1000) / 1000


def test_the_value_of_the_context_is_what_erasing_it_costs(base, task, clean):
    value = severity_calibration.context_value(base, task, clean)
    with torch.inference_mode():
        positions = torch.arange(128, 128 + task.continuation_ids.shape[1])
        whole = base.model(torch.cat([task.prefix_ids, task.continuation_ids], 1)).logits[:, 128:]
        without = base.model(task.continuation_ids, position_ids=positions.expand(6, -1)).logits
    for logits, column in ((whole, "nll_clean"), (without, "nll_erased")):
        losses = -logits.log_softmax(-1).gather(-1, task.target_ids[..., None])[..., 0]
        naive = (losses * task.target_mask).sum(1) / task.target_mask.sum(1)
        np.testing.assert_allclose(value[column], naive, rtol=1e-3, atol=1e-3)
    assert value["nll_erased"].mean() > value["nll_clean"].mean()


def test_the_calibrated_parameters_do_the_damage_that_they_stand_for(base, task, clean, monkeypatch):
    coarse = {"gaussian": (0.2, 0.5, 1.0, 2.0, 8.0), "quant_noise": (4, 2, 1), "contiguous_overwrite": (32, 128)}
    for name, parameters in coarse.items():
        monkeypatch.setitem(CORRUPTIONS._entries, name, replace(CORRUPTIONS[name], calibration=parameters))
    curves, rows = severity_calibration.calibrate_severities(base, task, clean, tuple(coarse))
    assert list(rows.columns) == MAP_COLUMNS
    assert set(rows["type"]) == set(coarse)
    assert (rows["base"] == base.name).all()
    assert (rows[["layers", "heads"]] == [3, 4]).all(axis=None)
    assert len(curves) == 5 + 3 * len(severity_calibration.SHARES) + 2
    worth = severity_calibration.context_value(base, task, clean)
    worth = (worth["nll_erased"] - worth["nll_clean"]).mean()
    whole = curves[curves["share"] == 1.0]
    for kind, curve in whole.groupby("type"):
        reach = rows[rows["type"] == kind]["reach"]
        assert (reach == min(thousandths(curve["damage"].max()), 1.0)).all()
    for row in whole.itertuples():  # each entry of a curve is an evaluation of its own
        spec = CorruptionSpec(row.type, parameter=row.parameter)
        scores = evaluate(base.model, task, clean, spec, {"none": NoDefense()})
        assert row.damage == pytest.approx((scores["nll"] - scores["nll_clean"]).mean() / worth)


@settings(max_examples=40)
@given(st.lists(st.floats(-0.1, 0.4), min_size=11, max_size=11))
def test_the_map_inverts_the_damage_curve(increments):
    """Whatever the curve, the damage interpolated at a mapped parameter is the severity that it is mapped from."""
    damage, parameters = np.cumsum(increments), CORRUPTIONS["gaussian"].calibration
    curve = pd.DataFrame({"type": "gaussian", "parameter": parameters, "share": 1.0, "damage": damage})
    clean = CleanBank(torch.empty(1, 3, 4, 128, 8), torch.empty(1, 3, 4, 128, 8), torch.empty(1, 1, 1))
    worth = pd.DataFrame({"nll_clean": [1.0], "nll_erased": [2.0]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(severity_calibration, "context_value", lambda *_: worth)
        patch.setattr(severity_calibration, "damage_curve", lambda *_: curve)
        _, rows = severity_calibration.calibrate_severities(Named("x"), None, clean, ["gaussian"])
    most = np.maximum.accumulate(damage.clip(0))
    reach = min(thousandths(most[-1]), 1.0)
    assert (rows["reach"] == reach).all()
    expected = [s for s in GRID if s <= reach]
    if reach < 1 and reach > max(expected, default=0):
        expected.append(reach)
    assert rows["severity"].tolist() == expected
    back = np.interp(rows["parameter"].astype(float), [0, *parameters], [0, *most])
    np.testing.assert_allclose(back, rows["severity"].astype(float), atol=1e-3)


class Named:
    """A base of which only the name is asked."""

    def __init__(self, name: str) -> None:
        self.name = name


def test_bits_reach_a_severity_by_the_share_of_positions(monkeypatch):
    shares, damage = np.tile([0.25, 0.5, 0.75, 1.0], 2), [0.02, 0.05, 0.1, 0.2, 0.2, 0.4, 0.7, 1.2]
    curve = pd.DataFrame({"type": "quant_noise", "parameter": np.repeat([2, 1], 4), "share": shares, "damage": damage})
    clean = CleanBank(torch.empty(1, 3, 4, 128, 8), torch.empty(1, 3, 4, 128, 8), torch.empty(1, 1, 1))
    worth = pd.DataFrame({"nll_clean": [1.0], "nll_erased": [2.0]})
    monkeypatch.setattr(severity_calibration, "context_value", lambda *_: worth)
    monkeypatch.setattr(severity_calibration, "damage_curve", lambda *_: curve)
    _, rows = severity_calibration.calibrate_severities(Named("x"), None, clean, ["quant_noise"])
    assert rows["severity"].tolist() == [0.1, 0.25, 0.5, 1.0]
    assert rows["parameter"].tolist() == [2, 1, 1, 1]
    np.testing.assert_allclose(rows["share"], [0.75, 0.3125, 0.5 + 0.25 / 3, 0.9], rtol=1e-6)


def test_a_prefix_of_another_length_is_refused(base, task, clean):
    short = CleanBank(clean.k[:, :, :, :64], clean.v[:, :, :, :64], clean.logits)
    with pytest.raises(ValueError, match="prefixes of 128 tokens, not of 64"):
        severity_calibration.calibrate_severities(base, task, short)


def test_a_base_that_ignores_its_context_is_refused(base, task, clean, monkeypatch):
    equal = pd.DataFrame({"nll_clean": [2.0], "nll_erased": [2.0]})
    monkeypatch.setattr(severity_calibration, "context_value", lambda *_: equal)
    with pytest.raises(ValueError, match="worth 0.000 nats to tiny-gpt2: nothing can be damaged"):
        severity_calibration.calibrate_severities(base, task, clean)


# --- the map ----------------------------------------------------------------------------------------------------------

MAP = SeverityMap(linear_map())


def resolve(kind: str, wanted: float, base: str | None = "tiny", calibrated: SeverityMap = MAP) -> tuple[float, float]:
    return calibrated.resolve(kind, wanted, base, SHAPE, kind == "quant_noise")


@settings(max_examples=40)
@given(st.sampled_from(sorted(AT_FULL_SEVERITY)), st.floats(0.001, 1.0))
def test_between_its_rows_the_map_is_linear(kind, wanted):
    """The map of these tests is linear itself, so that interpolation must give it back."""
    full = AT_FULL_SEVERITY[kind]
    expected = (full, wanted) if kind == "quant_noise" else (full * wanted, 1.0)
    assert resolve(kind, wanted) == pytest.approx(expected)


def test_the_base_is_known_by_the_shape_of_its_cache():
    assert resolve("gaussian", 0.5, None) == resolve("gaussian", 0.5, "tiny")


def test_a_specification_is_drawn_by_its_own_map_or_by_the_one_that_ships():
    rows = linear_map()
    half = SeverityMap(rows.assign(parameter=rows["parameter"] / 2))
    for calibrated, share in ((None, 1.0), (half, 0.5)):
        spec = CorruptionSpec("gaussian", severity=0.5, severity_map=calibrated)
        event = draw_event(spec, SHAPE, torch.Generator().manual_seed(0))
        assert event.parameter == share * 0.5 * AT_FULL_SEVERITY["gaussian"]


def test_a_severity_beyond_the_reach_is_refused():
    rows = linear_map()
    calibrated = SeverityMap(rows[rows["severity"] <= 0.5].assign(reach=0.5))
    assert calibrated.reach("gaussian", "tiny", SHAPE) == 0.5
    for wanted in (0.51, 1.0):
        with pytest.raises(ValueError, match=rf"severity {wanted} of gaussian is out of range: from 0 to 0.5"):
            resolve("gaussian", wanted, calibrated=calibrated)


def test_a_type_without_rows_reaches_nothing():
    rows = linear_map()
    calibrated = SeverityMap(rows[rows["type"] != "gaussian"])
    assert calibrated.reach("gaussian", "tiny", SHAPE) == 0
    with pytest.raises(ValueError, match="the severity of gaussian is not calibrated on this base.*give parameter="):
        resolve("gaussian", 0.1, calibrated=calibrated)


@pytest.mark.parametrize(
    ("base", "shape", "message"),
    [
        ("gpt2-medium", SHAPE, "not calibrated for base 'gpt2-medium'; .* one of tiny"),
        (None, (24, 16, 128), "no single calibrated base has 24 layers and 16 key/value heads"),
    ],
)
def test_what_is_not_calibrated_is_refused(base, shape, message):
    with pytest.raises(ValueError, match=message):
        MAP.resolve("gaussian", 0.5, base, shape, False)


def test_two_bases_of_one_shape_must_be_named():
    two = SeverityMap(pd.concat([linear_map(), linear_map("other")]))
    with pytest.raises(ValueError, match="no single calibrated base .* tiny, other"):
        two.reach("gaussian", None, SHAPE)
    assert two.reach("gaussian", "other", SHAPE) == 1.0


def test_writing_replaces_the_rows_of_the_bases_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(severity, "MAP", tmp_path / "map.csv")
    severity.write_map(pd.concat([linear_map("a"), linear_map("b", layers=5)]))
    changed = linear_map("a").assign(parameter=0.5)
    severity.write_map(changed)
    written = severity.shipped_map().rows
    assert len(written) == 2 * len(changed)
    assert (written[written["base"] == "a"]["parameter"] == 0.5).all()
    assert resolve("gaussian", 1.0, "a", severity.shipped_map())[0] == 0.5
    assert resolve("gaussian", 1.0, "b", severity.shipped_map())[0] == AT_FULL_SEVERITY["gaussian"]
    assert {file.name for file in tmp_path.iterdir()} == {"map.csv", "severity_map.csv"}  # the latter of the fixture


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda rows: rows.drop(columns="share"), "share are missing"),
        (lambda rows: rows[rows["severity"] < 1], "has no row for severity 1 of .* on tiny"),
        (lambda rows: rows[rows["severity"] != 0.25], "has no row for severity 0.25"),
        (lambda rows: pd.concat([rows, rows.iloc[:1]]), "do not belong together"),
        (lambda rows: rows.assign(share=[None, *rows["share"][1:]]), "row tiny, 3, 4, .* is damaged"),
        (lambda rows: rows.assign(parameter=["x", *rows["parameter"][1:]]), "row tiny, 3, 4, .* is damaged"),
        (lambda rows: rows.assign(layers=["x", *rows["layers"][1:]]), "row tiny, x, 4, .* is damaged"),
        (lambda rows: rows.assign(severity=["x", *rows["severity"][1:]]), "row tiny, 3, 4, .* is damaged"),
        (lambda rows: rows.assign(type=[None, *rows["type"][1:]]), "row tiny, 3, 4, .* is damaged"),
        (lambda rows: rows.assign(type=["gausian", *rows["type"][1:]]), "has no row for severity .* of gaus"),
        (lambda rows: rows.assign(reach=[2.0, *rows["reach"][1:]]), "is damaged"),
        (lambda rows: rows.iloc[:0], "holds no row"),
    ],
)
def test_a_map_that_is_cut_or_damaged_is_refused(spoil, message):
    with pytest.raises(ValueError, match=message):
        SeverityMap(spoil(linear_map()))


def test_numbers_that_were_read_as_text_are_numbers():
    maps = SeverityMap(linear_map()), SeverityMap(linear_map().astype(str))
    resolved = [[resolve("gaussian", s, calibrated=given) for s in (0.05, 0.3, 0.9)] for given in maps]
    assert resolved[0] == resolved[1]


@pytest.mark.parametrize("rows", [None, [1], "map.csv", {}])
def test_what_is_no_table_is_refused(rows):
    with pytest.raises(TypeError, match="the rows of a severity map must be a DataFrame, not a"):
        SeverityMap(rows)


def test_the_order_of_rows_does_not_matter():
    maps = SeverityMap(linear_map()), SeverityMap(linear_map().iloc[::-1])
    resolved = [[resolve("gaussian", s, calibrated=given) for s in (0.05, 0.3, 0.9)] for given in maps]
    assert resolved[0] == resolved[1]


def test_a_shipped_map_that_is_cut_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(severity, "MAP", tmp_path / "map.csv")
    severity.shipped_map.cache_clear()
    with pytest.raises(ValueError, match="map.csv is missing or damaged"):
        severity.shipped_map()
    severity.write_map(linear_map())
    whole = severity.MAP.read_bytes()
    lines = whole.splitlines(keepends=True)
    flipped = whole.replace(b"gaussian,0.25,0.", b"gaussian,0.25,1.")
    assert flipped != whole
    without_a_base = b"".join(lines[:2])  # which the rows that are left cannot tell
    for damaged in (b"".join(lines[:-1]), whole[:-9], flipped, without_a_base, b""):
        severity.MAP.write_bytes(damaged)
        severity.shipped_map.cache_clear()
        with pytest.raises(ValueError, match="map.csv is missing or damaged"):
            severity.shipped_map()
    with pytest.raises(ValueError, match="map.csv is missing or damaged"):
        severity.write_map(linear_map("other"))
