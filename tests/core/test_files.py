"""Files are written whole or not at all, carry their hash, and are refused if a single bit of them changes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cachemedic.core.files import (
    read_hashed,
    read_sealed,
    remove_leftovers,
    replace_together,
    seal,
    write_atomically,
    write_hashed,
)
from cachemedic.core.tensors import flattened, read_tensors, safetensors_bytes, tensor_bytes, unflattened

QUICK = settings(max_examples=60)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
RECORDS = st.dictionaries(st.text(max_size=5).filter(lambda name: name != "checksum"), VALUES, max_size=4)


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file.txt"
    write_atomically(path, b"first")
    assert path.read_bytes() == b"first"
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()

    def full(*_):
        raise OSError(28, "No space left on device")

    for owner, name in ((os, "replace"), (Path, "write_bytes")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(OSError, match="No space left"):
                write_atomically(path, b"second")
        assert path.read_bytes() == b"first"
        assert list(path.parent.iterdir()) == [path]


def current_umask():
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device: .*wanted.csv"):
        write_atomically(tmp_path / "wanted.csv", b"")


def test_what_a_killed_process_leaves_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    code = """
import os, pathlib, signal, sys
from cachemedic.core.files import write_atomically
pathlib.Path.write_bytes = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
write_atomically(pathlib.Path(sys.argv[1]) / "a", b"x")
"""
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".tmp")  # ignored by git
    living = left.with_name(left.name.replace(left.name.split("-")[2], str(os.getpid())))
    living.mkdir()
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [living]
    os.utime(living, (0, 0))
    write_atomically(tmp_path / "b", b"x")
    assert list(tmp_path.iterdir()) == [tmp_path / "b"]


def test_files_that_belong_together_are_replaced_together(tmp_path, monkeypatch):
    replace_together(tmp_path, {"a": b"1", "b": b"1", "last": b"1"}, last="last")
    real = os.replace

    def interrupted(source, target):
        if Path(target).name == "b":
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            replace_together(tmp_path, {"a": b"2", "b": b"2", "last": b"2"}, last="last")
    assert not (tmp_path / "last").exists()
    replace_together(tmp_path, {"a": None, "b": b"3", "last": b"3"}, last="last")
    assert {path.name for path in tmp_path.iterdir()} == {"b", "last"}


def refused_or_equal(read, path, content, at, expected):
    """Whether, with one bit of the file changed, what is read is an error that names it, or what was written."""
    spoilt = bytearray(content)
    spoilt[at // 8 % len(spoilt)] ^= 1 << at % 8
    path.write_bytes(spoilt)
    try:
        return read(path) == expected
    except ValueError as error:
        return path.name in str(error)


@QUICK
@given(RECORDS, st.integers(0))
def test_records_come_back_and_no_bit_changes_unseen(tmp_path_factory, record, at):
    path = tmp_path_factory.getbasetemp() / "record.json"
    path.write_bytes(seal(record))
    assert read_sealed(path) == record
    assert refused_or_equal(read_sealed, path, seal(record), at, record)


@QUICK
@given(st.binary(max_size=40), st.integers(0), st.integers(0, 120))
def test_hashed_files_come_back_and_no_bit_changes_unseen(tmp_path_factory, data, at, length):
    path = tmp_path_factory.getbasetemp() / "data.csv"
    write_hashed(path, data)
    content = path.read_bytes()
    assert read_hashed(path) == data
    assert refused_or_equal(read_hashed, path, content, at, None)
    path.write_bytes(content[: min(length, len(content) - 1)])
    with pytest.raises(ValueError, match="data.csv is damaged"):
        read_hashed(path)


@QUICK
@given(st.integers(0, 2**40), st.integers(0, 400))
def test_tensors_come_back_and_no_bit_changes_unseen(tmp_path_factory, at, length):
    path = tmp_path_factory.getbasetemp() / "state.safetensors"
    generator = torch.Generator().manual_seed(at)
    state = {
        "part": {0: {"step": torch.tensor(3), "size": torch.randn(2, 3, generator=generator).bfloat16()}},
        "groups": [{"lr": 0.1, "betas": [0.9, 0.99], "params": [0], "none": None}],
        "empty": torch.zeros(0, 2),
    }
    tensors, rest = flattened(state)
    content = tensor_bytes(tensors, {"step": 3, "state": rest})
    path.write_bytes(content)
    found, record = read_tensors(path)
    again = unflattened(found, record["state"])
    assert torch.equal(again["part"][0].pop("size"), state["part"][0]["size"])
    assert again["part"][0]["step"] == 3
    assert again["groups"] == state["groups"]
    assert again["empty"].shape == (0, 2)
    spoilt = bytearray(content)
    spoilt[at // 8 % len(spoilt)] ^= 1 << at % 8
    for damaged in (spoilt, content[: min(length, len(content) - 1)]):
        path.write_bytes(damaged)
        try:
            changed, other = read_tensors(path)
            same = other == record and all(torch.equal(x, changed[name]) for name, x in tensors.items())
            assert same  # a bit that says nothing, such as padding
        except ValueError as error:
            assert "state.safetensors is damaged" in str(error)  # noqa: PT017


def test_records_are_plain_json(tmp_path):
    (tmp_path / "a.json").write_bytes(seal({"b": 1}))
    assert json.loads((tmp_path / "a.json").read_text())["b"] == 1
    with pytest.raises(FileNotFoundError):
        read_sealed(tmp_path / "none.json")


def test_the_same_tensors_are_the_same_bytes(tmp_path):
    tensors = {"a": torch.arange(3), "b": torch.ones(2, 2, dtype=torch.bfloat16)}
    metadata = {"one": "é\n", "two": "2", "three": "3"}
    (data,) = {safetensors_bytes(tensors, metadata) for _ in range(8)}
    (path := tmp_path / "file").write_bytes(data)
    with safetensors.safe_open(str(path), framework="pt") as file:
        assert file.metadata() == metadata
        assert all(torch.equal(file.get_tensor(name), x) for name, x in tensors.items())
