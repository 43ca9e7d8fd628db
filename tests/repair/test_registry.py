"""Families by name: registered from a notebook cell, refused where a name is taken."""

import pytest
import torch
from small_models import model_of

from cachemedic import RepairOperator, protect
from cachemedic.repair.folded import FoldedOperator, QueryGatedAdditive
from cachemedic.repair.registry import family_class, family_names, register_family


def test_all_families_are_known_by_name():
    assert {"A", "B", "C", "D", "E"} <= set(family_names())
    assert family_class("A") is QueryGatedAdditive


def test_a_family_of_a_notebook_works_like_those_of_the_package(tmp_path):
    @register_family("half open")
    class HalfOpen(QueryGatedAdditive):
        pass

    model = model_of("llama")
    operator = RepairOperator.create("half open", model.config, layers=[1], rank=2)
    ids = torch.arange(1, 7)[None]
    plain = model(ids).logits
    with protect(model, operator):
        assert torch.allclose(model(ids).logits, plain, atol=1e-5)
    operator.save_pretrained(tmp_path)
    assert type(RepairOperator.from_pretrained(tmp_path)) is HalfOpen


def test_a_cell_that_is_run_again_replaces_its_class():
    def cell():
        @register_family("again")
        class Again(QueryGatedAdditive):
            pass

        return Again

    first, second = cell(), cell()
    assert first is not second
    assert family_class("again") is second


def test_the_name_of_another_class_is_refused():
    with pytest.raises(ValueError, match="operator family 'A' is cachemedic.repair.folded:QueryGatedAdditive already"):
        register_family("A")(FoldedOperator)


def test_an_unknown_name_is_told_with_those_that_exist():
    with pytest.raises(ValueError, match="unknown operator family 'AA': did you mean 'A'"):
        family_class("AA")
