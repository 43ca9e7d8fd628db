"""The public names of the package."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import cachemedic
from imports import Modules

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", cachemedic.__all__)
def test_public_names_lead_to_their_modules(name: str) -> None:
    value = getattr(cachemedic, name)
    assert value.__name__ == name
    assert value.__doc__
    home = ROOT / Path(*value.__module__.split(".")).with_suffix(".py")
    used = Modules(ROOT / "cachemedic").used_by(f"from cachemedic import {name}", "a notebook")
    assert home in used, "a notebook that uses the name must be run again when its module changes"


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ImportError, match="protekt"):
        from cachemedic import protekt  # noqa: F401


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, cachemedic; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cachemedic.__version__ == project["version"]
