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
    for layers in (np.array([0, 1]), torch.tensor([0, 1]), [np.int64(0), 1], list(torch.arange(2)), range(2)):
        assert CorruptionSpec("gaussian", parameter=0.5, layers=layers).layers == (0, 1)
    assert CorruptionSpec("gaussian", parameter=0.5, time=("window", *torch.tensor([1, 3]))).time == ("window", 1, 3)
    for share in (np.float32(0.5), torch.tensor(0.5)):
        assert CorruptionSpec("gaussian", parameter=0.5, heads=share).heads == 0.5
    assert generator("a", np.int64(2)).initial_seed() == generator("a", 2).initial_seed()
    with pytest.raises(TypeError, match="seed must be a whole number, not 0.5"):
        corrupt_cache(cache, spec, seed=0.5)


@pytest.mark.parametrize("mask", [range(2**70), [True], [0.0], {}, object(), [], ["0"], 1, 2**70])
def test_what_is_no_mask_is_refused_at_once(mask):
    for name in ("layers", "heads"):
        with pytest.raises(ValueError, match=f"^{name}=.* is not a mask; allowed"):
            CorruptionSpec("gaussian", parameter=0.5, **{name: mask})
    with pytest.raises(ValueError, match="is not a position mask"):
        CorruptionSpec("gaussian", parameter=0.5, time=mask)


def test_the_cache_of_a_model_with_an_encoder_is_refused():
    both = hf.EncoderDecoderCache(hf.DynamicCache(), hf.DynamicCache())
    with pytest.raises(TypeError, match="only a DynamicCache can be corrupted, not EncoderDecoderCache"):
        corrupt_cache(both, CorruptionSpec("gaussian", parameter=0.5))
    with pytest.raises(TypeError, match="holds two caches"):
        stack_cache(both)
