"""Settings of all tests, and fixtures of those that train."""

import pytest
from hypothesis import settings
from tiny_training import CONFIG, linear_map, ship, tiny_bank, tiny_base

from cachemedic.corruption import severity
from cachemedic.models.load import Base
from cachemedic.token import trust_fit
from cachemedic.training.bank import Bank

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def base() -> Base:
    return tiny_base()


@pytest.fixture(scope="session")
def bank(base, tmp_path_factory) -> Bank:
    return tiny_bank(base, CONFIG.bank, tmp_path_factory.mktemp("bank"))


@pytest.fixture
def _calibrated(monkeypatch, tmp_path):
    """The map that ships is one for tiny bases."""
    ship(linear_map(), monkeypatch, tmp_path)
    yield
    severity.shipped_map.cache_clear()


@pytest.fixture(autouse=True)
def _fitted_briefly(monkeypatch):
    """Trust networks are fitted in few steps and to few faults: no test asks for their best."""
    monkeypatch.setattr(trust_fit, "STEPS", trust_fit.STEPS // 30)
    monkeypatch.setattr(trust_fit, "DRAWS", trust_fit.DRAWS // 4)
