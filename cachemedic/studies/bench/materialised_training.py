"""Training the plain way: the repaired cache of every run is formed, read by the student, and measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from cachemedic.core.divergence import cache_norm, error_ratio, relative_square
from cachemedic.corruption.types import NONE
from cachemedic.models.load import Base
from cachemedic.repair.attach import protect
from cachemedic.repair.folded import FoldedOperator
from cachemedic.studies.bench.materialised import MaterialisedOperator, PresetLayer, materialised
from cachemedic.training.bank import Bank
from cachemedic.training.config import TrainConfig
from cachemedic.training.draws import Draw
from cachemedic.training.run_adam import RunAdam
from cachemedic.training.step_data import StepOutputs
from cachemedic.training.student import starting_at
from cachemedic.training.trainer import Trainer


class MaterialisedTrainer(Trainer):
    """A trainer without fold, Gram space and shared prefixes, for one decoded token and models without grouped heads.

    With `skip` the student begins at the first protected layer, if that is the first corrupted one; else at the bottom.
    """

    def __init__(self, base: Base, config: TrainConfig, folder: Path, bank: Bank, skip: bool) -> None:
        super().__init__(base, config, folder, bank)
        assert isinstance(self.operator, FoldedOperator)
        self.operator = materialised(self.operator)
        self.optimizer = RunAdam(self.operator.parameters(), lr=config.lr)
        if not skip:
            self.first = 0

    def forward(self, draw: Draw) -> StepOutputs:
        """See `Trainer.forward`."""
        config, bank, model, operator = self.config, self.bank, self.base.model, self.operator
        assert isinstance(operator, MaterialisedOperator)
        conditions = len(config.objectives)

        def by_run(x: Tensor) -> Tensor:  # [S, B, ...] -> [R*B, ...]
            return x.repeat_interleave(conditions, 0).flatten(0, 1)

        rows, keys, values = by_run(draw.rows), by_run(draw.keys), by_run(draw.values)
        # layers below the first are skipped: any tensor of the prefix's length stands for theirs
        stored = [max(layer - self.first, 0) for layer in range(model.config.num_hidden_layers)]
        cache = Cache([PresetLayer(keys[:, i], values[:, i]) for i in stored])
        positions = torch.full((len(rows), 1), bank.prefix)
        with starting_at(model, self.first, bank.hidden[rows, self.first]), protect(model, operator):
            logits = model(bank.ids[rows, bank.prefix :], past_key_values=cache, position_ids=positions).logits
        terms = []
        for layer in config.layers:
            clean = [by_run(x[draw.rows, layer]) for x in (bank.keys, bank.values)]
            corrupted = [x[:, layer - self.first] for x in (keys, values)]
            repaired = [x[:, :, : bank.prefix] for x in operator.repaired[layer]]
            terms.append(_layer_terms(clean, corrupted, repaired))
        stacked = {name: torch.stack([t[name] for t in terms], -1).unflatten(0, (config.runs, -1)) for name in terms[0]}
        untouched = [[e.type == NONE or e.severity == 0 for e in events] for events in draw.events]
        return StepOutputs(
            z_clean=bank.logits[rows].unflatten(0, (config.runs, -1)),
            z_rep=logits.unflatten(0, (config.runs, -1)),
            identity=stacked["identity"],
            rho=stacked["rho"],
            is_clean=torch.tensor(untouched).repeat_interleave(conditions, 0),
            is_corrupted=stacked["found"] > 0,
            parameters=list(operator.parameters()),
            rho_by_side={"rho_k": stacked["rho_k"], "rho_v": stacked["rho_v"]},
        )


def _layer_terms(clean: Sequence[Tensor], corrupted: Sequence[Tensor], repaired: Sequence[Tensor]) -> dict[str, Tensor]:
    """The terms of one layer, [R*B] each, from keys and values [R*B, H, T, d] in three states."""
    k, v = (cache_norm(x) for x in clean)
    left_k, left_v = (cache_norm(x - y) for x, y in zip(repaired, clean, strict=True))
    found_k, found_v = (cache_norm(x - y) for x, y in zip(corrupted, clean, strict=True))
    return {
        "identity": relative_square((left_k, left_v), (k, v)),
        "rho": error_ratio(left_k + left_v, found_k + found_v),
        "rho_k": error_ratio(left_k, found_k),
        "rho_v": error_ratio(left_v, found_v),
        "found": found_k + found_v,
    }
