"""The student over shared prefixes, from a middle layer on, against plain forward passes over whole caches."""

import pytest
import torch
import transformers as hf
from small_models import GROUPED, VOCABULARY, model_of, operator_for
from transformers import DynamicCache

from cachemedic.models.cache import stack_cache, unstack_cache
from cachemedic.models.load import decoder_layers
from cachemedic.repair.attach import protect
from cachemedic.training.student import shared_prefix, starting_at

SEEDS, CONDITIONS, SAMPLES, LENGTH = 2, 2, 3, 7


def gemma3():
    """Its layers differ in their rotary embedding, by their place in the list; the window is longer than the text."""
    torch.manual_seed(0)
    config = hf.Gemma3TextConfig(
        **GROUPED, head_dim=16, sliding_window=32, query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        },
    )  # fmt: skip
    return hf.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def model_named(name: str):
    return gemma3() if name == "gemma3" else model_of(name)


def caches(model, queries: int, first: int):
    """Ids [S, B, T + M], prefixes [S, B, L, G, T, d] damaged from `first` on, and the inputs of layer `first`."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (SEEDS, SAMPLES, LENGTH + queries), generator=generator)
    rows, cache, inputs = ids.flatten(0, 1), DynamicCache(), []
    model.base_model(rows[:, :LENGTH], past_key_values=cache)
    k, v = stack_cache(cache)
    parent, name = decoder_layers(model)
    hook = getattr(parent, name)[first].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model(rows[:, LENGTH:], past_key_values=cache)
    hook.remove()
    for x in (k, v):
        x[:, first:] += 0.5 * torch.randn(x[:, first:].shape, generator=generator)
    return ids, *(x.unflatten(0, (SEEDS, SAMPLES)) for x in (k, v, inputs[0]))


def by_run(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(CONDITIONS, 0).flatten(0, 1)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "llama", "qwen2", "qwen3", "phi", "gemma3"])
def test_student_is_a_plain_pass_over_each_damaged_cache(name, first, queries):
    model = model_named(name)
    ids, k, v, hidden = caches(model, queries, first)
    operator = operator_for(model, layers=range(first, 3), runs=SEEDS * CONDITIONS)
    decoded, positions = by_run(ids)[:, LENGTH:], torch.arange(LENGTH, LENGTH + queries)
    with (
        shared_prefix(model, k[:, :, first:], v[:, :, first:], first, CONDITIONS),
        starting_at(model, first, by_run(hidden)),
        protect(model, operator),
    ):
        together = model(decoded, position_ids=positions.expand(len(decoded), -1), use_cache=False).logits
    for run, logits in enumerate(together.unflatten(0, (SEEDS * CONDITIONS, SAMPLES))):
        seed = run // CONDITIONS
        with protect(model, operator.select(run)):
            alone = model(ids[seed, :, LENGTH:], past_key_values=unstack_cache(k[seed], v[seed])).logits
        torch.testing.assert_close(logits, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_itself_again_afterwards(name, fails):
    model = model_of(name)
    ids, k, v, hidden = caches(model, 1, 1)
    parent, list_name = decoder_layers(model)
    layers, implementation = getattr(parent, list_name), model.config._attn_implementation
    before, state = model(ids[0]).logits, {n: vars(m).copy() for n, m in model.named_modules()}

    def work():
        with shared_prefix(model, k[:, :, 1:], v[:, :, 1:], 1, 1), starting_at(model, 1, hidden.flatten(0, 1)):
            if fails:
                raise RuntimeError("in the middle")

    if fails:
        with pytest.raises(RuntimeError, match="in the middle"):
            work()
    else:
        work()
    assert getattr(parent, list_name) is layers
    assert model.config._attn_implementation == implementation
    assert {n: vars(m).keys() for n, m in model.named_modules()} == {n: x.keys() for n, x in state.items()}
    assert torch.equal(model(ids[0]).logits, before)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_window_that_cuts_the_prefix_is_refused(name):
    model = model_of(name)
    ids, k, v, _ = caches(model, 1, 0)
    with shared_prefix(model, k, v, 0, 1), pytest.raises(ValueError, match=r"7 \+ 1 tokens with sliding_window=6"):
        model(ids.flatten(0, 1)[:, LENGTH:], use_cache=False)
