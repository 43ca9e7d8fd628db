"""The clean-cache bank against the model itself."""

import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from small_models import GROUPED
from tiny import CONTEXT, DOCUMENTS, VOCABULARY, tiny_model
from tiny_training import tiny_bank, tiny_base
from transformers import AutoModelForCausalLM, MistralConfig

from cachemedic.data.windows import sample_windows
from cachemedic.models.load import Base
from cachemedic.training import bank as bank_module
from cachemedic.training.bank import BATCH, BankConfig, weights_digest

CONFIG = BankConfig(samples=BATCH + 3, prefix=9, decoded=2)
# a process that dies in its second batch
KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_bank import CONFIG, bank_module, tiny_bank, tiny_base

base = tiny_base()
forward, calls = type(base.model).forward, []

def deadly(self, *args, **kwargs):
    calls.append(args)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(self, *args, **kwargs)

type(base.model).forward = deadly
tiny_bank(base, CONFIG, Path(sys.argv[1]))
"""


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def base(request) -> Base:
    return tiny_base(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bank")


def test_the_bank_holds_what_the_model_computes(base, folder):
    bank = tiny_bank(base, CONFIG, folder)
    assert (len(bank), bank.prefix) == (BATCH + 3, 9)
    assert bank.ids.shape == (BATCH + 3, 11)
    rows = [0, BATCH, BATCH + 2]  # of both batches
    with torch.inference_mode():
        whole = base.model(bank.ids[rows], output_hidden_states=True)
    for layer in range(3):
        stored = whole.past_key_values.layers[layer]
        torch.testing.assert_close(bank.keys[rows, layer], stored.keys[:, :, :9], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(bank.values[rows, layer], stored.values[:, :, :9], rtol=1e-4, atol=1e-4)
        inputs = whole.hidden_states[layer][:, 9:]
        torch.testing.assert_close(bank.hidden[rows, layer], inputs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bank.logits[rows], whole.logits[:, 9:], rtol=1e-3, atol=1e-3)


def test_the_bank_is_computed_once(base, folder, monkeypatch):
    first = tiny_bank(base, CONFIG, folder)
    monkeypatch.setattr(bank_module, "_compute", None)  # to call it would fail
    again = tiny_bank(base, CONFIG, folder)
    assert torch.equal(first.keys, again.keys)
    with pytest.raises(TypeError):
        tiny_bank(base, BankConfig(samples=4, prefix=9, seed=1), folder)


def test_an_interrupted_bank_is_computed_anew(base, tmp_path, monkeypatch):
    forward, calls = type(base.model).forward, []

    def interrupted(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(base.model), "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny_bank(base, CONFIG, tmp_path)
    assert tiny_bank(base, CONFIG, tmp_path).keys.abs().sum(dim=(1, 2, 3, 4)).min() > 0


def test_a_bank_that_another_process_computes_is_waited_for(base, tmp_path, monkeypatch):
    compute, began, calls = bank_module._compute, threading.Event(), []

    def slowly(*args):
        calls.append(args)
        compute(*args)
        began.set()  # all is written but the mark: whoever began now would truncate it
        time.sleep(0.3)

    with monkeypatch.context() as patch, ThreadPoolExecutor() as pool:
        patch.setattr(bank_module, "_compute", slowly)
        first = pool.submit(tiny_bank, base, CONFIG, tmp_path)
        assert began.wait(60)
        second = tiny_bank(base, CONFIG, tmp_path)
        assert torch.equal(first.result().keys, second.keys)
    assert len(calls) == 1

    monkeypatch.setattr(bank_module, "FileLock", None)  # a complete bank is read without the lock
    assert torch.equal(tiny_bank(base, CONFIG, tmp_path).keys, second.keys)


def test_a_killed_process_leaves_a_bank_that_the_next_one_completes(tmp_path):
    here = Path(__file__).parent
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path, here, here.parent], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list(tmp_path.glob("*/keys.npy"))
    assert tiny_bank(tiny_base(), CONFIG, tmp_path).keys.abs().sum(dim=(1, 2, 3, 4)).min() > 0


def test_bank_files_change_by_no_write_to_the_tensors(base, folder):
    bank = tiny_bank(base, CONFIG, folder)
    before = bank.logits.clone()
    bank.logits.zero_()
    assert torch.equal(tiny_bank(base, CONFIG, folder).logits, before)


def test_another_base_has_another_bank(tmp_path):
    first, second = Base(tiny_model(), None, "x"), Base(tiny_model(seed=1), None, "x")
    assert weights_digest(first) != weights_digest(second)
    assert weights_digest(first) == weights_digest(Base(tiny_model(), None, "y"))


def test_sliding_windows_do_not_shorten_the_bank(tmp_path):
    model = AutoModelForCausalLM.from_config(MistralConfig(**GROUPED | {"vocab_size": VOCABULARY}, sliding_window=6))
    base = Base(model.eval(), tiny_base().tokenizer, "windowed")
    assert tiny_bank(base, BankConfig(samples=2, prefix=10), tmp_path).prefix == 10


def test_windows_are_distinct_places_of_the_text(base):
    windows = sample_windows(base, tuple(DOCUMENTS), 40, 12, seed=0)
    assert windows.shape == (40, 12)
    assert (windows[:, 0] == 0).all()
    stream = "".join(base.tokenizer.decode(row[1:]) for row in windows)
    assert any(document in stream for document in DOCUMENTS)
    again, other = (sample_windows(base, tuple(DOCUMENTS), 40, 12, seed) for seed in (0, 1))
    assert torch.equal(windows, again)
    assert not torch.equal(windows, other)


def test_windows_longer_than_the_context_are_refused(base):
    with pytest.raises(ValueError, match=f"take {CONTEXT + 1} tokens; the context of {base.name} is {CONTEXT}"):
        sample_windows(base, tuple(DOCUMENTS), 1, CONTEXT + 1, seed=0)


def test_a_text_that_is_too_short_is_refused(base):
    with pytest.raises(ValueError, match="1000 windows of 101 take 100000"):
        sample_windows(base, tuple(DOCUMENTS), 1000, 101, seed=0)


def test_a_full_disk_is_one_clear_error(base, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(bank_module.shutil, "disk_usage", lambda path: usage(10, 10, 1000))
    with pytest.raises(OSError, match=r"the clean-cache bank takes .* GB; .* has 0.0 GB free"):
        tiny_bank(base, CONFIG, tmp_path)
    assert not list(tmp_path.glob("*/*.npy"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "operator_trian"}, "did you mean 'operator_train'"),
        ({"samples": 0}, "samples must be 1 or more, not 0"),
        ({"prefix": 0}, "prefix must be 1 or more"),
        ({"decoded": -1}, "decoded must be 1 or more"),
        ({"seed": -1}, "seed must be from 0 to"),
    ],
)
def test_bad_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BankConfig(**options)


def test_what_no_text_can_fill_is_refused_before_it_is_read(base, tmp_path):
    with pytest.raises(ValueError, match=r"the text has at most \d+ tokens; 1180591620717411303424 windows"):
        tiny_bank(base, BankConfig(samples=2**70, prefix=9), tmp_path)


def test_a_bank_of_a_model_in_training_mode_is_refused(tmp_path):
    base = tiny_base()
    base.model.train()
    with pytest.raises(ValueError, match="training mode"):
        tiny_bank(base, BankConfig(samples=4, prefix=9), tmp_path)


def test_a_bank_that_is_not_what_was_written_is_refused(tmp_path):
    base, config = tiny_base(), BankConfig(samples=4, prefix=9)
    sound = tiny_bank(base, config, tmp_path).keys.clone()
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[-3] ^= 4
        for damaged in (bytes(flipped), content[:-5]):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=rf"{path.name} is (missing or )?damaged"):
                tiny_bank(base, config, tmp_path)
        path.write_bytes(content)
    assert torch.equal(tiny_bank(base, config, tmp_path).keys, sound)
    (folder / "ids.npy").unlink()
    with pytest.raises(ValueError, match=r"ids.npy is missing.*delete .* to have the bank computed anew"):
        tiny_bank(base, config, tmp_path)
