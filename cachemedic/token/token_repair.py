"""An operator of D or E as a defense, to be measured beside all others."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from cachemedic.core.errors import nearest_valid
from cachemedic.defenses.defense import CachedTokens, Defense, cache_bytes_per_token
from cachemedic.token.coder import check_operator
from cachemedic.token.hashes import HASH_BYTES, PART_BYTES
from cachemedic.token.joint import SINKS
from cachemedic.token.joint_operator import JointOperator
from cachemedic.token.kept import Kept

WAYS = ("restore", "estimate")


class TokenRepair(Defense):
    """A calibrated operator of family D or E at work on the caches of one model.

    way: "estimate", from the code and from what is left of a damaged token, or "restore", from the code alone. With the
    hashes that E keeps, tokens that are as they were written keep every bit. lossy: the cache is stored in few bits on
    purpose, E keeps nothing of it but the code, and all of it is repaired.
    Raises what `check_operator` raises, and `ValueError` for an unknown way.
    """

    def __init__(
        self, model: PreTrainedModel, operator: JointOperator, way: str = "estimate", lossy: bool = False
    ) -> None:
        if way not in WAYS:
            raise nearest_valid("way of repair", way, WAYS)
        check_operator(model, operator)
        self.fixed = operator.fixed_bytes
        self.model, self.operator, self.way, self.lossy = model, operator, way, lossy

    @property
    def runs(self) -> int:
        """Of the operator; batch rows are run-major."""
        return self.operator.runs

    @property
    def bytes_per_token(self) -> float:
        """Of code and hashes."""
        hashes = 0 if self.lossy else HASH_BYTES + PART_BYTES * len(self.operator.layers)
        return self.operator.bytes_per_token + hashes if self.operator.code is not None else 0

    @property
    def cache_bytes(self) -> int:
        """Of the first positions, which are kept as they are."""
        whole = cache_bytes_per_token(self.operator.config.model)
        return SINKS * whole if self.operator.code is not None and not self.lossy else 0

    @property
    def fixed_bytes(self) -> int:
        return self.fixed

    @torch.no_grad()
    def write(self, clean: CachedTokens) -> Kept | None:
        """Codes, hashes and the first positions; None for D."""
        written = clean.k, clean.v, clean.ids, clean.positions
        return self.operator.write_tokens(self.model, *written, lossy=self.lossy)

    @torch.no_grad()
    def read(self, damaged: CachedTokens, kept: Kept | None) -> CachedTokens:
        """The repaired cache."""
        k, v = self.operator.repair(self.model, damaged.k, damaged.v, damaged.ids, damaged.positions, kept, self.way)
        return replace(damaged, k=k, v=v)
