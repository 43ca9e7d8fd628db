"""The augmented read equals attention over the cache that a scrub would have written back."""

from dataclasses import dataclass, replace

import pytest
import torch
from random_statistics import informed
from small_models import model_of, padded_batch
from transformers import DynamicCache

from cachemedic.defenses.defense import CachedTokens
from cachemedic.models.cache import stack_cache, unstack_cache
from cachemedic.repair.attach import protect
from cachemedic.token.layerwise.augmented import AugmentedRead
from cachemedic.token.layerwise.operator import Repair
from cachemedic.token.layerwise.scrub import Scrubber, positions_of
from cachemedic.token.layerwise.token_vectors import split

PREFIX, LENGTH = 7, 11


@dataclass
class Scene:
    """Left-padded rows, their damaged cache, what a scrub made of it, and what it found."""

    model: object
    operator: object
    ids: torch.Tensor
    mask: torch.Tensor
    damaged: tuple
    mended: tuple
    repair: Repair

    @property
    def read(self):
        return AugmentedRead.of(self.operator, self.repair)

    def decode(self, k, v, steps, reader=None, wide=False):
        """Logits of the tokens behind the prefix, `steps` of them at a time, teacher-forced."""
        cache = reader.cache(k, v) if wide else unstack_cache(k, v)
        positions, logits = (self.mask.cumsum(1) - 1).clamp_min(0), []
        for start in range(PREFIX, LENGTH, steps):
            step = slice(start, start + steps)
            inputs = {"attention_mask": self.mask[:, : start + steps], "position_ids": positions[:, step]}
            if reader is None:
                out = self.model(self.ids[:, step], past_key_values=cache, **inputs)
            else:
                with protect(self.model, reader):
                    out = self.model(self.ids[:, step], past_key_values=cache, **inputs)
            logits.append(out.logits)
        return torch.cat(logits, 1)


def scene(name="llama", implementation="sdpa", rank=8, non_finite=False, family="layerwise-E", **options):
    model = model_of(name, implementation)
    operator = informed(model, family, rank, **options)
    ids, mask = padded_batch(3, LENGTH)
    valid = mask[:, :PREFIX].bool()
    cache = DynamicCache()
    with torch.no_grad():
        positions = positions_of(valid)
        inputs = {"attention_mask": mask[:, :PREFIX], "position_ids": positions.clamp_min(0)}
        model(ids[:, :PREFIX], past_key_values=cache, **inputs)
        k, v = stack_cache(cache)
        scrubber = Scrubber(model, operator)
        codes = scrubber.write(CachedTokens.behind_padding(k, v, ids[:, :PREFIX], valid))
        generator = torch.Generator().manual_seed(2)
        damaged = [x + 0.5 * torch.randn(x.shape, generator=generator) for x in (k, v)]
        if non_finite:
            for x, value in zip(damaged, (torch.nan, torch.inf), strict=True):
                x[:, :, :, ::2, 3] = value
                x[:, 1, :, 1, :] = -1e30
        stored = *damaged, ids[:, :PREFIX], positions, codes
        mended, repair = scrubber.scrub(*stored)[:2], scrubber.repair(*stored)
    return Scene(model, operator, ids, mask, tuple(damaged), tuple(mended), repair)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_at_full_rank_it_decodes_as_behind_the_repaired_cache(name, implementation, steps, wide):
    it = scene(name, implementation)
    with torch.no_grad():
        expected = it.decode(*it.mended, steps)
        plain = it.decode(*it.damaged, steps)
        found = it.decode(*it.damaged, steps, it.read, wide)
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("family", ["layerwise-D", "layerwise-E"])
@pytest.mark.parametrize("wide", [False, True])
def test_numbers_that_are_not_finite_never_reach_the_logits(family, wide):
    it = scene(non_finite=True, family=family)
    with torch.no_grad():
        assert it.decode(*it.damaged, 1).isnan().any()
        found = it.decode(*it.damaged, 1, it.read, wide)
        expected = it.decode(*it.mended, 1)
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


def test_the_stored_cache_stays_as_it_is():
    it = scene()
    before = [x.clone() for x in it.damaged]
    with torch.no_grad():
        it.decode(*it.damaged, 2, it.read)
        it.decode(*it.damaged, 2, it.read, wide=True)
    assert all(torch.equal(a, b) for a, b in zip(before, it.damaged, strict=True))


class SlowAttention:
    """One query at a time, over keys and values of every query head; query m sees the positions up to `last` + m."""

    scaling = 0.37

    def __init__(self, last, bias=None):
        self.last, self.bias = last, bias

    def __call__(self, query, key, value):
        shared = query.shape[1] // key.shape[1]
        output = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        for row, head, m in torch.cartesian_prod(*(torch.arange(n) for n in query.shape[:3])).tolist():
            logits = key[row, head // shared, : self.last + m] @ query[row, head, m] * self.scaling
            if self.bias is not None:
                logits[: self.bias.shape[-1]] += self.bias[row, head // shared]
            output[row, m, head] = logits.softmax(0) @ value[row, head // shared, : self.last + m]
        return output, None


@pytest.mark.parametrize("rank", [2, 7, 8])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_bias_and_projected_correction_in_one_layer(name, rank):
    """Against attention over what is stored plus the part of the correction in the r first principal axes."""
    it = scene(name, rank=rank, bias=True)
    generator = torch.Generator().manual_seed(3)
    bias = torch.randn(it.repair.bias.shape, generator=generator)
    it.repair = replace(it.repair, bias=bias)
    read, layer, queries = it.read, 2, 3
    groups, head_dim = it.damaged[0].shape[2], it.damaged[0].shape[4]
    query = torch.randn(3, 4, queries, head_dim, generator=generator)
    new = [torch.randn(3, groups, queries, head_dim, generator=generator) for _ in "kv"]
    stored = [torch.cat([x[:, layer], own], 2) for x, own in zip(it.damaged, new, strict=True)]
    repaired = []
    for x, correction in zip(stored, split(it.repair.correction, groups), strict=True):
        x = x.clone()
        for head in range(groups):
            of_head = correction[:, layer, head]
            axes = torch.linalg.svd(of_head.flatten(0, 1), full_matrices=False).Vh[:rank]
            x[:, head, :PREFIX] += of_head @ axes.T @ axes
        repaired.append(x)
    expected, _ = SlowAttention(PREFIX + 1, bias[:, layer].transpose(1, 2))(query, *repaired)
    found, _, gates = read.attend(layer, SlowAttention(PREFIX + 1), query, *stored)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert gates == (None, None)
    assert read.tails[0].shape[-1] + head_dim == {2: 16, 7: 16, 8: 24}[rank]
    assert read.bits_per_token() == 16 * 2 * read.tails[0].shape[-1] * groups * 3


def test_rows_and_tokens_that_were_not_scrubbed_are_refused():
    it = scene()
    with protect(it.model, it.read), pytest.raises(ValueError, match="for 3 rows of 7 .*; attention reads 3 rows of 4"):
        it.model(it.ids[:, :4])
    with protect(it.model, it.read.of_rows(slice(2))), pytest.raises(ValueError, match="for 2 rows of 7"):
        it.model(it.ids)
