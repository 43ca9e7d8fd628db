"""What may import what: the contract in pyproject.toml, and no circle between modules."""

import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]
ROOMS = "core models data corruption defenses repair token training evaluation studies".split()


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
    listed = (folder / "__init__.py").read_text()
    for module in folder.glob("[a-z]*.py"):
        assert module.stem in listed, f"cachemedic/{room}/__init__.py does not list {module.stem}"
