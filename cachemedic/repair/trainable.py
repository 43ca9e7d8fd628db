"""What training asks of a family of operators; what a family does not say, it does without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cachemedic.core.keys_values import KeysValues
from cachemedic.data.text_source import TextSource
from cachemedic.defenses.defense import Defense
from cachemedic.models.load import Base
from cachemedic.repair.attention import Gates


class Trainable(Defense):
    """A defense with parameters, of R runs that train together."""

    repairs_tokens = False  # tokens as they are stored, by `repair_stored`; else what attention reads

    @classmethod
    def shipped_statistics(cls, base_name: str) -> str | None:
        """The digest of the statistics of clean tokens that come with a base and that `prepare` takes; None without."""
        return None

    def prepare(
        self, base: Base, source: TextSource, ids: Tensor, faults: Sequence[str], statistics: Any = None
    ) -> None:
        """Before training: measures clean tokens on text of `source`, unless their `statistics` are given, and fits its
        parameters to types of `faults` in texts ids [N, T].
        """

    def repair_stored(
        self,
        model: PreTrainedModel,
        clean: KeysValues,
        found: KeysValues,
        ids: Tensor,
        index: Tensor,
        lossy: bool = False,
    ) -> KeysValues:
        """The caches that the runs read in place of those they have `found`, [R*B, L, G, T, d], with a gradient.

        clean [N, L, G, T, d]: what was written of texts ids [N, T]; index [R*B]: the text of each row; lossy: caches
        are stored in few bits on purpose.
        """
        return found

    def repair_terms(self, layer: int, clean: KeysValues, found: KeysValues, gates: Gates) -> dict[str, Tensor]:
        """What is measured of repair inside attention in one layer, [R, B] each; of no damage as it stands.

        `identity`, `rho`, `rho_k`, `rho_v`, see `cachemedic.core.divergence` (NaN: there is none), and `found`: the
        size of the damage, 0 where rho does not count. clean, found [S, B, G, T, d] of S seeds; gates [R, B, H, M, r].
        """
        none = found[0].new_zeros(self.runs, found[0].shape[1])
        missing = torch.full_like(none, torch.nan)
        return {"identity": none, "rho": none, "rho_k": missing, "rho_v": missing, "found": none}
