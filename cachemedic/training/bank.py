"""The clean-cache bank: what the teacher knows, computed once for a base, a text and a length.

The teacher and the clean cache depend neither on phi nor on the seed or the sweep, so they are computed once, kept in
memory-mapped files, and read by every run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from transformers import DynamicCache

from cachemedic.core.errors import nearest_valid
from cachemedic.core.files import file_digest, read_sealed, seal, write_atomically
from cachemedic.core.integers import seed_number, whole_number
from cachemedic.core.progress import tqdm
from cachemedic.core.threads import one_thread
from cachemedic.data.text import CACHE_DIR, DOCUMENTATION_SPLITS, sentiment_review, text_hash
from cachemedic.data.text_source import EMBEDDED_TEXT, TextSource
from cachemedic.data.windows import sample_windows
from cachemedic.models.cache import stack_cache
from cachemedic.models.load import Base, decoder_layers
from cachemedic.models.usable import check_mode

FIELDS = ("keys", "values", "logits", "hidden", "ids")
BATCH = 32
WITH_REVIEWS = "+reviews"  # after the name of a split: its documents, and reviews


@dataclass(frozen=True)
class BankConfig:
    """`samples` texts of one documentation split: prefixes of `prefix` tokens, then `decoded` teacher-forced tokens.

    A split named like "operator_train+reviews" holds reviews besides: those of the `source`, or as many generated ones.
    """

    split: str = "operator_train"
    samples: int = 1280
    prefix: int = 96
    decoded: int = 1
    seed: int = 0
    source: TextSource = EMBEDDED_TEXT

    def __post_init__(self) -> None:
        if self.split.removesuffix(WITH_REVIEWS) not in DOCUMENTATION_SPLITS:
            allowed = [*DOCUMENTATION_SPLITS, *(name + WITH_REVIEWS for name in DOCUMENTATION_SPLITS)]
            raise nearest_valid("documentation split", self.split, allowed)
        for name in ("samples", "prefix", "decoded"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), 1))
        object.__setattr__(self, "seed", seed_number(self.seed))

    def defined(self) -> dict[str, object]:
        """What defines the bank, for keys: text from outside by its content, not by where it lies."""
        fields = {name: value for name, value in asdict(self).items() if name != "source"}
        return fields | ({"text": self.source.digest} if self.source else {})


@dataclass(frozen=True)
class Bank:
    """N texts. All tensors are read-only maps of files, float32 (ids int64).

    keys, values [N, L, G, T, d]: the clean cache of the prefix; ids [N, T + M]; logits [N, M, V]: the teacher's, of the
    tokens T .. T+M-1 decoded on the clean cache; hidden [N, L, M, width]: the input of every layer at those tokens.
    """

    keys: torch.Tensor
    values: torch.Tensor
    logits: torch.Tensor
    hidden: torch.Tensor
    ids: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def prefix(self) -> int:
        return self.keys.shape[3]


@one_thread()
def open_bank(base: Base, config: BankConfig, folder: Path = CACHE_DIR / "bank") -> Bank:
    """The bank of `config`, computed on first use and kept under `folder`; waits while another process computes it.

    Raises `ValueError` if the windows pass the model's context, the text is too short, the model is in training mode or
    a file of the bank is damaged, `OSError` if the disk is full.
    """
    check_mode(base.model)
    split = config.split.removesuffix(WITH_REVIEWS)
    documents = config.source.documents_of(split)
    if config.split.endswith(WITH_REVIEWS):
        rng = np.random.default_rng([*config.split.encode()])
        documents += tuple(
            review for review, _ in config.source.reviews_of(split) or [sentiment_review(rng) for _ in documents]
        )
    key = json.dumps([config.defined(), base.name, str(base.model.dtype), weights_digest(base), text_hash(documents)])
    target = folder / hashlib.sha256(key.encode()).hexdigest()[:16]
    complete = target / "complete.json"
    if not complete.exists():
        target.mkdir(parents=True, exist_ok=True)
        # sweeps that run side by side share banks, and to begin one truncates its files; the lock of a process that was
        # killed is free again
        with FileLock(folder / f"{target.name}.lock"):
            if not complete.exists():  # nobody else completed it meanwhile
                ids = sample_windows(base, documents, config.samples, config.prefix + config.decoded, config.seed)
                _compute(base, ids, config.prefix, target)
                digests = {f"{name}.npy": file_digest(target / f"{name}.npy") for name in FIELDS}
                write_atomically(complete, seal({"key": key, "sha256": digests}))
    _check(target, read_sealed(complete)["sha256"])
    fields = {name: torch.from_numpy(np.load(target / f"{name}.npy", mmap_mode="c")) for name in FIELDS}
    return Bank(**fields)


def _check(target: Path, expected: dict[str, str]) -> None:
    """Raise `ValueError` for a file of the bank that is not what was written."""
    for name, written in expected.items():
        if not (target / name).is_file() or file_digest(target / name) != written:
            raise ValueError(f"{target / name} is missing or damaged; delete {target} to have the bank computed anew")


def weights_digest(base: Base) -> str:
    """sha256 of the parameters, as float32."""
    digest = hashlib.sha256()
    for parameter in base.model.parameters():
        digest.update(parameter.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


@torch.inference_mode()
def _compute(base: Base, ids: torch.Tensor, prefix: int, target: Path) -> None:
    parent, name = decoder_layers(base.model)
    inputs: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0])) for layer in getattr(parent, name)
    ]
    maps: dict[str, np.memmap] = {}
    try:
        for start in tqdm(range(0, len(ids), BATCH), desc=f"clean-cache bank of {base.name}"):
            rows = ids[start : start + BATCH].to(base.model.device)
            cache = DynamicCache()  # plain layers: sliding-window layers would drop old positions
            base.model.base_model(rows[:, :prefix], past_key_values=cache, use_cache=True)
            keys, values = stack_cache(cache)
            inputs.clear()
            logits = base.model(rows[:, prefix:], past_key_values=cache).logits
            batch = dict(zip(FIELDS, (keys, values, logits, torch.stack(inputs, 1), rows), strict=True))
            arrays = {f: (x if f == "ids" else x.float()).cpu().numpy() for f, x in batch.items()}
            if not maps:
                maps = _create(target, arrays, len(ids))
            for field, array in arrays.items():
                maps[field][start : start + BATCH] = array
    finally:
        for hook in hooks:
            hook.remove()
    for array in maps.values():
        array.flush()


def _create(target: Path, first: dict[str, np.ndarray], count: int) -> dict[str, np.memmap]:
    """Empty files for `count` rows like those of the `first` batch."""
    needed = sum(array[0].nbytes for array in first.values()) * count
    free = shutil.disk_usage(target).free
    if needed > free:  # the files are sparse: without this check a full disk kills the process in the middle
        raise OSError(f"the clean-cache bank takes {needed / 1e9:.1f} GB; {target} has {free / 1e9:.1f} GB free")
    return {
        field: np.lib.format.open_memmap(target / f"{field}.npy", "w+", array.dtype, (count, *array.shape[1:]))
        for field, array in first.items()
    }
