"""A learned-step-size quantiser of the cache in KIVI's layout, trained by a straight-through estimator.

Keys are quantised by channel over groups of tokens, values by token over groups of channels (KIVI, Liu et al. 2024).
The levels of a group span its range; learned is by how much its step is wider or narrower than that, and how far all
levels are moved, one number each for a channel of keys and for a group of channels of values. Rounding passes the
gradient on, and a step has the gradient of LSQ (Esser et al. 2020, arXiv 1902.08153; its division by sqrt(N Q) does
nothing under Adam). Parameters begin at zero: untrained, this is KIVI bit for bit, and weight decay leads back to it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from cachemedic.core.errors import nearest_valid
from cachemedic.core.files import digest, read_sealed, replace_together, seal
from cachemedic.core.integers import whole_number
from cachemedic.core.quantise import Span, cache_bits, extremes, quantise_cache
from cachemedic.corruption.storage_faults import KIVI_GROUPS

WEIGHTS, CONFIG = "quantiser.safetensors", "quantiser.json"
BITS = (4, 3, 2)
TRAINED = ("both", "steps", "repair")


@dataclass(frozen=True)
class QuantiserConfig:
    """bits: 4, 3 or 2; group: tokens of a channel of keys, and channels of the values of a token, that share a range.

    trained: "both", the steps and the operator together; "steps" alone, read without repair; or "repair" alone, of what
    KIVI leaves.
    """

    bits: int
    group: int = KIVI_GROUPS[0]
    trained: str = "both"

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}, not {self.bits!r}")
        object.__setattr__(self, "group", whole_number("group", self.group, 1))
        if self.trained not in TRAINED:
            raise nearest_valid("what is trained with a quantiser", self.trained, TRAINED)


class KVQuantiser(nn.Module):
    """A stack of R quantisers of one cache; make one with `calibrated` or `from_pretrained`."""

    def __init__(self, config: QuantiserConfig, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        self.key_step = nn.Parameter(parameters["key_step"])  # [R, L, G, d], logarithms of multipliers of the step
        self.key_offset = nn.Parameter(parameters["key_offset"])  # [R, L, G, d], in halves of the range
        self.value_step = nn.Parameter(parameters["value_step"])  # [R, L, groups of the G * d channels]
        self.value_offset = nn.Parameter(parameters["value_offset"])

    @staticmethod
    def calibrated(config: QuantiserConfig, keys: Tensor, values: Tensor, runs: int = 1) -> KVQuantiser:
        """Untrained, which is KIVI: for caches with the layers and heads of clean keys and values [N, L, G, T, d].

        KIVI takes its ranges from what it stores, so that nothing else is measured. Raises `ValueError` for numbers
        that are not finite.
        """
        if not (keys.isfinite().all() and values.isfinite().all()):
            raise ValueError("a quantiser is made for clean caches: these hold numbers that are not finite")
        layers, heads, dim = keys.shape[1], keys.shape[2], keys.shape[-1]
        of_keys, of_values = (runs, layers, heads, dim), (runs, layers, -(heads * dim // -config.group))
        sizes = {"key_step": of_keys, "key_offset": of_keys, "value_step": of_values, "value_offset": of_values}
        return KVQuantiser(config, {name: torch.zeros(size) for name, size in sizes.items()})

    @property
    def runs(self) -> int:
        return len(self.key_step)

    def forward(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The cache as it is read back: keys and values [S, B, L, G, T, d], no padding -> [R, B, L, G, T, d] each.

        The R runs are seed-major, R / S to a seed. Gradients reach steps and offsets.
        """
        each = self.runs // len(keys)
        valid = torch.ones(keys.shape[-2], dtype=torch.bool, device=keys.device)
        spans = (
            _learned(*(x[:, None, ..., None, None] for x in (self.key_step, self.key_offset))),
            _learned(*(x[:, None, :, None, :, None] for x in (self.value_step, self.value_offset))),
        )
        keys, values = (x.repeat_interleave(each, 0) for x in (keys, values))
        return quantise_cache(keys, values, valid, self.config.bits, self.config.group, spans)

    def bits_per_token(self) -> float:
        """Stored bits of one cached token, all layers: numbers, and the zeros and scales of groups, 16 bits each.

        Multipliers are parameters, not stored by token.
        """
        _, layers, heads, dim = self.key_step.shape
        return layers * cache_bits(heads, dim, self.config.bits, self.config.group)

    def select(self, run: int) -> KVQuantiser:
        """Run number `run` as a quantiser of its own, a copy."""
        if not 0 <= run < self.runs:
            raise ValueError(f"run {run} is out of range: this quantiser has runs 0 to {self.runs - 1}")
        return self._of([run])

    def condition(self, number: int, conditions: int) -> KVQuantiser:
        """The runs of one of several conditions, a run a seed, a copy."""
        return self._of(list(range(number, self.runs, conditions)))

    def _of(self, runs: list[int]) -> KVQuantiser:
        return KVQuantiser(self.config, {name: p.detach()[runs].clone() for name, p in self.named_parameters()})

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
        return KVQuantiser(QuantiserConfig(**record), safetensors.torch.load(weights))


def _learned(log_step: Tensor, offset: Tensor) -> Span:
    """The range of each group, its width times exp(log_step), its middle moved by `offset` halves of the range."""
    step = log_step.exp()

    def span(groups: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        low, high = extremes(groups, counted)
        half = (high - low) / 2
        return low + half * (1 + offset - step), high + half * (offset + step - 1)  # exact where nothing is learned

    return span
