"""What a clean token vector looks like, layer by layer.

A vector z (in units of `scale`) of layer l is predicted by a linear map from that of layer l - 1, because the residual
stream changes little from layer to layer, and from that of the token before, which heads of lower layers copy. What the
prediction misses, the innovation, is described along its principal axes. Coding the innovation instead of the vector is
differential coding along the depth of the model; it starts from what is exact, the layers that the token ids tell.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from cachemedic.core.files import write_atomically

HALF = ("chain_in", "chain_out", "basis")  # kept and used in half precision's rounding: half the file


def with_previous(z: Tensor) -> Tensor:
    """Vectors [..., T, D] beside those of the token before (zeros at first): [..., T, 2 D]."""
    return torch.cat([z, F.pad(z, (0, 0, 1, 0))[..., :-1, :]], -1)


@dataclass(frozen=True, eq=False)
class Transform:
    """Statistics of the P protected layers, D = 2 G d numbers a token vector.

    mean, scale [P, D]: z = (x - mean) * scale. first [P, D]: z of the first position, which lies far from the others.
    chain_in [P, 2 D, q], chain_out [P, q, D]: prediction of layer l from layer l - 1 at the token and at the one
    before, by a map of rank q, so that wide models pay little for it; zeros for the lowest.
    basis [P, D, D]: orthonormal axes of the innovation, by falling variance; variance [P, D]: along them.
    """

    mean: Tensor
    scale: Tensor
    first: Tensor
    chain_in: Tensor
    chain_out: Tensor
    basis: Tensor
    variance: Tensor

    def __post_init__(self) -> None:
        if not (self.scale.isfinite() & (self.scale > 0)).all():
            raise ValueError("every scale of a transform must be finite and above zero")
        for name in HALF:
            object.__setattr__(self, name, getattr(self, name).half().float())

    @property
    def num_layers(self) -> int:
        return self.mean.shape[0]

    @property
    def width(self) -> int:
        return self.mean.shape[1]

    def to(self, device: torch.device) -> Transform:
        """The same on another device."""
        return Transform(**{name: x.to(device) for name, x in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """By name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def standardise(self, x: Tensor) -> Tensor:
        """Token vectors x [..., P, T, D] in units of `scale`, fp32."""
        return (x.float() - self.mean[:, None]) * self.scale[:, None]

    def restore(self, z: Tensor) -> Tensor:
        """The inverse of `standardise`."""
        return z / self.scale[:, None] + self.mean[:, None]

    def predict(self, layer: int, below: Tensor | None, is_first: Tensor) -> Tensor:
        """Prediction of z at protected layer number `layer` from `below` [..., T, D], that of the layer before.

        is_first [..., T] tells the first position. With nothing below (None) it is the mean, 0.
        """
        predicted = (
            torch.zeros_like(self.first[layer])
            if below is None
            else with_previous(below) @ self.chain_in[layer] @ self.chain_out[layer]
        )
        return torch.where(is_first[..., None], self.first[layer], predicted)

    def to_bytes(self) -> bytes:
        """The content of a safetensors file."""
        tensors = {name: x.half() if name in HALF else x for name, x in self.tensors().items()}
        return safetensors.torch.save({name: x.contiguous().cpu() for name, x in tensors.items()})

    @property
    def digest(self) -> str:
        """sha256 of the file."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def save(self, path: Path) -> None:
        """Writes the file, whole or not at all."""
        write_atomically(path, self.to_bytes())

    @classmethod
    def load(cls, path: Path) -> Transform:
        """Reads what `save` wrote. Raises `ValueError` for a damaged file."""
        try:
            return cls(**{name: x.float() for name, x in safetensors.torch.load(path.read_bytes()).items()})
        except (safetensors.SafetensorError, TypeError) as error:
            raise ValueError(f"{path} is damaged or holds no transform: {error}") from error
