"""The operators that ship are those that the studies measure."""

import torch

from cachemedic import RepairOperator, load_base
from cachemedic.studies.ship_operators import trained_operators


def test_what_ships_is_the_first_seed_of_the_studies():
    for operator in trained_operators(load_base("embedded-llama")):
        shipped = RepairOperator.from_pretrained(f"{operator.family}/embedded-llama")
        expected, found = dict(operator.named_parameters()), dict(shipped.named_parameters())
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
