"""A learned-step-size quantiser of the cache: b bits a number, steps trained through a straight-through estimator.

Keys are quantised by channel, with one step a channel; values by token, each group of channels over its own range, with
a learned multiplier of that range (the layout of KIVI, Liu et al. 2024). Steps are learned as in LSQ (Esser et al.
2020, arXiv 1902.08153): rounding passes the gradient on, and the gradient of a step is divided by sqrt(N Q) for N
numbers that share it and Q levels a side. The parameters are logarithms of multipliers that begin at zero: untrained,
this is rounding to nearest, and weight decay leads back to it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from cachemedic.core.files import digest, read_sealed, replace_together, seal
from cachemedic.core.integers import whole_number
from cachemedic.core.quantise import UniformLevels

WEIGHTS, CONFIG = "quantiser.safetensors", "quantiser.json"
BITS = (4, 3, 2)
LARGEST = torch.finfo(torch.float16).max
SCALE_BITS = 16  # of each stored minimum and step of a group of values


@dataclass(frozen=True)
class QuantiserConfig:
    """bits: 4, 3 or 2; group: channels of a value that share a range (None: all of a head).

    alone: train the steps only, the operator stays the identity.
    """

    bits: int
    group: int | None = None
    alone: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}, not {self.bits!r}")
        if self.group is not None:
            object.__setattr__(self, "group", whole_number("group", self.group, 1))

    @property
    def levels(self) -> int:
        return 2**self.bits


class KVQuantiser(nn.Module):
    """A stack of R quantisers of one cache; make one with `calibrated` or `from_pretrained`."""

    key_middle: Tensor  # [L, G, d]
    key_step: Tensor  # [L, G, d]

    def __init__(self, config: QuantiserConfig, buffers: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        for name, value in buffers.items():
            self.register_buffer(name, value)
        self.log_key = nn.Parameter(parameters["log_key"])  # [R, L, G, d]
        self.log_value = nn.Parameter(parameters["log_value"])  # [R, L, G, d / group]

    @staticmethod
    def calibrated(config: QuantiserConfig, keys: Tensor, values: Tensor, runs: int = 1) -> KVQuantiser:
        """Untrained, rounding to nearest, with steps that cover the range of the clean `keys` [N, L, G, T, d].

        Raises `ValueError` if the group does not divide the head size, and for numbers that are not finite.
        """
        dim = keys.shape[-1]
        group = config.group or dim
        if dim % group:
            raise ValueError(f"a group of {group} channels does not divide the head size, {dim}")
        if not (keys.isfinite().all() and values.isfinite().all()):
            raise ValueError("a quantiser is calibrated on clean caches: these hold numbers that are not finite")
        by_channel = keys.permute(1, 2, 4, 0, 3).flatten(3)  # [L, G, d, N*T]
        low, high = by_channel.aminmax(dim=-1)
        middle = (low + high) / 2
        # a channel that was constant has a step that its key can be divided by, and the square of it, too
        largest, known = by_channel.abs().amax(), torch.finfo(keys.dtype)
        least = known.eps * torch.where(largest > known.tiny / known.eps, largest, 1.0)
        step = (high - low).clamp_min(least) / (config.levels - 1)
        groups = *values.shape[1:3], dim // group
        zeros = {"log_key": torch.zeros(runs, *step.shape), "log_value": torch.zeros(runs, *groups)}
        buffers = {"key_middle": middle, "key_step": step}
        return KVQuantiser(config, buffers, zeros)

    @property
    def runs(self) -> int:
        return len(self.log_key)

    def forward(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The cache as it is read back: keys and values [S, B, L, G, T, d] -> [R, B, L, G, T, d] each.

        The R runs are seed-major, R / S to a seed. Gradients reach the steps, and numbers within their range.
        Raises `ValueError` for values beyond what the 16 bits of a stored minimum hold.
        """
        if (largest := float(values.detach().abs().max())) > LARGEST:
            raise ValueError(
                f"values of up to {largest:g} cannot be quantised: their ranges are stored in half precision, "
                f"up to {LARGEST:,.0f}"
            )
        levels, each = self.config.levels, self.runs // len(keys)
        tokens = keys.shape[1] * keys.shape[-2]
        log_key = _normalised(self.log_key, tokens, levels)[:, None, :, :, None]  # [R, 1, L, G, 1, d]
        step = self.key_step[:, :, None] * log_key.exp()
        middle = self.key_middle[:, :, None]
        quantised_keys = _snap(keys.repeat_interleave(each, 0), UniformLevels(step, middle), levels)
        groups = self.log_value.shape[-1]
        group = values.shape[-1] // groups
        grouped, centre, width = (x.repeat_interleave(each, 0) for x in _ranges(values, group, levels))
        log_value = _normalised(self.log_value, tokens * group, levels)[:, None, :, :, None, :, None]
        quantised_values = _snap(grouped, UniformLevels(width * log_value.exp(), centre), levels)
        return quantised_keys, quantised_values.flatten(-2)

    def bits_per_token(self) -> int:
        """Stored bits of one cached token, all layers: numbers, and the 16-bit middle and step of each group of values.

        Steps of keys are parameters, not stored by token.
        """
        numbers, groups = self.key_step.numel(), self.log_value[0].numel()
        return 2 * numbers * self.config.bits + 2 * SCALE_BITS * groups

    def select(self, run: int) -> KVQuantiser:
        """Run number `run` as a quantiser of its own, a copy."""
        if not 0 <= run < self.runs:
            raise ValueError(f"run {run} is out of range: this quantiser has runs 0 to {self.runs - 1}")
        one = {name: p.detach()[run : run + 1].clone() for name, p in self.named_parameters()}
        return KVQuantiser(self.config, {name: b.clone() for name, b in self.named_buffers()}, one)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `quantiser.safetensors` and `quantiser.json` into `folder`, as one."""
        weights = safetensors.torch.save({name: x.contiguous() for name, x in self.state_dict().items()})
        record = asdict(self.config) | {"sha256": digest(weights)}
        replace_together(Path(folder), {WEIGHTS: weights, CONFIG: seal(record)}, last=CONFIG)

    @staticmethod
    def from_pretrained(folder: str | Path) -> KVQuantiser:
        """Read what `save_pretrained` wrote (on the CPU).

        Raises `FileNotFoundError` if a file is missing, `ValueError` if one is damaged or they do not belong together.
        """
        folder = Path(folder)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no quantiser: it has no file {name}")
        record, weights = read_sealed(folder / CONFIG), (folder / WEIGHTS).read_bytes()
        if digest(weights) != record.pop("sha256"):
            raise ValueError(f"{folder / WEIGHTS} is damaged or not of this {CONFIG}")
        tensors = safetensors.torch.load(weights)
        # in the order of a new quantiser: the file has none
        buffers, parameters = (
            {name: tensors[name] for name in names} for names in (("key_middle", "key_step"), ("log_key", "log_value"))
        )
        return KVQuantiser(QuantiserConfig(**record), buffers, parameters)


def _snap(x: Tensor, uniform: UniformLevels, levels: int) -> Tensor:
    """x as it is read from the nearest of an even number of `levels` about the zero, at half a step and so on.

    The gradient passes within their span only.
    """
    place = uniform.place(x)
    inside = place.clamp(-levels / 2, levels / 2)
    nearest = ((place - 0.5).round() + 0.5).clamp(-(levels - 1) / 2, (levels - 1) / 2)
    return uniform.read(inside + (nearest - inside).detach())


def _ranges(values: Tensor, group: int, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values by group [..., T, d / group, group], and of each group the middle and the step that covers its range,
    as they are stored, in 16 bits [..., T, d / group, 1]."""
    grouped = values.unflatten(-1, (-1, group))
    low, high = grouped.aminmax(dim=-1, keepdim=True)
    middle = ((low + high) / 2).half().to(values.dtype)
    step = ((high - low) / (levels - 1)).half().to(values.dtype)
    return grouped, middle, step.clamp_min(torch.finfo(torch.float16).tiny)


def _normalised(parameter: Tensor, shared_by: int, levels: int) -> Tensor:
    """`parameter` with its gradient over sqrt(N Q) (LSQ)."""
    scale = (shared_by * levels / 2) ** -0.5
    scaled = parameter * scale
    return scaled + (parameter - scaled).detach()
