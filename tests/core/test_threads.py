"""What is kept is computed on one thread, whatever the caller has set."""

from contextlib import suppress

import pytest
import torch

from cachemedic.core.threads import add_up, one_thread, workers


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_it_is_one_within_and_as_many_as_before_behind(threads):
    seen = []
    with suppress(KeyError), one_thread():
        with one_thread():
            pass
        seen.append(torch.get_num_threads())
        raise KeyError
    assert [*seen, torch.get_num_threads()] == [1, threads]


def test_each_task_computes_on_one_and_behind_them_are_as_many_as_before(threads):
    with workers() as pool:
        seen = [*pool.map(lambda _: torch.get_num_threads(), range(20))]
    assert seen == [1] * 20
    assert torch.get_num_threads() == threads


def test_parts_are_added_in_their_order():
    parts = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)).unbind()
    expected = torch.zeros(5)
    for part in parts:
        expected = expected + part
    assert torch.equal(add_up(part.clone() for part in parts), expected)
