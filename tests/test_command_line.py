"""`python -m cachemedic`: what its commands print, write and refuse."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from cachemedic import RepairOperator, SketchCache, load_base
from cachemedic.__main__ import main
from cachemedic.token.cache_files import NUMBERS

ROOT = Path(__file__).parents[1]
GIVEN = ["--base", "embedded-llama", "--operator", "E/embedded-llama"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved cache with codes, of which one number is not what was written."""
    lm = load_base("embedded-llama")
    cache = SketchCache(lm.model, RepairOperator.from_pretrained("E/embedded-llama"))
    lm.model(torch.arange(5, 45)[None], past_key_values=cache)
    cache.save(tmp_path / "cache")
    content = bytearray((tmp_path / "cache" / NUMBERS).read_bytes())
    content[-5] ^= 64
    (tmp_path / "cache" / NUMBERS).write_bytes(content)
    return tmp_path / "cache"


def test_a_saved_cache_is_checked_and_repaired(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (saved / NUMBERS).read_bytes()
    assert main(["check", str(saved), *GIVEN]) == 1
    assert "damaged: 1 of 40 tokens" in capsys.readouterr().out
    elsewhere = saved.with_name("repaired")
    assert main(["repair", str(saved), *GIVEN, "--method", "restore", "--to", str(elsewhere)]) == 0
    assert "restore: 1 tokens restored from what code and ids tell" in capsys.readouterr().out
    assert (saved / NUMBERS).read_bytes() == before
    assert main(["check", str(elsewhere), *GIVEN]) == 0
    assert main(["repair", str(saved), *GIVEN]) == 0
    capsys.readouterr()
    assert main(["check", str(saved), *GIVEN]) == 0
    assert capsys.readouterr().out == "all 40 tokens are as they were last written or repaired\n"


def test_an_operator_is_calibrated_on_texts_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    words = [f"the value {n} of a column is {n * n % 97} where it is read" for n in range(600)]
    (tmp_path / "prose.txt").write_text("<|endoftext|>".join(" ".join(words[i : i + 30]) for i in range(0, 600, 30)))
    to = tmp_path / "operator"
    given = [str(tmp_path / "model"), "--texts", str(tmp_path / "prose.txt"), "--share", "1/16", "--to", str(to)]
    assert main(["calibrate", *given]) == 0
    operator = RepairOperator.from_pretrained(to)
    assert (operator.family, operator.config.options["share"]) == ("E", 1 / 16)
    assert operator.calibrated.coordinates > 0


def test_the_demonstration_shows_a_damaged_answer_repaired(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo"]) == 0
    shown = capsys.readouterr().out
    answers = dict(re.findall(r"^(clean|damaged|repaired): +(.*)$", shown, re.MULTILINE))
    assert answers["clean"] == answers["repaired"] == "copper lantern."
    assert "copper lantern" not in answers["damaged"]
    assert "damaged: 77 of 77 tokens" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chek"], "No such command 'chek'. Did you mean 'check'?"),
        (["check", "--base", "embedded-llama"], "Missing argument 'FOLDER'"),
        (["check", "{tmp}/nowhere", *GIVEN], "'{tmp}/nowhere' does not exist"),
        (["check", "{tmp}", *GIVEN], "{tmp} is no saved cache: it has no file cache.json"),
        (["check", "{tmp}", "--base", "embeded-llama"], "unknown base 'embeded-llama': did you mean 'embedded-llama'?"),
        (["check", "{tmp}", "--base", "embedded-llama", "--operator", "F/embedded-llama"], "unknown operator"),
        (["check", "{tmp}", "--base", "embedded-llama", "--dtype", "int8"], "'int8' is not one of"),
        (["calibrate", "embedded-llama", "--to", "{tmp}", "--share", "2"], "share '2' is out of range"),
        (["calibrate", "embedded-llama", "--to", "{tmp}", "--share", "1/0"], "share '1/0' is out of range"),
        (["calibrate", "embedded-llama", "--to", "{tmp}/bytes/x"], "{tmp}/bytes"),
        (["calibrate", "embedded-llama", "--to", "{tmp}", "--texts", "{tmp}/bytes"], "{tmp}/bytes is no text in UTF-8"),
        (["calibrate", "embedded-llama", "--to", "{tmp}", "--family", "A"], "'A' is not one of 'D', 'E'"),
        (["calibrate", "embedded-llama", "--to", "{tmp}", "--family", "D", "--share", "0.1"], "unknown option"),
        (["bench", "decod"], "unknown benchmark 'decod': did you mean 'decode'?"),
        (["demo", "--corruption", "gausian"], "'gausian': did you mean 'gaussian'?"),
    ],
)
def test_an_error_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    assert main([word.format(tmp=tmp_path) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ")
    assert message.format(tmp=tmp_path) in error.splitlines()[-1]
    assert "Traceback" not in error


def test_help_lists_the_commands_and_loads_no_torch() -> None:
    code = "import sys; from cachemedic.__main__ import main; main([]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert all(f"  {command}" in done.stdout for command in ("check", "calibrate", "repair", "bench", "demo"))
