"""Caches that know what was written, of small models, and ways to damage them."""

import torch
from joint_operators import operator_of
from small_models import model_of, padded_batch

from cachemedic.token.cache import SketchCache

NEW = 7  # generated tokens
LENGTH = 40
SLOTS = [1, 3, 9, 20, 31, 35]  # of row 0: two sinks, three tokens with a code, one without (row 0 has no padding)


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


def filled(name="llama", length=12, storage=None, operator=None, seed=1, dtype=torch.float32):
    """A model, a cache of a padded batch, and the batch."""
    model = model_of(name).to(dtype)
    ids, mask = padded_batch(length=length, seed=seed)
    cache = SketchCache(model, operator, storage=None if storage is None else storage(model.config))
    write(model, cache, ids, mask, [length])
    return model, cache, ids, mask


def shift(cache, row, slots, layers=(0, 1, 2), by=0.7):
    """Adds noise to the keys and values of some tokens."""
    generator = torch.Generator().manual_seed(3)
    for layer in layers:
        for stored in (cache.layers[layer].keys, cache.layers[layer].values):
            shape = stored[row, :, slots].shape
            stored[row, :, slots] += (by * torch.randn(shape, generator=generator)).to(stored.dtype)


def numbers(cache):
    """A copy of all that the cache stores."""
    return [getattr(layer, side).clone() for layer in cache.layers for side in ("keys", "values")]


def damaged(name="llama", share=0.4, slots=SLOTS, length=LENGTH, with_ids=True, **expected_kl):
    """A model, a damaged cache with an operator, and what it stored before."""
    operator = operator_of(name, share, with_ids, **expected_kl)
    model, cache, ids, mask = filled(name, length=length, operator=operator)
    before = numbers(cache)
    shift(cache, 0, slots, by=3.0)
    return model, cache, before
