"""Calibrated operators of families D and E for tiny bases, and sound and damaged caches with padding for them."""

from dataclasses import dataclass
from functools import cache

import torch
from tiny import VOCABULARY
from tiny_training import tiny_base
from transformers import DynamicCache

from cachemedic.models.cache import stack_cache
from cachemedic.models.load import Base
from cachemedic.repair.operator import RepairOperator
from cachemedic.token.layerwise.calibration import calibrate, vectors_of
from cachemedic.token.layerwise.observation import observe
from cachemedic.token.layerwise.operator import Repair, TokenAware
from cachemedic.token.layerwise.scrub import Scrubber, positions_of
from cachemedic.token.layerwise.token_vectors import split

LAYERS = (0, 1, 2)
LENGTHS = (14, 9, 12, 14)  # of the rows of a `Case`


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids that begin with that of the end of a text."""
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 0
    return ids


@cache
def base_of(architecture: str) -> Base:
    return tiny_base(architecture)


@cache
def _reference(architecture: str, family: str, layers: tuple[int, ...], **options) -> TokenAware:
    base = base_of(architecture)
    operator = RepairOperator.create(family, base.model.config, layers, **options)
    return calibrate(operator, base, vectors_of(base, random_ids(12, 48)))


def calibrated(
    architecture="gpt2", family="layerwise-E", layers=LAYERS, runs=1, seed=0, strength=1.0, **options
) -> TokenAware:
    """A calibrated operator that is at work; with few coordinates, as tiny heads have few."""
    options = {"coordinates": 4, "share": 0.05, **options}
    if family == "layerwise-D":
        del options["share"]
    known = _reference(architecture, family, layers, **options)
    model_config = base_of(architecture).model.config
    operator = RepairOperator.create(family, model_config, layers, runs=runs, seed=seed, **options)
    operator.hold(known.transform, known.code)
    with torch.no_grad():
        operator.strength.fill_(strength / 32)
    return operator


@dataclass
class Case:
    """Rows with padding on the left: k, v [B, L, G, T, d] clean, of ids and valid [B, T]."""

    k: torch.Tensor
    v: torch.Tensor
    ids: torch.Tensor
    valid: torch.Tensor

    def damaged(self, where: torch.Tensor, size: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values with noise of `size` standard deviations at the tokens `where` [B, T], in all layers."""
        generator = torch.Generator().manual_seed(4)
        hit = where[:, None, None, :, None]
        return tuple(x + hit * size * x.std() * torch.randn(x.shape, generator=generator) for x in (self.k, self.v))


@cache
def case(architecture: str = "gpt2", seed: int = 1) -> Case:
    model, length = base_of(architecture).model, max(LENGTHS)
    valid = torch.arange(length) >= length - torch.tensor(LENGTHS)[:, None]
    ids = random_ids(len(LENGTHS), length, seed) * valid
    stored = DynamicCache()
    with torch.inference_mode():
        model.base_model(
            ids, attention_mask=valid.long(), position_ids=(valid.cumsum(1) - 1).clamp_min(0), past_key_values=stored
        )
    return Case(*(x.clone() for x in stack_cache(stored)), ids, valid)


def repair_at_once(scrubber: Scrubber, k, v, ids, valid, codes) -> tuple[torch.Tensor, torch.Tensor, Repair]:
    """The slow reference of a scrub of all layers: every token goes through the operator, and gradients flow."""
    operator, positions = scrubber.operator, positions_of(valid)
    known = scrubber.known(ids, positions)
    sketch = None if codes is None else operator.code.understand(codes, positions == 0, known)
    seen = observe(operator.transform, k, v, positions, scrubber.rotation.at(positions))
    repair = operator.repair(seen, known, sketch)
    return *split(seen.stored + repair.correction, k.shape[2]), repair
