"""What is kept is computed on one thread, whatever the caller has set."""

from contextlib import suppress

import pytest
import torch

from cachemedic.core.threads import one_thread


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
