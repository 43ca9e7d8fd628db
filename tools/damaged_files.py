"""Every kind of file that the project reads, damaged: reading gives one clear error or the right content."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from cachemedic import RepairOperator, SketchCache, load_base
from cachemedic.core.files import digest, read_hashed, seal, write_hashed
from cachemedic.core.severity_map import SeverityMap
from cachemedic.core.tensors import read_tensors, tensor_bytes
from cachemedic.corruption.severity import shipped_map
from cachemedic.data.text_source import TextSource
from cachemedic.models.base_files import CARD, check_base_files, defining_digests
from cachemedic.models.load import WEIGHTS
from cachemedic.repair.shipped import operator_folder
from cachemedic.studies.result_files import read_result
from cachemedic.token.coder import joint_operator
from cachemedic.token.joint import JointModel
from cachemedic.training.bank import BankConfig, open_bank
from cachemedic.training.log import drop_after
from cachemedic.training.valence.quantiser import KVQuantiser, QuantiserConfig
from small_configurations import VOCABULARY, small_configuration

REFUSED, RIGHT, WRONG = "refused", "read right", "wrong"
DAMAGES = ("flip", "cut", "remove", "swap")
HEAD = 2048  # bytes, in which names and shapes stand: half of the flips hit there


@dataclass(frozen=True)
class FileKind:
    """Files in a folder and how they are read.

    read: of the folder, its content in a form that can be compared. swapped: for each file, another whole content: that
    of the same file of something else, where that is not right by itself.
    """

    folder: Path
    read: Callable[[Path], Any]
    swapped: dict[str, bytes]

    def damaged(self, name: str, damage: str, at: int) -> tuple[str, str]:
        """What reading gives with one file damaged, one of `REFUSED`, `RIGHT` and `WRONG`, and what was said.

        at: any number from 0; the place of the damage. The file is whole again afterwards.
        """
        path = self.folder / name
        whole, expected = path.read_bytes(), self.read(self.folder)
        try:
            if damage == "remove":
                path.unlink()
            else:
                path.write_bytes(_damaged_bytes(whole, self.swapped[name], damage, at))
            found = self.read(self.folder)
        except (ValueError, OSError) as error:
            named = name in str(error) or self.folder.name in str(error)
            return REFUSED if named and "\n" not in str(error).strip() else WRONG, str(error)
        except Exception as error:
            return WRONG, repr(error)
        finally:
            path.write_bytes(whole)
        return RIGHT if found == expected else WRONG, "other content, and no error"


def _damaged_bytes(whole: bytes, other: bytes, damage: str, at: int) -> bytes:
    if damage == "swap":
        return other
    if damage == "cut":
        return whole[: at % len(whole)]
    spoilt = bytearray(whole)
    reached = min(len(whole), HEAD) if at % 16 < 8 else len(whole)
    spoilt[at // 16 % reached] ^= 1 << at % 8
    return bytes(spoilt)


def tiny_llama() -> PreTrainedModel:
    """A small Llama with random weights."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(small_configuration("llama")).eval().requires_grad_(False)


def file_kinds(folder: Path) -> dict[str, FileKind]:
    """Files of each kind in folders below `folder`; writes them."""
    makers = (
        *(_operator, _token_operator, _joint_model, _quantiser, _severity_map, _result),
        *(_log, _cache, _checkpoint, _bank, _base),
    )
    return {maker.__name__[1:].replace("_", " "): maker(folder / maker.__name__[1:]) for maker in makers}


def _known(tensors: Iterable[Tensor]) -> list[str]:
    return [digest(x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()) for x in tensors]


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def _operator(folder: Path) -> FileKind:
    def read(place: Path) -> Any:
        operator = RepairOperator.from_pretrained(place)
        return operator.config, _known(operator.parameters())

    config = small_configuration("llama")
    for seed, place in enumerate((folder, folder / "other")):
        RepairOperator.create("A", config, [0, 1 + seed], rank=2, seed=seed).save_pretrained(place)
    return FileKind(folder, read, _contents(folder / "other"))


def _token_operator(folder: Path) -> FileKind:
    """With the joint model beside it, as that of a model of one's own."""
    for place, family in ((folder, "E"), (folder / "other", "D")):
        shutil.copytree(operator_folder(f"{family}/embedded-llama"), place)
        shutil.copy(next((WEIGHTS / "embedded-llama").glob("joint-*.safetensors")), place)

    def read(place: Path) -> Any:
        operator = joint_operator(RepairOperator.from_pretrained(place))
        return operator.digest, operator.expected_kl, operator.alarms

    return FileKind(folder, read, {name: x for name, x in _contents(folder / "other").items() if "joint" not in name})


def _quantiser(folder: Path) -> FileKind:
    def read(place: Path) -> Any:
        quantiser = KVQuantiser.from_pretrained(place)
        return quantiser.config, _known(quantiser.state_dict().values())

    keys, values = torch.randn(2, 3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    for bits, place in ((3, folder), (2, folder / "other")):
        quantiser = KVQuantiser.calibrated(QuantiserConfig(bits), keys, values)
        with torch.no_grad():  # as if it were trained: untrained ones differ in nothing but their configuration
            quantiser.key_step.fill_(bits)
        quantiser.save_pretrained(place)
    return FileKind(folder, read, _contents(folder / "other"))


def _log(folder: Path) -> FileKind:
    name, steps = "log.jsonl", 6
    folder.mkdir()
    records = [{"run_id": "run", "step": step, "gate": {"projected": step / 8}} for step in range(1, steps + 1)]
    (folder / name).write_bytes(b"".join(seal(record, indent=None) for record in records))

    def read(place: Path) -> bytes:
        if not (place / name).is_file():
            raise FileNotFoundError(str(place / name))
        drop_after(place / name, steps, runs=1)
        return (place / name).read_bytes()

    return FileKind(folder, read, {name: seal({"run_id": "run", "step": 1}, indent=None)})


def _joint_model(folder: Path) -> FileKind:
    (found,) = (WEIGHTS / "embedded-llama").glob("joint-*.safetensors")
    folder.mkdir()
    shutil.copy(found, folder)

    def read(place: Path) -> str:
        return JointModel.from_file(place / found.name).digest

    return FileKind(folder, read, {found.name: (WEIGHTS / "embedded-llama" / "model.safetensors").read_bytes()})


def _severity_map(folder: Path) -> FileKind:
    rows = shipped_map().rows
    rows = rows[rows["base"] == "embedded-gpt2"]
    name = "severity_map.csv"
    write_hashed(folder / name, rows.to_csv(index=False).encode())

    def read(place: Path) -> Any:
        return SeverityMap(pd.read_csv(io.BytesIO(read_hashed(place / name)))).rows.to_csv()

    return FileKind(folder, read, {name: rows.to_csv(index=False).encode()})


def _result(folder: Path) -> FileKind:
    for place, number in ((folder, 1), (folder / "other", 2)):
        place.mkdir()
        data = pd.DataFrame({"seed": [0, 1], "nll": [number, 0.5]}).to_csv(index=False).encode()
        (place / "rank.csv").write_bytes(data)
        (place / "rank.json").write_bytes(seal({"file": "results/rank.csv", "sha256": digest(data)}))
    return FileKind(folder, lambda place: read_result(place / "rank.csv").to_csv(), _contents(folder / "other"))


def _cache(folder: Path) -> FileKind:
    model = tiny_llama()
    for seed, place in enumerate((folder, folder / "other")):
        cache = SketchCache(model)
        generator = torch.Generator().manual_seed(seed)
        model(torch.randint(1, VOCABULARY, (2, 12), generator=generator), past_key_values=cache)
        cache.save(place)

    def read(place: Path) -> Any:
        cache = SketchCache.load(place, model)
        if cache.report:
            raise ValueError(f"{place.name}: {' '.join(str(cache.report).split())}")  # found, and can be repaired
        return _known(x for side in cache.numbers() for x in side), _known(cache.kept.tensors.values())

    return FileKind(folder, read, _contents(folder / "other"))


def _checkpoint(folder: Path) -> FileKind:
    name = "checkpoint.safetensors"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    (folder / name).write_bytes(tensor_bytes({"weight": torch.randn(4, 8, generator=generator)}, {"step": 3}))

    def read(place: Path) -> Any:
        tensors, record = read_tensors(place / name)
        return _known(tensors.values()), record

    (joint,) = (WEIGHTS / "embedded-llama").glob("joint-*.safetensors")
    return FileKind(folder, read, {name: joint.read_bytes()})


class _FewSentences(TextSource):
    """Text that is split into tokens at once."""

    def documents_of(self, split: str) -> tuple[str, ...]:
        """The same for every split."""
        return ("The old bridge over the river is closed today, and nobody knows when it opens again. " * 4,)


def _bank(folder: Path) -> FileKind:
    base = load_base("embedded-llama")

    def read(place: Path, seed: int = 0) -> Any:
        bank = open_bank(base, BankConfig(samples=2, prefix=8, seed=seed, source=_FewSentences()), place.parent)
        return _known((bank.keys, bank.values, bank.logits, bank.hidden, bank.ids))

    places: list[Path] = []
    for seed in (0, 1):
        read(folder / "new", seed)
        (made,) = set(folder.glob("*/complete.json")) - set(places)
        places.append(made)
    return FileKind(places[0].parent, read, _contents(places[1].parent))


def _base(folder: Path) -> FileKind:
    shutil.copytree(WEIGHTS / "embedded-llama", folder)

    def read(place: Path) -> Any:
        check_base_files(place, "copy it again")
        return defining_digests(place)

    for name in (*set(_contents(folder)) - {*defining_digests(folder), CARD},):
        (folder / name).unlink()
    return FileKind(folder, read, dict.fromkeys(_contents(folder), b"{}"))
