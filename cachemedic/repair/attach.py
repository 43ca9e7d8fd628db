"""Attach a repair operator to the attention of a Hugging Face model, for as long as a `with` block lasts.

Repair sits inside attention, after the cache has joined past and new keys and values and before the logits. It enters
through the attention interface of transformers: one attention function and its mask function are registered for the
implementation that the model uses, and call on to it. No model class is patched, so that every decoder that uses the
interface is served; models and layers that are not protected pass straight through.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cachemedic.models.load import check_format
from cachemedic.repair.operator import Attention, Gates, Reader
from cachemedic.token.forward_call import announce
from cachemedic.token.operator import TokenAware
from cachemedic.token.sketch_cache import Watch

PREFIX = "cachemedic_protected_"


@dataclass(eq=False)
class Protection:
    """One operator attached to one model; `gates` holds those of the last forward pass by layer, if recorded."""

    operator: Reader
    record_gates: bool
    gates: dict[int, Gates] = field(default_factory=dict)


# The protections of an attention module, innermost last. Modules are not marked themselves: nothing to undo in them.
_protections: dict[nn.Module, list[Protection]] = {}
# The protections of each configuration (by id) that names a registered function: PREFIX and its own implementation.
_redirected: dict[int, list[Protection]] = {}


def _eager(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """The implementation named "eager": not registered, because each modelling file of transformers has its own."""
    for cls in type(module).__mro__:
        if attention := getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None):
            return attention(module, *args, **kwargs)
    raise ValueError(f"{type(module).__name__} comes without an eager_attention_forward; choose 'sdpa' for this model")


@dataclass(frozen=True, eq=False)
class _Own:
    """The model's own attention, as it was called with this mask and these options."""

    attention: Callable[..., tuple[Tensor, Tensor | None]]
    module: Any
    mask: Tensor | None
    scaling: float
    options: dict[str, Any]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.attention(self.module, query, key, value, self.mask, scaling=self.scaling, **self.options)


@dataclass(frozen=True, eq=False)
class _Repaired:
    """`inner` attention of a layer through what a protection attached."""

    inner: Attention
    protection: Protection
    layer: int

    @property
    def scaling(self) -> float:
        return self.inner.scaling

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        output, weights, gates = self.protection.operator.attend(self.layer, self.inner, query, key, value)
        if self.protection.record_gates:
            self.protection.gates[self.layer] = gates
        return output, weights


def _attend(
    attention: Callable[..., tuple[Tensor, Tensor | None]],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The registered function: `attention`, repaired if the module is protected."""
    if scaling is None:
        scaling = query.shape[-1] ** -0.5  # the default of every implementation; wider heads must not change it
    repaired: Attention = _Own(attention, module, attention_mask, scaling, options)
    for protection in _protections.get(module, ()):
        repaired = _Repaired(repaired, protection, module.layer_idx)
    return repaired(query, key, value)


def _under_own_name(
    implementation: str, attention: Callable, module: Any, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Call flash attention, which looks its kernel up by the name in the configuration, under that name."""
    name = module.config._attn_implementation
    module.config._attn_implementation_internal = implementation
    try:
        return attention(module, *args, **kwargs)
    finally:
        module.config._attn_implementation_internal = name


def _register_repairing(implementation: str) -> str:
    """Register the repairing form of an attention implementation; returns its name."""
    name = PREFIX + implementation
    attention = _eager if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
    if "flash" in implementation:
        attention = partial(_under_own_name, implementation, attention)
    AttentionInterface.register(name, partial(_attend, attention))
    # Without a mask function of the same name the model would get no mask and lose padding and causality.
    if implementation in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


def _redirect(configs: Iterable[Any]) -> None:
    """Have attention run through the repairing form of what each configuration names."""
    for config in configs:
        implementation = config._attn_implementation
        if not implementation.startswith(PREFIX):
            config._attn_implementation_internal = _register_repairing(implementation)


def _redirect_again(configs: Iterable[Any], module: nn.Module, args: tuple[Any, ...]) -> None:
    """A forward pre-hook: `set_attn_implementation` within `protect` must not end the repair."""
    _redirect(configs)


def _attention_modules(model: PreTrainedModel, operator: Reader) -> list[Any]:
    """The self-attention modules of the protected layers."""
    if not (isinstance(model, PreTrainedModel) and model._can_set_attn_implementation()):
        raise ValueError(
            f"{type(model).__name__} does not use the attention interface of transformers "
            "(transformers.AttentionInterface), through which repair enters; choose a model that does"
        )
    operator.check_model(model.config)
    check_format(model.dtype)
    modules = [
        module
        for module in model.modules()
        if getattr(module, "layer_idx", None) in operator.layers
        and hasattr(module, "config")
        and not getattr(module, "is_cross_attention", False)
    ]
    if missing := set(operator.layers) - {module.layer_idx for module in modules}:
        raise ValueError(f"{type(model).__name__} has no attention module numbered {sorted(missing)} by `layer_idx`")
    for module in modules:
        if (found := next(module.parameters()).device) != operator.device:
            raise ValueError(
                f"the operator is on {operator.device}, layer {module.layer_idx} on {found}: move one of them"
            )
    return modules


@contextmanager
def protect(model: PreTrainedModel, operator: Reader, record_gates: bool = False) -> Iterator[Protection]:
    """Within, `model` reads its cache through `operator`: in a forward pass, a prefill, a decoding step, `generate()`.

    On exit, also after an exception, the model is what it was before. An attention implementation that is set within is
    repaired too from the next forward pass on, and stays after the exit; `model.set_attn_implementation("eager")`, also
    for a model that is eager already, is what transformers wants before `config.output_attentions = True`.

    Protections nest, and may end in any order; where two protect one layer, the inner one repairs what the outer one
    returns. With `record_gates` the yielded protection holds the gates of the last forward pass:
    `protection.gates[layer] == (a_k, a_v)`.

    Families D and E repair what is stored, and take the cache that can: `past_key_values=SketchCache(model, operator)`.

    Raises:
        ValueError: if the model does not use the attention interface or computes in another format than those of
            `load_base`, or if the operator is for another model or device.
    """
    modules = _attention_modules(model, operator)
    protection = Protection(operator, record_gates)
    configs = {id(module.config): module.config for module in modules}
    _redirect(configs.values())
    for key in configs:
        _redirected.setdefault(key, []).append(protection)
    for module in modules:
        _protections.setdefault(module, []).append(protection)
    hooks, watch = [], Watch()
    # A head calls the base model or, in OPT, a part of it; a caller may leave the head out.
    for module in {model, model.base_model}:
        hooks.append(module.register_forward_pre_hook(partial(_redirect_again, list(configs.values()))))
        if isinstance(operator, TokenAware):
            hooks.append(module.register_forward_pre_hook(partial(announce, operator, watch), with_kwargs=True))
    try:
        yield protection
    finally:
        watch.active = False
        for hook in hooks:
            hook.remove()
        for module in modules:
            _protections[module].remove(protection)
            if not _protections[module]:
                del _protections[module]
        for key, config in configs.items():
            _redirected[key].remove(protection)
            if not _redirected[key]:
                del _redirected[key]
                config._attn_implementation_internal = config._attn_implementation.removeprefix(PREFIX)
