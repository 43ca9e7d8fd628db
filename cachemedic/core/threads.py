"""How many threads compute what is kept: one for each sum, so that it does not depend on the machine or the caller."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

WORKERS = 4  # at most: each holds what its task works on


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, also as a decorator, torch computes on one thread: more of them add sums up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def workers() -> Iterator[ThreadPoolExecutor]:
    """Threads for tasks side by side, each of which computes on one: what a task gives is the same however many.

    So is the whole, if its parts do not depend on their number either. A task must not wait for another.
    """
    count = min(os.cpu_count() or 1, WORKERS)
    with one_thread(), ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool


def add_up(parts: Iterable[Tensor]) -> Tensor:
    """The sum of parts in their order, each of which is given up for it."""
    total = torch.zeros(())
    for part in parts:
        total = part.add_(total)
    return total


def give_back() -> None:
    """Returns memory that is free again to the system: on Linux each thread keeps its own, up to a gigabyte of it."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # musl has none
        trim(0)
