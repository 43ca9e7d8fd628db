"""Bars are widgets where there may be any, and text where make passes it on."""

import importlib

import pytest
import tqdm.auto

from cachemedic.core import progress


@pytest.mark.parametrize("by_make", [True, False])
def test_make_gets_text(by_make: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        if by_make:
            patch.setenv("CACHEMEDIC_RUN", "run.json")
        else:
            patch.delenv("CACHEMEDIC_RUN", raising=False)
        assert importlib.reload(progress).tqdm is (tqdm.tqdm if by_make else tqdm.auto.tqdm)
    importlib.reload(progress)
