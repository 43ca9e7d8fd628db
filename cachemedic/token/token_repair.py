"""Operators that repair whole tokens as they are stored, and such an operator as a defense beside all others."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cachemedic.core.errors import nearest_valid
from cachemedic.core.keys_values import KeysValues
from cachemedic.defenses.defense import CachedTokens, Defense, cache_bytes_per_token
from cachemedic.models.load import check_format
from cachemedic.repair.attention import Attention, Gates
from cachemedic.repair.operator import RepairOperator
from cachemedic.token.hashes import HASH_BYTES, PART_BYTES
from cachemedic.token.joint import SINKS
from cachemedic.token.kept import Kept
from cachemedic.token.vectors import TokenVectors

OPERATOR_WAYS = ("restore", "estimate")


class TokenOperator(RepairOperator):
    """What families that repair stored tokens share: D, E, and those that others add.

    A family overrides `repair_with_prior`, and what it needs of `prior` and `write_tokens`. What these two return has
    `rows(index)`, the same of some rows of the batch.
    """

    repairs_tokens = True

    def attend(
        self, layer: int, attention: Attention, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor | None, Gates]:
        """Plain attention: what is stored is repaired before."""
        return *attention(query, key, value), (None, None)

    @property
    def idle_because(self) -> str:
        return "D and E repair what is stored: give the model past_key_values=SketchCache(model, operator) instead"

    def defense(self, model: PreTrainedModel) -> TokenRepair:
        """See `RepairOperator`."""
        return TokenRepair(model, self)

    def prior(self, model: PreTrainedModel, ids: Tensor, positions: Tensor) -> Any:
        """What ids [B, T] at positions [B, T] tell of their tokens; None for nothing."""
        return None

    def write_tokens(
        self, model: PreTrainedModel, keys: Tensor, values: Tensor, ids: Tensor, positions: Tensor, lossy: bool = False
    ) -> Any:
        """What is kept of clean keys and values [B, L, G, T, d] of all layers; None for nothing.

        ids and positions [B, T], positions -1 for padding; lossy: of a cache stored in few bits (see `Kept`).
        """
        return None

    @abstractmethod
    def repair_with_prior(
        self,
        vectors: TokenVectors,
        keys: Tensor,
        values: Tensor,
        prior: Any,
        positions: Tensor,
        kept: Any = None,
        way: str = "estimate",
    ) -> KeysValues:
        """`repair`, where `prior` is known and `vectors` are those of the model and the protected layers."""

    def repair(
        self,
        model: PreTrainedModel,
        keys: Tensor,
        values: Tensor,
        ids: Tensor,
        positions: Tensor,
        kept: Any = None,
        way: str = "estimate",
    ) -> KeysValues:
        """Keys and values [B, L, G, T, d] of all layers, those protected are repaired, by one of `OPERATOR_WAYS`."""
        prior = self.prior(model, ids, positions)
        return self.repair_in_use(TokenVectors(model, self.layers), keys, values, prior, positions, kept, way)

    def repair_in_use(self, *read: Any) -> KeysValues:
        """`repair_with_prior`, for a family that repairs otherwise where it is used than in training."""
        return self.repair_with_prior(*read)

    def repair_stored(
        self,
        model: PreTrainedModel,
        clean: KeysValues,
        found: KeysValues,
        ids: Tensor,
        index: Tensor,
        lossy: bool = False,
    ) -> KeysValues:
        """See `Trainable`: what the ids tell, and what was kept, are those of the clean cache."""
        positions = torch.arange(ids.shape[1], device=found[0].device).expand(len(ids), -1)
        vectors = TokenVectors(model, self.layers)
        with torch.no_grad():
            prior = self.prior(model, ids, positions)
            kept = self.write_tokens(model, *clean, ids, positions, lossy)
        prior, kept = (None if x is None else x.rows(index) for x in (prior, kept))
        return self.repair_with_prior(vectors, *found, prior, positions[index], kept)


def wrong_family(operator: object) -> TypeError:
    """The error about what is no operator that repairs stored tokens."""
    found = getattr(getattr(operator, "config", None), "family", type(operator).__name__)
    return TypeError(f"an operator of family D or E is needed, which repair stored tokens, not {found}")


class TokenRepair(Defense):
    """A calibrated operator of family D or E, or of another `TokenOperator`, at work on the caches of one model.

    way: "estimate", from the code and from what is left of a damaged token, or "restore", from code and ids alone.
    With the hashes that E keeps, tokens that are as they were written keep every bit. lossy: the cache is stored in few
    bits on purpose, E keeps nothing of it but the code, and all of it is repaired.
    Raises `TypeError` for an operator of another kind, `ValueError` for an unknown way, for an operator that is not
    calibrated or of another model, and for a model of a number format that `load_base` does not serve.
    """

    def __init__(
        self, model: PreTrainedModel, operator: RepairOperator, way: str = "estimate", lossy: bool = False
    ) -> None:
        if way not in OPERATOR_WAYS:
            raise nearest_valid("way of repair", way, OPERATOR_WAYS)
        if not isinstance(operator, TokenOperator):
            raise wrong_family(operator)
        operator.check_model(model.config)
        check_format(model.dtype)
        self.fixed = operator.fixed_bytes  # refuses one that is not calibrated
        self.model, self.operator, self.way, self.lossy = model, operator, way, lossy

    @property
    def runs(self) -> int:
        """Of the operator; batch rows are run-major."""
        return self.operator.runs

    @property
    def bytes_per_token(self) -> float:
        """Of code and hashes."""
        hashes = 0 if self.lossy else HASH_BYTES + PART_BYTES * len(self.operator.layers)
        return self.operator.bytes_per_token + hashes if self.operator.bytes_per_token else 0

    @property
    def cache_bytes(self) -> int:
        """Of the first positions, which are kept as they are."""
        whole = cache_bytes_per_token(self.operator.config.model)
        return SINKS * whole if self.operator.bytes_per_token and not self.lossy else 0

    @property
    def fixed_bytes(self) -> int:
        return self.fixed

    @torch.no_grad()
    def write(self, clean: CachedTokens) -> Kept | None:
        """Codes, hashes and the first positions; None for D."""
        clean = clean.to(self.model.device)
        written = clean.k, clean.v, clean.ids, clean.positions
        return self.operator.write_tokens(self.model, *written, lossy=self.lossy)

    @torch.no_grad()
    def read(self, damaged: CachedTokens, kept: Kept | None) -> CachedTokens:
        """The repaired cache."""
        here = damaged.to(self.model.device)
        k, v = self.operator.repair(self.model, here.k, here.v, here.ids, here.positions, kept, self.way)
        return replace(here, k=k, v=v).to(damaged.k.device)
