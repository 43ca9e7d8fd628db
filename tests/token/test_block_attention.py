"""Attention block by block is that over all keys, and spends no work on blocks that lie ahead."""

import pytest
import torch
import torch.nn.functional as F

from cachemedic.token.block_attention import BlockMask
from cachemedic.token.recompute import _mask

BLOCK = 8
SLOTS = torch.tensor(  # the second row repeats tokens, as `recompute` does
    [[1, 2, 4, 6, 9, 11, 12, 15, 17, 23], [0, 1, 2, 3, 8, 9, 10, 20, 1, 3]]
)


def attention():
    """Queries, keys and values of two rows, and the mask of the queries at `SLOTS`."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 4, generator=generator) for n in (10, 24, 24))
    return query, key, value, _mask(SLOTS, torch.ones(2, 24, dtype=torch.bool), torch.float32)


def test_it_is_attention_over_all_keys():
    query, key, value, mask = attention()
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
    found = F.scaled_dot_product_attention(query, key, value, attn_mask=BlockMask.of(mask, SLOTS, BLOCK), scale=0.3)
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, expected)


def test_no_query_is_given_blocks_that_lie_ahead_of_it():
    query, key, value, mask = attention()
    key[:, :, BLOCK:], value[:, :, BLOCK:] = torch.nan, torch.nan
    found = F.scaled_dot_product_attention(query, key, value, attn_mask=BlockMask.of(mask, SLOTS, BLOCK))
    assert torch.isfinite(found[:, :, :4]).all()
    assert found[:, :, 4:].isnan().all()


def test_queries_of_one_block_have_a_plain_mask():
    *_, mask = attention()
    assert BlockMask.of(mask, SLOTS, 24) is mask


@pytest.mark.parametrize("use", [lambda x: x + 1, lambda x: x[..., :3], lambda x: torch.softmax(x, -1)])
def test_any_other_function_takes_a_plain_tensor(use):
    *_, mask = attention()
    found = use(BlockMask.of(mask, SLOTS, BLOCK))
    assert type(found) is torch.Tensor
    assert torch.equal(found, use(mask))
