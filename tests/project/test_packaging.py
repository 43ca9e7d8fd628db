"""What an installed copy of the package brings and says of itself."""

import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
import yaml

import cachemedic

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, without the weights, which take long to pack."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    left_out = shutil.ignore_patterns("*.safetensors", "__pycache__")
    shutil.copytree(ROOT / "cachemedic", folder / "cachemedic", ignore=left_out)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "."]
    subprocess.run(build, cwd=folder, check=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_bytes(wheel.read(name))


def test_type_checkers_may_read_the_installed_package(wheel: zipfile.ZipFile, metadata: Message) -> None:
    assert "cachemedic/py.typed" in wheel.namelist()
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])


def test_addresses_are_those_of_the_citation(metadata: Message) -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    addresses = [entry.split(", ")[1] for entry in metadata.get_all("Project-URL", [])]
    assert addresses == [f"https://doi.org/{reference['doi']}" for reference in citation["references"]]
    assert set(metadata["Keywords"].split(",")) == set(citation["keywords"])


def test_the_changes_name_the_version() -> None:
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert headings[0].startswith("## Unreleased")
    assert headings[1].startswith(f"## {cachemedic.__version__}:")
