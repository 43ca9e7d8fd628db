"""A cache in a folder: its numbers, and apart from them what is needed to check and repair them.

    numbers.safetensors   keys and values: what may be damaged
    record.safetensors    ids, positions, hashes, codes: as small as it is precious; keep it where it is safe
    cache.json            what both belong to, and the sha256 of the record; it is written last

Damage of the numbers is what the record is there for: it is found and can be repaired. A damaged record is refused.
"""

from __future__ import annotations

import hashlib
import weakref
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from cachemedic.core.files import read_sealed, replace_together, seal
from cachemedic.token.record import TokenRecord
from cachemedic.token.recorded_cache import RecordedCache

NUMBERS, RECORD, DESCRIPTION = "numbers.safetensors", "record.safetensors", "cache.json"
FORMAT = "cachemedic cache 1"


def save_cache(cache: RecordedCache, folder: Path) -> None:
    """Writes the files of a cache, as one. Raises `ValueError` for an empty cache."""
    record = cache.kept
    keys, values = cache.numbers()
    numbers = {
        f"{side}.{layer}": x for side, all_ in (("keys", keys), ("values", values)) for layer, x in enumerate(all_)
    }
    kept = safetensors.torch.save(_held(record.tensors))
    description = {
        "format": FORMAT,
        "record_sha256": hashlib.sha256(kept).hexdigest(),
        "model": model_digest(cache.model),
        "operator": None if cache.operator is None else cache.operator.digest,
        "dtype": str(keys[0].dtype),
        "seed": cache.seed,
    }
    files = {
        NUMBERS: safetensors.torch.save(_held(numbers)),
        RECORD: kept,
        DESCRIPTION: seal(description),
    }
    replace_together(folder, files, last=DESCRIPTION)


def load_cache(cache: RecordedCache, folder: Path) -> None:
    """Fills an empty cache with what `save_cache` wrote. See `SketchCache.load`."""
    for name in (DESCRIPTION, RECORD, NUMBERS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no saved cache: it has no file {name}")
    expected = read_sealed(folder / DESCRIPTION)
    if expected.get("format") != FORMAT:
        raise ValueError(f"{folder / DESCRIPTION} describes {expected.get('format')!r}, not {FORMAT!r}")
    kept = (folder / RECORD).read_bytes()
    if (found := hashlib.sha256(kept).hexdigest()) != expected["record_sha256"]:
        raise ValueError(
            f"{folder / RECORD} is damaged or of another cache: sha256 {found[:16]} is not "
            f"{expected['record_sha256'][:16]}"
        )
    if model_digest(cache.model) != expected["model"]:
        raise ValueError(
            "this cache was written by a model of other weights or another number format: load it with that"
        )
    if (None if cache.operator is None else cache.operator.digest) != expected["operator"]:
        if expected["operator"] is None:
            raise ValueError("this cache was written without an operator: load it without one")
        given = "and none is given" if cache.operator is None else "and the one given has another content"
        raise ValueError(
            f"this cache was written with an operator, {given}: load it with the operator that it was written with"
        )
    cache.seed = expected["seed"]
    record = TokenRecord.from_tensors(safetensors.torch.load(kept))
    _fill(cache, record, folder / NUMBERS, expected["dtype"])
    cache.record = record.to(cache.model.device)


def _fill(cache: RecordedCache, record: TokenRecord, path: Path, dtype: str) -> None:
    """Puts the numbers of the file into the layers of a cache."""
    try:
        numbers = safetensors.torch.load(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged beyond its numbers: {error}") from error
    shape = len(record.ids), cache.shape.num_kv_heads, len(record), cache.shape.head_dim
    expected = {f"{side}.{layer}" for side in ("keys", "values") for layer in range(cache.shape.num_layers)}
    wrong = [name for name, x in numbers.items() if tuple(x.shape) != shape or str(x.dtype) != dtype]
    if set(numbers) != expected or wrong:
        raise ValueError(
            f"{path} does not hold keys and values {list(shape)} in {dtype} of {cache.shape.num_layers} layers"
        )
    for number in range(cache.shape.num_layers):
        layer = DynamicLayer()
        layer.update(*(numbers[f"{side}.{number}"].to(cache.model.device) for side in ("keys", "values")))
        cache.layers.append(layer)


def _held(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As a file holds them: none shares its memory with another."""
    return {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}


_digests: weakref.WeakKeyDictionary[Any, tuple[list[Any], str]] = weakref.WeakKeyDictionary()


def model_digest(model: PreTrainedModel) -> str:
    """sha256 of all parameters and buffers of a model; known from before if none was changed or exchanged.

    A change through `.data` is not seen by PyTorch either.
    """
    state = model.state_dict()
    version = [
        (name, x.data_ptr(), x.dtype, x.shape, None if x.is_inference() else x._version) for name, x in state.items()
    ]
    known = _digests.get(model)
    if known is not None and known[0] == version:
        return known[1]
    digest = hashlib.sha256()
    for name, x in sorted(state.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    _digests[model] = version, digest.hexdigest()
    return digest.hexdigest()
