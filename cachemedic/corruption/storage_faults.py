"""Faults that happen in real storage: flipped bits, pages of another request, lossy group quantisation.

Rules like those of `cachemedic.corruption.types`, given by their parameter alone: their severity is not calibrated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from cachemedic.core.quantise import UniformLevels, quantise_in_groups
from cachemedic.corruption.types import Stored, contiguous_overwrite, register_corruption

PAGE = 16  # positions; the block size of vLLM (Kwon et al. 2023, arXiv 2309.06180)
KIVI_GROUPS = (32, 64, 128)  # KIVI's default and the larger ones of its ablation


# --- flipped bits -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StorageFormat:
    """Stored words: a number format, the integers of its width, and its bit fields as (lowest bit, number of bits)."""

    dtype: torch.dtype
    integer: torch.dtype
    fields: dict[str, tuple[int, int]]


def _ieee(dtype: torch.dtype, integer: torch.dtype, exponent: int, mantissa: int) -> StorageFormat:
    fields = {"mantissa": (0, mantissa), "exponent": (mantissa, exponent), "sign": (mantissa + exponent, 1)}
    return StorageFormat(dtype, integer, {"all": (0, mantissa + exponent + 1), **fields})


FORMATS = {
    "fp32": _ieee(torch.float32, torch.int32, exponent=8, mantissa=23),
    "fp16": _ieee(torch.float16, torch.int16, exponent=5, mantissa=10),
    "bf16": _ieee(torch.bfloat16, torch.int16, exponent=8, mantissa=7),
    # two's complement has no exponent; its bits below the sign count as the mantissa
    "int8": StorageFormat(torch.int8, torch.int8, {"all": (0, 8), "mantissa": (0, 7), "sign": (7, 1)}),
}


def bernoulli_indices(n: int, p: float, generator: torch.Generator) -> torch.Tensor:
    """The successes of `n` independent trials of probability 0 < p < 1: ascending indices, int64 [number of them].

    Draws the geometric gaps between successes, hence only as many numbers as there are successes.
    """
    parts, last = [], -1
    while last < n - 1:
        count = int(p * (n - 1 - last)) + 1  # as many as are expected; if they fall short, the loop goes on
        u = torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64)
        failures = (torch.log1p(-u) / math.log1p(-p)).floor_().clamp_(max=n)
        parts.append(last + (failures.long() + 1).cumsum(0))
        last = int(parts[-1][-1])
    drawn = torch.cat(parts)
    return drawn[drawn < n]


def flip_bits(x: torch.Tensor, storage: str, field: str, flips: torch.Tensor) -> torch.Tensor:
    """`x`, of any shape, as it is read back after it was stored in `storage` and lost the bits `flips` of a `field`.

    The bits of the field are numbered through from the first element to the last, in each from the lowest bit up.
    Floating-point formats are returned in their own dtype, with every bit that was not flipped as the conversion of `x`
    left it. int8 is returned in the dtype of `x`: it has a symmetric scale per vector (the last dimension), kept in
    bf16, which no flip hits. NaN and infinities stay; int8, which has no words for them, takes its scale without them.
    """
    form = FORMATS[storage]
    low, width = form.fields[field]
    sound = x.masked_fill(~x.isfinite(), 0)
    # a scale of few bits makes every stored value exact: what was stored once is stored alike again
    levels = UniformLevels.symmetric(sound.abs().amax(-1, keepdim=True), 127, torch.bfloat16)
    if storage == "int8":
        words = levels.codes(sound, -127, 127).to(form.dtype)
    else:
        words = x.to(form.dtype).contiguous().view(form.integer)
    flips = flips.to(x.device)
    mask = torch.zeros(words.numel(), dtype=form.integer, device=x.device)
    # the bits that one word loses are different ones: their sum is their XOR
    mask.index_add_(0, flips // width, (1 << (low + flips % width)).to(form.integer))
    words = words ^ mask.view(words.shape)
    return torch.where(x.isfinite(), levels.read(words.to(x)), x) if storage == "int8" else words.view(form.dtype)


def bit_flips(stored: Stored, storage: str, field: str) -> torch.Tensor:
    """Every stored bit of the field flips with probability p."""
    n_bits = stored.x.numel() * FORMATS[storage].fields[field][1]
    return flip_bits(stored.x, storage, field, bernoulli_indices(n_bits, stored.parameter, stored.generator))


# --- pages ------------------------------------------------------------------------------------------------------------


def page_mask(share: float, start: int, stop: int, u: torch.Tensor) -> torch.Tensor:
    """The positions [T] of a random `share` of the pages that overlap [start, stop), at least one unless it is zero.

    Positions outside [start, stop) are left out, and the last page may be short. `u` [T] are uniform draws.
    """
    pages = torch.arange(start // PAGE, (stop - 1) // PAGE + 1)
    n = max(math.ceil(share), round(share * len(pages)))
    hit = pages[u[pages * PAGE].argsort(stable=True)[:n]]
    positions = torch.arange(len(u))
    return torch.isin(positions // PAGE, hit) & (positions >= start) & (positions < stop)


def page_offset(u: float, n_positions: int) -> int:
    """A random distance between two whole pages of a cache, in positions; 0 where there is only one page."""
    others = n_positions // PAGE - 1
    return PAGE * (1 + int(u * others)) if others > 0 else 0


@register_corruption("stale_page", "the share of pages", high=1.0, needs_donor=True, paged=True)
def stale_page(stored: Stored) -> torch.Tensor:
    """Pages that were never written: they hold what an older prompt had at *other* positions, pages away.

    The content and its positions are wrong. The distance is one per event, for keys, values and all layers.
    """
    assert stored.donor is not None  # `corrupt` checks the donor before any rule runs
    positions = torch.arange(stored.x.shape[2], device=stored.x.device)
    whole = len(positions) // PAGE * PAGE or len(positions)  # the last page may be short: no page is read from it
    return stored.donor[:, :, (positions + stored.offset) % whole]


# --- quantisation -----------------------------------------------------------------------------------------------------


def kivi_quant(stored: Stored, group: int) -> torch.Tensor:
    """n-bit quantise-dequantise in the layout of KIVI (Liu et al. 2024, arXiv 2402.02750), round to nearest.

    Asymmetric (minimum and range), keys per channel over groups of tokens, values per token over groups of channels;
    ranges are taken over what is hit, a group at the end may be short, and minimum and scale are kept unrounded.
    KIVI's full-precision window of recent tokens is the mask ("old_only", n). NaN and infinities stay.
    """
    x, counted, bits = stored.x, stored.hit & stored.x.isfinite(), int(stored.parameter)
    if stored.is_key:
        return quantise_in_groups(x.mT, counted.mT, bits, group).mT
    return quantise_in_groups(x, counted, bits, group)


# --- the types --------------------------------------------------------------------------------------------------------


def _register_bit_flips(name: str, storage: str, field: str) -> None:
    @register_corruption(name, "the probability p per bit", high=0.5)
    def flip(stored: Stored) -> torch.Tensor:
        return bit_flips(stored, storage, field)


def _register_kivi_quantisation(name: str, group: int) -> None:
    @register_corruption(name, "the number of bits", low=1.0, high=8.0, whole=True)
    def quantise(stored: Stored) -> torch.Tensor:
        return kivi_quant(stored, group)


@register_corruption("page_swap", "the share of pages", high=1.0, needs_donor=True, paged=True)
def page_swap(stored: Stored) -> torch.Tensor:
    """Each side of an exchange receives the other's pages at the same positions."""
    return contiguous_overwrite(stored)


for _storage, _form in FORMATS.items():  # `bitflip_bf16` flips any bit, `bitflip_bf16_sign` sign bits only, and so on
    for _field in _form.fields:
        _register_bit_flips(f"bitflip_{_storage}" + ("" if _field == "all" else f"_{_field}"), _storage, _field)
for _group in KIVI_GROUPS:
    _register_kivi_quantisation("kivi_quant" + ("" if _group == KIVI_GROUPS[0] else f"_{_group}"), _group)

BIT_ERROR_RATES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
PAGE_SHARES = (0.125, 0.25, 0.5, 1.0)
FAULT_GRID: dict[str, tuple[float, ...]] = {  # the faults of the experiments and the parameters that they are run at
    **{f"bitflip_{storage}": BIT_ERROR_RATES for storage in FORMATS},
    **{f"bitflip_bf16_{field}": BIT_ERROR_RATES for field in ("sign", "exponent", "mantissa")},
    "page_swap": PAGE_SHARES,
    "stale_page": PAGE_SHARES,
    "kivi_quant": (8, 4, 3, 2),
}
