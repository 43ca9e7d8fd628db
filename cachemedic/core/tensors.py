"""Tensors and what belongs to them in one safetensors file, which carries the hash of all that it holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

RECORD, CHECKSUM = "record", "checksum"  # keys of the metadata


def tensor_bytes(tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> bytes:
    """A safetensors file of `tensors`, with a JSON `record` and the hash of both in its metadata."""
    # copies, because parameters that are tied share their memory
    plain = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    text = json.dumps(record)
    return safetensors_bytes(plain, {RECORD: text, CHECKSUM: _digest(plain, text)})


def safetensors_bytes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file whose metadata stand in the order of their names: the library leaves their order to chance."""
    data = safetensors.torch.save(dict(tensors), metadata=dict(metadata))
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # tensors begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text + data[end:]


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the record that `tensor_bytes` put together.

    Raises `FileNotFoundError`, and `ValueError` if the file is damaged.
    """
    data = path.read_bytes()
    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length])["__metadata__"]
        text, expected = metadata[RECORD], metadata[CHECKSUM]
    except Exception as error:  # of many kinds, according to where the damage is
        raise ValueError(f"{path} is damaged: {error!r}") from error
    if _digest(tensors, text) != expected:
        raise ValueError(f"{path} is damaged: it is not as it was saved")
    return tensors, json.loads(text)


def _digest(tensors: Mapping[str, torch.Tensor], text: str) -> str:
    total = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        x = tensors[name]
        total.update(f"\n{name} {x.dtype} {tuple(x.shape)} ".encode())
        total.update(x.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def flattened(state: Any, name: str = "") -> tuple[dict[str, torch.Tensor], Any]:
    """Nested dictionaries, lists and tuples as their tensors, by place, and the same with places for tensors."""
    if isinstance(state, torch.Tensor):
        return {name: state}, {"tensor": name}
    if isinstance(state, Mapping):
        parts = [(key, *flattened(value, f"{name}.{key}")) for key, value in state.items()]
        # keys of JSON are text: pairs keep numbers
        return {n: x for _, found, _ in parts for n, x in found.items()}, {"pairs": [[k, rest] for k, _, rest in parts]}
    if isinstance(state, list | tuple):
        parts = [(i, *flattened(value, f"{name}.{i}")) for i, value in enumerate(state)]
        return {n: x for _, found, _ in parts for n, x in found.items()}, {"list": [rest for *_, rest in parts]}
    return {}, {"value": state}


def unflattened(tensors: Mapping[str, torch.Tensor], rest: Any) -> Any:
    """The inverse of `flattened`; tuples become lists."""
    ((kind, content),) = rest.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "pairs":
        return {key: unflattened(tensors, value) for key, value in content}
    if kind == "list":
        return [unflattened(tensors, value) for value in content]
    return content
