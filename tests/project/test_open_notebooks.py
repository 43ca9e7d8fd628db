"""The notebooks that make no results run, and the playground answers its widgets."""

from __future__ import annotations

import json
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from toy_project import ROOT

CHANGES = """\
import json
shown = [page.value]
for name, value in [("method", "leave"), ("damage", "gaussian"), ("share", 0.2), ("severity", 0.0)]:
    controls[name].value = value
    shown.append(page.value)
controls["damage"].value, controls["severity"].value = "contiguous_overwrite", 1.0
print(json.dumps([*shown, page.value]))
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    """Executes a committed notebook with a cell of the test's own at its end; returns what that cell printed."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=":")
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")

    def execute(name: str, code: str) -> Any:
        notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        notebook.cells.append(nbformat.v4.new_code_cell(code))
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
        outputs = notebook.cells[-1]["outputs"]
        return json.loads("".join(output["text"] for output in outputs if output.get("name") == "stdout"))

    return execute


def test_the_playground_shows_what_its_widgets_say(run) -> None:
    repaired, left, gaussian, few, none, refused = run("playground", CHANGES)
    assert repaired != left != gaussian != few != none
    assert repaired.count("lantern") > left.count("lantern"), "the damaged text lost what the repaired text has"
    assert gaussian.count("underline") > few.count("underline") > 0 == none.count("underline")
    assert "out of range" in refused


USES = """\
import json
means = scores.groupby("reader")["kl"].mean()
print(json.dumps([same, bool(damaged.layers[0].keys.ne(clean.k[:, 0]).any()), means.to_dict()]))
"""


def test_what_a_cell_adds_is_used_by_its_name(run) -> None:
    same, changed, kl = run("extend", USES)
    assert same
    assert changed
    assert set(kl) == {"none", "clip_renormalise", "channel_mean"}
    assert kl["channel_mean"] < kl["none"]
