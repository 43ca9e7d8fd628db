"""The code of README.md runs as it stands there."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import DOCUMENTS
from tiny_training import tiny_base

from cachemedic.data import tasks
from cachemedic.evaluation.decoding import clean_pass

TEXT = (Path(__file__).parents[2] / "README.md").read_text()
FIRST, OWN_MODEL = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_the_first_example_damages_an_answer_and_repairs_it(capsys: pytest.CaptureFixture) -> None:
    exec(FIRST, {})
    said: dict[str, str] = {}
    for line in capsys.readouterr().out.splitlines():
        name, _, answer = line.partition(":")
        said.setdefault(name, answer)  # the report of the repair names the damaged tokens, too
    assert said["clean"].split() == said["repaired"].split() == ["copper", "lantern."]
    assert "lantern" not in said["damaged"]


def test_the_example_for_a_model_of_ones_own_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base, own_task = tiny_base("llama"), tasks.perplexity_task

    def task_with_a_useful_context(*args, **options):
        """Continuations in which the random model is right: else its context is worth nothing."""
        task = own_task(*args, **options)
        return replace(task, target_ids=clean_pass(base.model, task).logits.argmax(-1))

    monkeypatch.setattr("cachemedic.load_base", lambda name: base)
    monkeypatch.setattr(tasks, "perplexity_task", task_with_a_useful_context)
    monkeypatch.chdir(tmp_path)
    names = {"texts": ["".join(DOCUMENTS[i:] + DOCUMENTS[:i]) for i in range(24)]}
    exec(OWN_MODEL, names)
    assert not names["cache"].check()
    assert {path.name for path in tmp_path.iterdir()} == {"my-operator", "my-cache"}
    assert set(names["rows"]["base"]) == {base.name}
    assert names["spec"].severity == 0.5
