"""Whole numbers of any kind are plain ones afterwards; what is none, or out of range, is said at once."""

import itertools

import numpy as np
import pytest
import torch

from cachemedic.core.integers import LONGEST, seed_number, whole_number, whole_numbers


@pytest.mark.parametrize("value", [3, np.int8(3), np.uint64(3), np.array(3), torch.tensor(3)])
def test_integers_of_any_kind_are_taken(value):
    found = whole_number("rank", value)
    assert (found, type(found)) == (3, int)


@pytest.mark.parametrize("value", [True, 3.0, "3", None, [3], np.float32(3), torch.tensor(3.0), 1j])
def test_what_is_no_integer_is_refused(value):
    with pytest.raises(TypeError, match="rank must be a whole number, not"):
        whole_number("rank", value)


def test_limits_are_named():
    with pytest.raises(ValueError, match="rank must be from 1 to 8, not 9"):
        whole_number("rank", 9, 1, 8)
    with pytest.raises(ValueError, match="rank must be 1 or more, not 0"):
        whole_number("rank", 0, 1)
    with pytest.raises(ValueError, match="seed must be from 0 to 18446744073709551615, not -1"):
        seed_number(-1)


@pytest.mark.parametrize("values", [range(2**70), itertools.count(), np.arange(LONGEST + 1)])
def test_lists_without_end_are_refused(values):
    with pytest.raises(ValueError, match=f"layers holds more than {LONGEST} numbers"):
        whole_numbers("layers", values)
