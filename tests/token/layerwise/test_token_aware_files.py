"""Operators of families D and E on disk, and what is refused before any work."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from small_models import model_of, shaken
from tiny_repair import base_of, calibrated, case, random_ids
from tiny_training import parameters

from cachemedic.core.files import read_sealed, seal
from cachemedic.defenses.defense import CachedTokens
from cachemedic.models.load import load_base
from cachemedic.repair.operator import RepairOperator
from cachemedic.token.layerwise.calibration import calibrate, vectors_of
from cachemedic.token.layerwise.operator import TokenAware
from cachemedic.token.layerwise.scrub import Scrubber, positions_of
from cachemedic.token.layerwise.statistics_files import shipped_transform

GPT2 = base_of("gpt2").model.config


def repaired(operator: TokenAware) -> list[torch.Tensor]:
    c = case("gpt2")
    scrubber = Scrubber(base_of("gpt2").model, operator)
    codes = scrubber.write(CachedTokens.behind_padding(c.k, c.v, c.ids, c.valid))
    return list(scrubber.scrub(*c.damaged(c.valid), c.ids, positions_of(c.valid), codes)[:2])


@pytest.mark.parametrize("family", ["layerwise-D", "layerwise-E"])
def test_a_calibrated_operator_survives_its_files(family, tmp_path):
    operator = shaken(calibrated("gpt2", family, runs=2, per_layer=True, layers=(0, 2)), 0.05)
    operator.save_pretrained(tmp_path)
    loaded = RepairOperator.from_pretrained(tmp_path)
    assert type(loaded) is type(operator)
    assert loaded.config == operator.config
    torch.testing.assert_close(parameters(loaded), parameters(operator), rtol=0, atol=0)
    assert loaded.transform.digest == operator.transform.digest
    assert (tmp_path / "transform.safetensors").exists()
    assert (loaded.code is None) == (family == "layerwise-D")
    for before, after in zip(repaired(operator), repaired(loaded), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("family", ["layerwise-D", "layerwise-E"])
def test_an_operator_that_was_never_calibrated_stays_so(family, tmp_path):
    RepairOperator.create(family, GPT2, (0, 1)).save_pretrained(tmp_path)
    loaded = RepairOperator.from_pretrained(tmp_path)
    assert loaded.transform is None
    assert loaded.code is None
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "operator.safetensors"]
    with pytest.raises(ValueError, match="knows no clean tokens yet: give it to `calibrate`"):
        Scrubber(base_of("gpt2").model, loaded)


def test_a_transform_that_ships_is_named_and_not_copied(tmp_path):
    base = load_base("embedded-llama")
    ids = torch.randint(1, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    operator = RepairOperator.create("layerwise-E", base.model.config, layers=range(12))
    calibrate(operator, base, vectors_of(base, ids)).save_pretrained(tmp_path)
    assert not (tmp_path / "transform.safetensors").exists()
    assert json.loads((tmp_path / "statistics.json").read_text())["of"] == "embedded-llama"
    loaded = RepairOperator.from_pretrained(tmp_path)
    assert loaded.transform.digest == shipped_transform("embedded-llama").digest
    assert torch.equal(loaded.code.bits, operator.code.bits)
    assert torch.equal(loaded.code.spread, operator.code.spread)
    part = RepairOperator.create("layerwise-D", base.model.config, layers=[3, 4])
    with pytest.raises(ValueError, match="a transform of 12 layers and 128 numbers .* 2 layers and 128"):
        part.hold(loaded.transform)


@pytest.mark.parametrize("family", ["layerwise-D", "layerwise-E"])
def test_an_operator_is_not_loaded_with_statistics_of_another(family, tmp_path):
    calibrated("gpt2", "layerwise-E").save_pretrained(tmp_path)
    RepairOperator.create(family, GPT2, (0, 1), seed=5).save_pretrained(tmp_path)
    assert RepairOperator.from_pretrained(tmp_path).transform is None
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "operator.safetensors"]

    calibrated("gpt2", "layerwise-E").save_pretrained(tmp_path)
    stray = (tmp_path / "statistics.json").read_bytes()
    operator = (
        calibrated("gpt2", family, projection="random") if family == "layerwise-E" else calibrated("gpt2", family)
    )
    operator.save_pretrained(tmp_path)
    (tmp_path / "statistics.json").write_bytes(stray)
    with pytest.raises(ValueError, match="not those that the operator was saved with"):
        RepairOperator.from_pretrained(tmp_path)
    (tmp_path / "statistics.json").unlink()
    with pytest.raises(ValueError, match="statistics in .* are damaged"):
        RepairOperator.from_pretrained(tmp_path)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("call", ["write_bytes", "replace"])
def test_an_interrupted_save_leaves_the_old_operator_or_none(tmp_path, monkeypatch, before, call):
    """Interrupted at every write and every rename of a file."""
    old, new = calibrated("gpt2", "layerwise-E"), calibrated("gpt2", "layerwise-E", projection="random", seed=1)
    owner = Path if call == "write_bytes" else os
    real = getattr(owner, call)
    for allowed in range(5):
        folder = tmp_path / str(allowed)
        if before:
            old.save_pretrained(folder)
        calls: list[object] = []

        def interrupted(*args, allowed=allowed, calls=calls):
            calls.append(args)
            if len(calls) > allowed:
                raise OSError("no space left on device")
            return real(*args)

        monkeypatch.setattr(owner, call, interrupted)
        with pytest.raises(OSError, match="no space"):
            new.save_pretrained(folder)
        monkeypatch.undo()
        if before and call == "write_bytes":
            assert RepairOperator.from_pretrained(folder)._held() == old._held()
        else:
            with pytest.raises(FileNotFoundError, match="no file config.json"):
                RepairOperator.from_pretrained(folder)
        new.save_pretrained(folder)
        assert RepairOperator.from_pretrained(folder)._held() == new._held()


def test_folders_that_do_not_name_their_statistics_still_load(tmp_path):
    operator = calibrated("gpt2", "layerwise-E")
    operator.save_pretrained(tmp_path)
    unname_statistics(tmp_path)
    assert RepairOperator.from_pretrained(tmp_path)._held() == operator._held()


def unname_statistics(folder: Path) -> None:
    """Makes a folder like those that were written before `config.json` named the statistics."""
    record = read_sealed(folder / "config.json")
    del record["statistics"]
    (folder / "config.json").write_bytes(seal(record))


def test_damaged_statistics_are_refused(tmp_path):
    whole = tmp_path / "whole"
    calibrated("gpt2", "layerwise-E").save_pretrained(whole)
    unname_statistics(whole)  # else the digest tells all damage of `statistics.json`

    def damage(name: str, content: bytes | None) -> None:
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        RepairOperator.from_pretrained(folder)

    record = json.loads((whole / "statistics.json").read_text())
    other = calibrated("gpt2", "layerwise-E", projection="random")
    tampered = bytearray((whole / "code.safetensors").read_bytes())
    tampered[-2] ^= 1  # one bit of a number: still a file of the same shapes
    for name, content, message in (
        ("statistics.json", b"{", "statistics in .* are damaged"),
        ("statistics.json", b"[]", "statistics in .* are damaged"),
        ("statistics.json", b"\xff", "statistics in .* are damaged"),
        ("statistics.json", b"{}", "statistics in .* are damaged"),
        ("statistics.json", json.dumps(record | {"of": "embedded-gpt2"}).encode(), "embedded-gpt2 is not the one"),
        ("code.safetensors", None, "statistics in .* are damaged"),
        ("code.safetensors", (whole / "code.safetensors").read_bytes()[:-8], "code.safetensors is damaged, or not the"),
        ("code.safetensors", (whole / "operator.safetensors").read_bytes(), "code.safetensors is damaged, or not the"),
        ("code.safetensors", tampered, "code.safetensors is damaged, or not the"),
        ("code.safetensors", other.code.to_bytes(), "code.safetensors is damaged, or not the"),
        ("transform.safetensors", None, "statistics in .* are damaged"),
        ("transform.safetensors", b"nothing", "transform.safetensors is damaged"),
        ("transform.safetensors", other.transform.to_bytes(), "transform of .* is not the one"),
    ):
        with pytest.raises(ValueError, match=message):
            damage(name, content)


@pytest.mark.parametrize("family", ["layerwise-D", "layerwise-E"])
def test_operators_that_were_calibrated_apart_do_not_stack(family):
    base = base_of("gpt2")
    new = [RepairOperator.create(family, base.model.config, (0, 1, 2), seed=seed) for seed in range(4)]
    windows = [vectors_of(base, random_ids(6, 40, seed)) for seed in (0, 1)]
    one, same, other = (calibrate(new[i], base, windows[i // 2]) for i in range(3))
    stacked = RepairOperator.stack([one, same])
    assert stacked.runs == 2
    assert stacked.transform.digest == one.transform.digest
    for apart in ([one, same, other], [one, new[3]], [new[3], one]):
        with pytest.raises(ValueError, match="same statistics of clean tokens stack: these were calibrated apart"):
            RepairOperator.stack(apart)
    if family == "layerwise-E":  # of one transform, but another code
        other.hold(one.transform, other.code)
        with pytest.raises(ValueError, match="these were calibrated apart"):
            RepairOperator.stack([one, other])


def test_operators_of_another_model_are_refused():
    operator = calibrated("gpt2", "layerwise-E")
    with pytest.raises(ValueError, match="this operator was made for .*gpt2.* but the model has .*llama"):
        Scrubber(base_of("llama").model, operator)
    with pytest.raises(ValueError, match="this operator was made for .*gpt2.* but the model has .*llama"):
        calibrate(operator, base_of("llama"))
    with pytest.raises(ValueError, match="a transform of 3 layers and 64 numbers a token does not fit .* 32"):
        calibrated("llama", "layerwise-E").hold(operator.transform)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("layerwise-D", {"known_layers": -1}, "known_layers must be 0 or more, not -1"),
        ("layerwise-D", {"coordinates": 0}, "coordinates must be 1 or more, not 0"),
        ("layerwise-D", {"hidden": 0}, "hidden must be 1 or more, not 0"),
        ("layerwise-E", {"window": -2}, "window must be 0 or more, not -2"),
        ("layerwise-E", {"rounds": -1}, "rounds must be 0 or more, not -1"),
        ("layerwise-E", {"share": 1.5}, "share 1.5 is out of range: allowed are 0 to 1"),
        ("layerwise-E", {"share": float("nan")}, "share nan is out of range"),
        (
            "layerwise-E",
            {"projection": "fourier"},
            "projection must be 'principal', 'random' or 'learned', not 'fourier'",
        ),
        ("layerwise-E", {"bits": 0}, "bits 0 is out of range: allowed are 1 to 8, or None"),
        ("layerwise-E", {"apply_to": "K"}, "apply_to must be 'KV', not 'K'"),
        ("layerwise-D", {"share": 0.1}, "unknown option of operator family layerwise-D 'share'"),
        ("layerwise-E", {"windows": 3}, "unknown option .* did you mean 'window'"),
    ],
)
def test_options_out_of_range_are_refused(family, options, message):
    with pytest.raises(ValueError, match=message):
        RepairOperator.create(family, GPT2, (0, 1), **options)


def test_models_that_rotate_in_several_ways_are_refused_by_calibration():
    base = base_of("gpt2")
    model = model_of("gemma3")
    operator = RepairOperator.create("layerwise-D", model.config, (0, 1))
    with pytest.raises(ValueError, match="rotates the keys of its layers in different ways"):
        calibrate(operator, type(base)(model, base.tokenizer, "gemma"), vectors_of(base, torch.ones(2, 40, dtype=int)))
