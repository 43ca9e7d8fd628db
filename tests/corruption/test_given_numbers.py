"""Numbers of NumPy and PyTorch in place of plain ones, and caches of a kind that is not served."""

import numpy as np
import pytest
import torch
import transformers as hf
from small_models import model_of, padded_batch

from cachemedic.core.seeds import generator
from cachemedic.corruption.apply import corrupt_cache
from cachemedic.corruption.spec import CorruptionSpec
from cachemedic.models.cache import stack_cache


def test_seeds_and_masks_may_be_numbers_of_numpy():
    cache = model_of("gpt2")(padded_batch()[0], use_cache=True).past_key_values
    spec = CorruptionSpec("gaussian", parameter=0.5)
    plain, other = (corrupt_cache(cache, spec, seed=seed).layers[0].keys for seed in (3, np.int64(3)))
    assert torch.equal(plain, other)
    for layers in (np.array([0, 1]), torch.tensor([0, 1]), [np.int64(0), 1]):
        assert CorruptionSpec("gaussian", parameter=0.5, layers=layers).layers == (0, 1)
    assert generator("a", np.int64(2)).initial_seed() == generator("a", 2).initial_seed()
    with pytest.raises(TypeError, match="seed must be a whole number, not 0.5"):
        corrupt_cache(cache, spec, seed=0.5)


def test_the_cache_of_a_model_with_an_encoder_is_refused():
    both = hf.EncoderDecoderCache(hf.DynamicCache(), hf.DynamicCache())
    with pytest.raises(TypeError, match="only a DynamicCache can be corrupted, not EncoderDecoderCache"):
        corrupt_cache(both, CorruptionSpec("gaussian", parameter=0.5))
    with pytest.raises(TypeError, match="holds two caches"):
        stack_cache(both)
