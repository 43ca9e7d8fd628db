"""The joint model of a token: x = mean + (f prior_out + c axes + rest) / scale over all layers and heads at once.

The features f are linear in the exact vectors of this token and the three before in the lowest layer, which the token
ids tell. The axes are the principal ones of what f leaves of whole tokens, standardised and weighed by what errors do
to the output; c and rest are independent normal numbers of known variances. One transform of all layers and heads
together is that of KVTC (arXiv 2511.01815), a method of compression; here it serves repair, and transforms what the ids
do not tell.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from cachemedic.core.files import write_atomically
from cachemedic.core.tensors import safetensors_bytes
from cachemedic.core.threads import one_thread
from cachemedic.models.shape import ModelShape
from cachemedic.token.lowest_layer import lowest_layer

SINKS = 4  # first positions, whose vectors are of another kind (attention sinks): a cache keeps them as they are
RECENT = 4  # tokens whose lowest layer the features are linear in: this one and those before
FORMAT, EARLIER = "cachemedic joint model 2", ("cachemedic joint model 1",)


@dataclass(frozen=True, eq=False)
class Prior:
    """What the ids tell of tokens: features f [B, T, r], and lowest [B, T, W]: exact vectors of the lowest layer."""

    features: Tensor
    lowest: Tensor

    def rows(self, rows: slice | Tensor) -> Prior:
        """The same of some rows of the batch."""
        return Prior(self.features[rows], self.lowest[rows])

    def tokens(self, tokens: slice | Tensor) -> Prior:
        """The same of some tokens."""
        return Prior(self.features[:, tokens], self.lowest[:, tokens])


@dataclass(frozen=True, eq=False)
class JointModel:
    """The model of the tokens of one base: D numbers a token, m coordinates c, W numbers in the lowest layer.

    of: the shape of the base; layers: those that x holds; mean, scale, rest [D] (rest: variances in units of the
    scale); axes [m, D], orthonormal rows in bf16; variance [m]: of c; lowest_mean, lowest_scale [W] standardise the
    lowest layer; prior_in [RECENT W, r] maps it to the features, prior_out [r, D], orthonormal rows, these to what the
    ids tell of x; prior_variance [r]: of the features; first [D]: the vector of the token that all calibration texts
    began with, None if they differed. A model without ids has no features: r = 0.
    """

    of: ModelShape
    layers: tuple[int, ...]
    mean: Tensor
    scale: Tensor
    axes: Tensor
    variance: Tensor
    rest: Tensor
    lowest_mean: Tensor
    lowest_scale: Tensor
    prior_in: Tensor
    prior_out: Tensor
    prior_variance: Tensor
    first: Tensor | None = None

    def __post_init__(self) -> None:
        width = 2 * self.of.num_kv_heads * self.of.head_dim
        d, m, r = width * len(self.layers), len(self.axes), self.prior_in.shape[-1]
        expected = {
            "mean": (d,), "scale": (d,), "axes": (m, d), "variance": (m,), "rest": (d,), "lowest_mean": (width,),
            "lowest_scale": (width,), "prior_in": (RECENT * width, r), "prior_out": (r, d), "prior_variance": (r,),
        }  # fmt: skip
        if self.first is not None:
            expected["first"] = (d,)
        for name, shape in expected.items():
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise ValueError(f"{name} of a joint model of {d} numbers a token must be {shape}, not {found}")

    @property
    def dim(self) -> int:
        """D."""
        return len(self.mean)

    @property
    def coordinates(self) -> int:
        """m."""
        return len(self.axes)

    @property
    def lowest_is_exact(self) -> bool:
        """Whether x holds the lowest layer, which the ids tell."""
        return self.layers[0] == 0

    @property
    def fixed_bytes(self) -> int:
        """What the model takes in memory, whatever the number of tokens."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All numbers by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    @cached_property
    def digest(self) -> str:
        """sha256 of what the model is."""
        digest = hashlib.sha256(self._header().encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _header(self) -> str:
        return json.dumps({"of": asdict(self.of), "layers": list(self.layers)}, sort_keys=True)

    def to(self, device: torch.device | str) -> JointModel:
        """The same on a device."""
        if self.mean.device == torch.device(device):
            return self
        return JointModel(self.of, self.layers, **{name: x.to(device) for name, x in self.tensors.items()})

    def as_bytes(self) -> bytes:
        """The model as one safetensors file that names its own sha256."""
        tensors = {name: x.detach().cpu().contiguous() for name, x in self.tensors.items()}
        header = {"format": FORMAT, "model": self._header(), "sha256": self.digest}
        return safetensors_bytes(tensors, header)

    def save(self, path: str | Path) -> None:
        """Writes the model to a file, whole or not at all."""
        write_atomically(Path(path), self.as_bytes())

    @classmethod
    def from_file(cls, path: str | Path) -> JointModel:
        """Reads what `save` or `as_bytes` wrote.

        Raises `FileNotFoundError` if there is no such file, `ValueError` if it is damaged or no joint model.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no joint model at {path}")
        try:
            with safetensors.safe_open(str(path), framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except safetensors.SafetensorError as error:
            raise ValueError(f"the joint model in {path} is damaged: {error!r}") from error
        if (form := header.get("format")) in EARLIER:
            raise ValueError(f"{path} is a joint model of an earlier version: make its operator anew by `calibrate`")
        if form != FORMAT:
            raise ValueError(f"{path} is no joint model: its format is {form!r}, not {FORMAT!r}")
        try:
            record = json.loads(header["model"])
            found = cls(ModelShape(**record["of"]), tuple(record["layers"]), **tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the joint model in {path} is damaged: {error!r}") from error
        if found.digest != header.get("sha256"):
            raise ValueError(f"the joint model in {path} is damaged: its sha256 is not the one that it names")
        return found

    def standardise(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Vectors x [..., D] in units of the scale, about the mean; `out` may be x itself."""
        return torch.addcmul((-self.mean * self.scale).to(x.dtype), x, self.scale.to(x.dtype), out=out)

    def project(self, z: Tensor, count: int | None = None) -> Tensor:
        """The first `count` coordinates (None: all) of standardised vectors z [..., D]: [..., count]."""
        return z @ self.axes[:count].to(z.dtype).T

    def expand(self, c: Tensor) -> Tensor:
        """Standardised vectors [..., D] of their first n coordinates c [..., n]."""
        return c @ self.axes[: c.shape[-1]].to(c.dtype)

    def expand_prior(self, prior: Prior) -> Tensor:
        """Standardised vectors [B, T, D] that the ids make likely."""
        return prior.features @ self.prior_out.to(prior.features.dtype)

    def innovation(self, z: Tensor, prior: Prior | None, count: int | None = None) -> Tensor:
        """The first `count` coordinates c (None: all) of standardised vectors z [B, T, D]: what the ids do not tell."""
        c = self.project(z, count).float()
        return c if prior is None else c - prior.features.float() @ self._prior_along[:, :count]

    @cached_property
    def _prior_along(self) -> Tensor:
        """The part [r, m] of `prior_out` along the axes."""
        return self.prior_out.float() @ self.axes.float().T

    def reconstruct(self, c: Tensor, prior: Prior | None = None) -> Tensor:
        """Vectors x [B, T, D] of their first n coordinates c [B, T, n]; with a prior their lowest layer is exact."""
        z = self.expand(c)
        if prior is not None:  # added where z lies: a sum of its own would cost as much as the product
            z.flatten(0, -2).addmm_(prior.features.flatten(0, -2).to(z.dtype), self.prior_out.to(z.dtype))
        x = torch.addcdiv(self.mean.to(z.dtype), z, self.scale.to(z.dtype), out=None if z.requires_grad else z)
        if prior is not None and self.lowest_is_exact:
            x[..., : prior.lowest.shape[-1]] = prior.lowest
        return x

    def prior(self, model: PreTrainedModel, ids: Tensor, positions: Tensor) -> Prior:
        """What ids [B, T] at positions [B, T] tell of their tokens, in the precision of the model.

        The RECENT - 1 first tokens of a row hear of fewer before; they are meant to be sinks or padding.
        """
        return self.prior_of(lowest_layer(model, ids, positions))

    def prior_of(self, lowest: Tensor) -> Prior:
        """The same from the vectors [B, T, W] of the lowest layer."""
        return Prior(self.features(self.recent(lowest)), lowest)

    def features(self, near: Tensor) -> Tensor:
        """Features f [..., r], from what `recent` gives [..., RECENT W]."""
        return near @ self.prior_in.to(near.dtype)

    def recent(self, lowest: Tensor) -> Tensor:
        """What the features are linear in: the standardised lowest layer of RECENT tokens [B, T, RECENT W]."""
        return recent((lowest - self.lowest_mean.to(lowest)).mul_(self.lowest_scale.to(lowest)))

    @cached_property
    def without_ids(self) -> JointModel:
        """The same tokens for those who do not know the ids: the features are unknown as well.

        Its axes are the principal ones of what features and coordinates make together; what they leave joins the rest.
        """
        spread = torch.cat([self.variance, self.prior_variance]).sqrt()
        known = torch.cat([self.axes, self.prior_out]).double() * spread[:, None]
        rows = principal_rows(known.cpu()).to(self.axes.device)  # of falling length
        kept, left = rows[: len(self.axes)], rows[len(self.axes) :]
        return replace(
            self,
            axes=F.normalize(kept, dim=-1).to(self.axes.dtype),
            variance=kept.square().sum(-1).float(),
            rest=(self.rest + left.square().sum(0)).float(),
            prior_in=self.prior_in[:, :0],
            prior_out=self.prior_out[:0],
            prior_variance=self.prior_variance[:0],
        )


@one_thread()  # whose sums are the same whatever the number of threads
def principal_rows(rows: Tensor) -> Tensor:
    """Orthogonal rows [n, D] of falling length that have the sum of outer products of rows [n, D]."""
    turn = torch.linalg.eigh(rows @ rows.T).eigenvectors.flip(-1)
    found = turn.T @ rows
    return found * found.gather(1, found.abs().argmax(1, keepdim=True)).sign()  # a row has no direction of its own


def recent(z: Tensor) -> Tensor:
    """Vectors z [B, T, W] beside those of the RECENT - 1 tokens before, zero where there is none: [B, T, RECENT W]."""
    padded = F.pad(z, (0, 0, RECENT - 1, 0))
    return torch.cat([padded[:, RECENT - 1 - back : padded.shape[1] - back] for back in range(RECENT)], -1)
