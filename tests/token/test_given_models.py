"""What is handed over as a model, a cache or ids and cannot be worked with: every public function says so, and why."""

import copy

import numpy as np
import pytest
import torch
from checked_caches import filled, numbers
from joint_operators import operator_of
from small_models import VOCABULARY, model_of, operator_for
from torch import nn

from cachemedic import CorruptionSpec, RepairOperator, SketchCache, calibrate, corrupt_cache, protect, recompute
from cachemedic.models.load import Base
from cachemedic.token.look_after import look_after
from cachemedic.token.plausible import RATES, check_cache
from cachemedic.token.token_repair import TokenRepair

IDS = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))


class _Adapter(nn.Module):
    """Passes on what it is asked for, as adapters do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def knowing(name="llama"):
    """An operator of family E whose thresholds are known."""
    operator = operator_of(name)
    operator.alarms = {str(rate): [1.0, 1.0, 1.0] for rate in RATES}
    return operator


def protected(model):
    with protect(model, operator_for(model_of("llama"))):
        pass


def some_damage():
    damaged = torch.zeros_like(IDS, dtype=torch.bool)
    damaged[1, 4] = True
    return damaged


USES = {
    "SketchCache": lambda model, *_: SketchCache(model),
    "look_after": lambda model, cache, ids=IDS: look_after(model, cache, ids),
    "recompute": lambda model, cache, ids=IDS: recompute(model, cache, ids, some_damage()),
    "check_cache": lambda model, cache, ids=IDS: check_cache(model, knowing(), cache, ids),
    "calibrate": lambda model, *_: calibrate(knowing(), Base(model, None, "tiny"), ["text"]),
    "protect": lambda model, *_: protected(model),
}
OF_A_CACHE = ("look_after", "recompute", "check_cache")


@pytest.fixture(scope="module")
def cache():
    return model_of("llama")(IDS, use_cache=True).past_key_values


@pytest.mark.parametrize("use", USES)
def test_a_model_in_training_mode_is_refused(use, cache):
    for part in (lambda model: model, lambda model: model.base_model, lambda model: model.model.layers[1].self_attn):
        model = model_of("llama")
        part(model).train()
        before = numbers(cache)
        with pytest.raises(ValueError, match=r"LlamaForCausalLM.* is in training mode.*: call model.eval\(\)"):
            USES[use](model, cache)
        assert all(map(torch.equal, before, numbers(cache)))


def test_a_mode_that_changes_later_is_refused_before_anything_is_written_or_repaired():
    model, cache, _, _ = filled("gpt2")
    cache.layers[1].keys[0, :, 3] = 7
    before = numbers(cache)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        cache.repair()
    with pytest.raises(ValueError, match="training mode"):
        model(torch.ones(3, 1).long(), position_ids=torch.full((3, 1), 12), past_key_values=cache)
    assert all(map(torch.equal, before, numbers(cache)))
    model.eval()
    cache.repair()
    assert not cache.check()


@pytest.mark.parametrize(
    ("wrap", "inside"),
    [(nn.DataParallel, r"\.module"), (_Adapter, r"\.inner"), (torch.compile, r"\._orig_mod")],
)
@pytest.mark.parametrize("use", USES)
def test_of_a_wrapped_model_the_model_inside_is_named(use, wrap, inside, cache):
    with pytest.raises(ValueError, match=f"give the LlamaForCausalLM inside, `{inside}`"):
        USES[use](wrap(model_of("llama")), cache)


@pytest.mark.parametrize("use", USES)
def test_what_is_no_model_is_refused(use, cache):
    with pytest.raises(TypeError, match=r"must be one of transformers \(PreTrainedModel\), not a str"):
        USES[use]("embedded-gpt2", cache)
    with pytest.raises(TypeError, match="not a Base: give its `.model`"):
        USES[use](Base(model_of("llama"), None, "tiny"), cache)


def test_a_model_in_place_of_a_base_is_refused():
    with pytest.raises(TypeError, match="calibrate takes a base, as `load_base` returns it, not a LlamaForCausalLM"):
        calibrate(knowing(), model_of("llama"))


def test_operators_that_know_no_tokens_are_refused(cache):
    model = model_of("llama")
    uses = {
        "SketchCache": lambda op: SketchCache(model, op),
        "check_cache": lambda op: check_cache(model, op, cache, IDS),
        "TokenRepair": lambda op: TokenRepair(model, op),
        "calibrate": lambda op: calibrate(op, Base(model, None, "tiny"), ["text"]),
    }
    for name, use in uses.items():
        for wrong, found in ((operator_for(model), "A"), ("E/embedded-gpt2", "str"), (nn.Linear(2, 2), "Linear")):
            with pytest.raises(TypeError, match=f"family D or E is needed, which repair stored tokens, not {found}"):
                use(wrong)
        if name != "calibrate":
            with pytest.raises(ValueError, match="`calibrate`"):
                use(RepairOperator.create("E", model.config))
    with pytest.raises(TypeError, match="joint must be a JointModel, not a str"):
        calibrate(knowing(), Base(model, None, "tiny"), ["text"], joint="x")


@pytest.mark.parametrize("use", OF_A_CACHE)
def test_quantised_numbers_are_refused(use, cache):
    for quantised in (lambda x: (10 * x).round().to(torch.int8), lambda x: x.to(torch.float8_e4m3fn)):
        other = copy.deepcopy(cache)
        other.layers[1].values = quantised(other.layers[1].values)
        with pytest.raises(ValueError, match=r"layer 1 of this cache holds torch\.\w+8\w*: .*not quantised"):
            USES[use](model_of("llama"), other)


def test_whole_numbers_cannot_be_corrupted(cache):
    whole = copy.deepcopy(cache)
    for layer in whole.layers:
        layer.keys = layer.keys.to(torch.int8)
    for kind in ("gaussian", "bitflip_fp32"):
        with pytest.raises(ValueError, match=r"must be floating-point numbers, not torch\.int8"):
            corrupt_cache(whole, CorruptionSpec(kind, parameter=0.5))


@pytest.mark.parametrize("use", ["look_after", "recompute"])
def test_the_numbers_of_another_format_are_refused(use, cache):
    with pytest.raises(ValueError, match=r"holds torch\.float32, but LlamaForCausalLM writes torch\.bfloat16"):
        USES[use](model_of("llama").bfloat16(), copy.deepcopy(cache))


@pytest.mark.parametrize("use", OF_A_CACHE)
def test_ids_that_the_model_does_not_have_are_refused(use, cache):
    for wrong in (IDS + VOCABULARY, IDS - VOCABULARY, IDS.float(), IDS > 0):
        with pytest.raises(ValueError, match=rf"ids must be whole numbers \(int64\) from 0 to {VOCABULARY - 1}"):
            USES[use](model_of("llama"), cache, wrong)
    with pytest.raises(TypeError, match="ids must be a tensor, not a ndarray"):
        USES[use](model_of("llama"), cache, np.ones((2, 9), dtype=int))


def test_seeds_may_be_numbers_of_numpy():
    model = model_of("llama")
    multipliers = []
    for seed in (3, np.int64(3)):
        cache = SketchCache(model, seed=seed)
        model(IDS, past_key_values=cache)
        multipliers.append(cache.hasher.multipliers)
    assert torch.equal(*multipliers)
    with pytest.raises(TypeError, match="seed must be a whole number, not 0.5"):
        SketchCache(model, seed=0.5)
    for seed in (-1, 2**70):
        with pytest.raises(ValueError, match="seed must be from 0 to"):
            SketchCache(model, seed=seed)


def test_a_model_in_double_precision_has_its_tokens_checked_and_computed_again():
    model, cache, ids, mask = filled(dtype=torch.float64)
    clean = numbers(cache)
    cache.layers[2].values[1, :, 5] *= 1 + 2e-16  # the last bit
    cache.layers[0].keys[0, :, 3] = torch.inf
    assert cache.check().tokens == [(0, 3), (1, 5)]
    assert cache.repair("recompute").ways == {"recompute": 2}
    for found, expected in zip(numbers(cache), clean, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    for refused in (lambda: protected(model), lambda: USES["calibrate"](model)):
        with pytest.raises(ValueError, match="float64 is not served; allowed: float32, bfloat16, float16"):
            refused()


def test_token_aware_repair_of_a_model_in_double_precision_is_refused():
    model = model_of("llama").double()
    with pytest.raises(ValueError, match="a model in float64 is not served"):
        SketchCache(model, knowing())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_an_operator_in_another_number_format_repairs_all_the_same(dtype):
    model, operator = model_of("llama"), knowing().to(dtype)
    cache = SketchCache(model, operator)
    model(IDS, past_key_values=cache)
    cache.layers[1].keys[0, :, 5] = 3
    assert cache.repair("estimate").ways == {"estimate": 1}
    assert operator.digest != knowing().digest
