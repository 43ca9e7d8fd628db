"""What may import what: the contract in pyproject.toml, and no circle between modules."""

import re
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]
ROOMS = (
    "core models data corruption defenses repair token training training/valence evaluation studies studies/bench "
    "studies/pretraining"
).split()


def test_the_import_contract_holds():
    found = subprocess.run([Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_no_module_imports_itself_through_others():
    graph = grimp.build_graph("cachemedic")
    circles = {
        tuple(sorted((module, other)))
        for module in graph.modules
        for other in graph.find_modules_directly_imported_by(module)
        if graph.chain_exists(importer=other, imported=module)
    }
    assert not circles


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_lists_its_modules(room):
    folder = ROOT / "cachemedic" / room
    _, _, lines = (folder / "__init__.py").read_text().partition("From the bottom up:\n\n")
    listed = re.findall(r"(?m)^([a-z0-9_]+/?(?:, [a-z0-9_]+/?)*) ", lines)
    modules = {module.stem for module in folder.glob("[a-z]*.py")}
    parts = {f"{part.name}/" for part in folder.glob("[a-z]*/")}
    assert sorted(name for names in listed for name in names.split(", ")) == sorted(modules | parts)
