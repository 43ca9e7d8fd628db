"""Operators that ship are found by name."""

import shutil

import pytest
import torch

from cachemedic import RepairOperator, load_base
from cachemedic.repair.shipped import FOLDER, made_folder, shipped_operators


@pytest.mark.parametrize("name", shipped_operators())
def test_a_shipped_operator_fits_the_base_that_it_is_named_after(name):
    family, base = name.split("/")
    operator = RepairOperator.from_pretrained(name)
    assert operator.family == family
    assert operator.runs == 1
    operator.check_model(load_base(base).model.config)


def test_every_family_ships_for_both_bases():
    bases = ("embedded-gpt2", "embedded-llama")
    assert {f"{family}/{base}" for family in "ABCDE" for base in bases} <= set(shipped_operators())


def test_an_unknown_name_is_told_with_the_nearest_one():
    with pytest.raises(ValueError, match="unknown operator 'E/embeded-gpt2': did you mean 'E/embedded-gpt2'"):
        RepairOperator.from_pretrained("E/embeded-gpt2")


def test_a_path_that_does_not_exist_is_told_as_such(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        RepairOperator.from_pretrained(tmp_path / "nowhere")


def test_an_operator_that_this_machine_has_not_made_says_how(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHEMEDIC_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="ship_operators smollm2-135m"):
        RepairOperator.from_pretrained("E/smollm2-135m")
    made = RepairOperator.create("A", load_base("embedded-gpt2").model.config, layers=[0])
    made.save_pretrained(made_folder("E/smollm2-135m"))
    assert RepairOperator.from_pretrained("E/smollm2-135m").family == "A"


COMMIT = 40 * "a"


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Where this machine keeps the repository lab/medic of the hub, which is out of reach."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--lab--medic"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    return repository / "snapshots" / COMMIT


@pytest.mark.parametrize("family", ["A", "E"])
def test_an_operator_of_the_hub_is_the_one_that_was_saved(family, kept):
    shipped = RepairOperator.from_pretrained(f"{family}/embedded-llama")
    shipped.save_pretrained(kept)
    found = RepairOperator.from_pretrained("lab/medic")
    assert found.config == shipped.config
    assert all(map(torch.equal, found.parameters(), shipped.parameters()))


def test_a_folder_that_exists_comes_before_the_hub(kept, tmp_path, monkeypatch):
    RepairOperator.from_pretrained("A/embedded-llama").save_pretrained(kept)
    RepairOperator.from_pretrained("B/embedded-llama").save_pretrained(tmp_path / "lab/medic")
    monkeypatch.chdir(tmp_path)
    assert RepairOperator.from_pretrained("lab/medic").family == "B"


def test_an_operator_of_the_hub_is_checked(kept):
    shutil.copytree(FOLDER / "A/embedded-llama", kept)
    weights = bytearray((kept / "operator.safetensors").read_bytes())
    weights[-1] ^= 1
    (kept / "operator.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match="is damaged or not of this config.json"):
        RepairOperator.from_pretrained("lab/medic")
    (kept / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="'lab/medic' on the Hugging Face hub holds no operator that can be read"):
        RepairOperator.from_pretrained("lab/medic")


def test_only_json_and_safetensors_are_fetched(kept, monkeypatch):
    asked = []

    def snapshot(name, revision=None, allow_patterns=None):
        asked.append((name, revision, allow_patterns))
        RepairOperator.from_pretrained("A/embedded-llama").save_pretrained(kept)
        return str(kept)

    monkeypatch.setattr("cachemedic.repair.shipped.why_out_of_reach", lambda name: None)
    monkeypatch.setattr("cachemedic.repair.shipped.snapshot_download", snapshot)
    assert RepairOperator.from_pretrained("lab/medic").family == "A"
    assert asked == [
        ("lab/medic", None, ["config.json"]),
        ("lab/medic", COMMIT, ["*.json", "*.safetensors"]),
    ]


def test_what_is_not_kept_is_refused_at_once_where_the_hub_is_out_of_reach(kept, monkeypatch):
    monkeypatch.setattr("cachemedic.repair.shipped.snapshot_download", lambda *_, **__: pytest.fail("was asked"))
    with pytest.raises(ValueError, match="unknown operator 'lab/other': no folder, none that ships, and not kept"):
        RepairOperator.from_pretrained("lab/other")
    with pytest.raises(ValueError, match="unknown operator 'E/gpt2-medium': .*allowed: 'A/embedded-gpt2'"):
        RepairOperator.from_pretrained("E/gpt2-medium")
