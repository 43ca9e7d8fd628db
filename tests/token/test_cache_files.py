"""Caches in folders: what is damaged is found, what does not belong is refused."""

import json

import pytest
import safetensors.torch
import torch
from checked_caches import filled, numbers, shift, write
from small_models import model_of, padded_batch

from cachemedic.core.files import seal
from cachemedic.token.cache import SketchCache
from cachemedic.token.cache_files import DESCRIPTION, NUMBERS, RECORD, model_digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_saved_comes_back_and_goes_on(tmp_path, dtype):
    model, cache, ids, mask = filled(dtype=dtype)
    cache.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([NUMBERS, RECORD, DESCRIPTION])
    other = SketchCache.load(tmp_path, model)
    assert not other.report
    assert all(torch.equal(x, y) for x, y in zip(numbers(other), numbers(cache), strict=True))
    longer, longer_mask = padded_batch(length=14)
    longer[:, :12] = ids
    assert torch.equal(write(model, other, longer, longer_mask, [14]), write(model, cache, longer, longer_mask, [14]))
    assert not other.check()


def test_damage_on_the_way_is_found_and_repaired(tmp_path):
    model, cache, ids, mask = filled()
    cache.save(tmp_path)
    content = bytearray((tmp_path / NUMBERS).read_bytes())
    content[-5] ^= 64  # the last number of the last tensor
    (tmp_path / NUMBERS).write_bytes(content)
    other = SketchCache.load(tmp_path, model)
    assert other.report.tokens == [(2, 11)]
    assert other.repair().ways == {"recompute": 1}
    for x, y in zip(numbers(other), numbers(cache), strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def test_erased_tokens_stay_erased(tmp_path):
    model, cache, ids, mask = filled()
    shift(cache, 0, [4])
    cache.repair("erase")
    cache.save(tmp_path)
    other = SketchCache.load(tmp_path, model)
    assert not other.report
    assert other.record.erased.nonzero().tolist() == [[0, 4]]


def test_a_damaged_record_is_refused(tmp_path):
    model, cache, ids, mask = filled()
    cache.save(tmp_path)
    content = bytearray((tmp_path / RECORD).read_bytes())
    content[-5] ^= 64
    (tmp_path / RECORD).write_bytes(content)
    with pytest.raises(ValueError, match=f"{RECORD} is damaged or of another cache: sha256"):
        SketchCache.load(tmp_path, model)


def test_other_weights_of_the_same_shape_are_refused(tmp_path):
    model, cache, ids, mask = filled()
    cache.save(tmp_path)
    for other in (model_of("llama", seed=3), model_of("llama").bfloat16()):
        with pytest.raises(ValueError, match="by a model of other weights or another number format"):
            SketchCache.load(tmp_path, other)
    same = model_of("llama")
    SketchCache.load(tmp_path, same)
    with torch.no_grad():
        same.lm_head.weight[3, 4] += 1
    with pytest.raises(ValueError, match="of other weights"):
        SketchCache.load(tmp_path, same)
    assert model_digest(same) != model_digest(model)
    before = model_digest(same)
    same.load_state_dict({name: x + 1 for name, x in same.state_dict().items()}, assign=True)
    assert model_digest(same) != before


def test_a_model_is_known_again_in_each_number_format(tmp_path):
    model, cache, ids, mask = filled()
    cache.save(tmp_path / "float32")
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="another number format"):
        SketchCache.load(tmp_path / "float32", model)
    cache = SketchCache(model)
    write(model, cache, ids, mask, [12])
    cache.save(tmp_path / "bfloat16")
    SketchCache.load(tmp_path / "bfloat16", model_of("llama").to(torch.bfloat16))


def test_files_that_do_not_fit_are_refused(tmp_path):
    model, cache, ids, mask = filled()
    cache.save(tmp_path)
    good = {name: (tmp_path / name).read_bytes() for name in (NUMBERS, RECORD, DESCRIPTION)}
    described = json.loads(good[DESCRIPTION])
    stored = safetensors.torch.load(good[NUMBERS])

    def with_file(name, content):
        for other, kept in good.items():
            (tmp_path / other).write_bytes(kept)
        (tmp_path / name).write_bytes(content)

    short = {name: x[:, :, :-1].contiguous() for name, x in stored.items()}
    for name, content, message in [
        (
            NUMBERS,
            safetensors.torch.save(short),
            r"does not hold keys and values \[3, 2, 12, 8\] in torch.float32 of 3",
        ),
        (NUMBERS, good[NUMBERS][: len(good[NUMBERS]) // 2], "damaged beyond its numbers"),
        (DESCRIPTION, b"{", "damaged"),
        (DESCRIPTION, b"[]", "damaged"),
        (DESCRIPTION, seal(described | {"format": "another"}), "describes 'another'"),
        (DESCRIPTION, json.dumps(described | {"seed": 1}).encode(), f"{DESCRIPTION} is damaged"),
    ]:
        with_file(name, content)
        with pytest.raises(ValueError, match=message):
            SketchCache.load(tmp_path, model)
    for name in good:
        with_file(NUMBERS, good[NUMBERS])
        (tmp_path / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"has no file {name}"):
            SketchCache.load(tmp_path, model)
    with pytest.raises(ValueError, match="empty: prefill it first"):
        SketchCache(model).save(tmp_path)
