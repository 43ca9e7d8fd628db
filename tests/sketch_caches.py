"""Sketch caches of tiny calibrated models, for the tests of `SketchCache`."""

import functools

import torch
from small_models import VOCABULARY, model_of, padded_batch

from cachemedic import RepairOperator, protect
from cachemedic.models.load import Base
from cachemedic.token.layerwise.calibration import calibrate, vectors_of
from cachemedic.token.layerwise.operator import DEAD_ZONE
from cachemedic.token.layerwise.sketch_cache import SketchCache

NEW = 7  # generated tokens


@functools.cache
def protected(name: str, family: str = "layerwise-E", dtype: torch.dtype = torch.float32, **options):
    """A model and an operator for it, calibrated on random ids and as strong as it can be without training."""
    model = model_of(name).to(dtype)
    ids = torch.randint(1, VOCABULARY, (24, 60), generator=torch.Generator().manual_seed(0))
    base = Base(model, None, name)
    own = {"share": 0.5} if family == "layerwise-E" else {}
    operator = RepairOperator.create(family, model.config, layers=range(3), **(own | options))
    operator = calibrate(operator, base, vectors_of(base, ids))
    with torch.no_grad():
        operator.strength.fill_(1)
    return model, operator


def write(model, cache, ids, mask, ends):
    """Forward passes up to each of `ends`; the logits of the last."""
    start = int(cache.get_seq_length())
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    for end in ends:
        logits = model(
            ids[:, start:end], attention_mask=mask[:, :end], position_ids=positions[:, start:end], past_key_values=cache
        ).logits
        start = end
    return logits


def filled(name, length=12, scrub="load", storage=None, family="layerwise-E", **options):
    """Model, operator, a cache of a padded batch, and the batch."""
    model, operator = protected(name, family, **options)
    ids, mask = padded_batch(length=length)
    cache = SketchCache(model, operator, scrub, storage)
    with protect(model, operator):
        write(model, cache, ids, mask, [length])
    return model, operator, cache, ids, mask


def assert_sound(cache):
    """A scrub finds no damage and changes nothing."""
    report = cache.scrub()
    assert report.tokens > 0
    assert sum(report.changed) == 0
    assert report.suspicion.max() <= DEAD_ZONE
