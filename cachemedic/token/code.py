"""The code of a token: a fixed number of bytes that tell its coordinates under the joint model.

What is coded is what the token ids do not tell of it. Bits go to coordinates by their variance (reverse water-filling),
each coordinate has the best quantiser for a normal number (`scalar_codes`), and the codes of a token are packed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from numbers import Real

import torch
from torch import Tensor

from cachemedic.core.errors import shown
from cachemedic.token.joint import JointModel, Prior
from cachemedic.token.scalar_codes import SCALE_LIMIT, allot_bits, decode, distortion, encode, pack, unpack

SHARES = tuple(2.0**-i for i in range(9, 2, -1))  # 1/512 to 1/8, what is usually asked for
WORD_BYTES = 2  # of a stored number in bf16, which shares are relative to


def check_share(share: float, numbers: int) -> None:
    """Raises `ValueError` unless `share` is of the bytes of a token of so many numbers, `TypeError` for no number."""
    if isinstance(share, bool) or not isinstance(share, Real):
        raise TypeError(f"share must be a number, such as 1/128, not {shown(share)}")
    least = 1 / (WORD_BYTES * numbers)
    if not least <= share <= 1:
        raise ValueError(
            f"share {share!r} is out of range: a number from {least:.2g}, one byte a token, to 1, all bytes"
        )


@dataclass(frozen=True, eq=False)
class TokenCode:
    """The code of tokens under a joint model in a `share` of the bytes of a bf16 cache.

    Raises `ValueError` for a share out of range.
    """

    joint: JointModel
    share: float = 1 / 128

    def __post_init__(self) -> None:
        check_share(self.share, self.joint.dim)

    @property
    def bytes_per_token(self) -> int:
        return int(self.share * WORD_BYTES * self.joint.dim)

    @cached_property
    def _allotted(self) -> tuple[Tensor, Tensor, Tensor]:
        """bits and spread [n] of the coordinates that are coded, left [m]: the variance of c that the code leaves."""
        variance = self.joint.variance
        # a coordinate that is (almost) constant gets no bits: rounding would decide its cell
        bits = allot_bits(variance.where(variance > SCALE_LIMIT**2, 0.0), 8 * self.bytes_per_token)
        left = variance * torch.tensor([distortion(b) for b in bits.tolist()], device=variance.device)
        count = int(bits.nonzero().max()) + 1 if bits.any() else 0
        return bits[:count].to(variance.device), variance[:count].sqrt().clamp_min(SCALE_LIMIT), left

    @property
    def bits(self) -> Tensor:
        """Bits [n] of each of the first coordinates."""
        return self._allotted[0]

    @property
    def left(self) -> Tensor:
        """Variance [m] of each coordinate once the code is known."""
        return self._allotted[2]

    def encode(self, x: Tensor, prior: Prior | None = None) -> Tensor:
        """The code of vectors x [B, T, D], uint8 [B, T, bytes_per_token]."""
        return self.encode_standardised(self.joint.standardise(x), prior)

    def encode_standardised(self, z: Tensor, prior: Prior | None = None) -> Tensor:
        """The code of standardised vectors z [B, T, D]."""
        bits, spread, _ = self._allotted
        packed = pack(encode(self.joint.innovation(z, prior, len(bits)) / spread, bits), bits)
        return torch.nn.functional.pad(packed, (0, self.bytes_per_token - packed.shape[-1]))

    def decode(self, packed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The first n coordinates c [B, T, n] of the tokens that were written as `packed`."""
        bits, spread, _ = self._allotted
        used = packed[..., : -(-int(bits.sum()) // 8)]
        return (decode(unpack(used, bits), bits) * spread).to(dtype)
