"""Values of parameters that make takes are checked as a whole, before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from parameters import check

ACCEPTED = "SEEDS=[0]|SEEDS=[4, 2]|DEVICE=cpu|BASE=embedded-llama|FAMILY=E|OBJECTIVE=valence|TEXT=wikitext2"


@pytest.mark.parametrize("given", ACCEPTED.split("|"))
def test_what_a_notebook_can_take_is_accepted(given: str) -> None:
    check(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("SEEDS=0,1", "seeds must be a list of whole numbers, such as \\[0, 1\\], not '0,1'"),
        ("SEEDS=3", "seeds must be a list of whole numbers"),
        ('SEEDS=["a"]', "must be a whole number, not 'a'"),
        ("SEEDS=[0.5]", "must be a whole number, not 0.5"),
        ("SEEDS=[0,0]", "seeds must be distinct whole numbers from 0 upwards"),
        ("SEEDS=[-1]", "seeds must be distinct whole numbers from 0 upwards"),
        ("SEEDS=[]", "seeds must be distinct whole numbers from 0 upwards"),
        ("BASE=embeded-gpt2", "unknown base 'embeded-gpt2': did you mean 'embedded-gpt2'?"),
        ("BASE=no/such/folder", "unknown base 'no/such/folder'"),
        ("FAMILY=Z", "unknown operator family 'Z'"),
        ("FAMILY=3", "unknown operator family '3'"),
        ("OBJECTIVE=valance", "unknown objective 'valance': did you mean 'valence'?"),
        ("DEVICE=cuba", "unknown device 'cuba'"),
        ("TEXT=wikitext", "unknown text 'wikitext': did you mean 'wikitext2'?"),
        ("SEED=[0]", "unknown parameter 'SEED': did you mean 'SEEDS'?"),
    ],
)
def test_what_it_cannot_take_is_named_with_what_is_allowed(given: str, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        check(given)


def test_a_folder_of_text_needs_its_splits(tmp_path: Path) -> None:
    for name in ("train.txt", "valid.txt", "train.tsv", "dev.tsv"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="holds no test split; expected one of test.txt, test.txt.xz"):
        check(f"TEXT={tmp_path}")
    check(f"REVIEWS={tmp_path}")
    (tmp_path / "test.txt").touch()
    check(f"TEXT={tmp_path}")
