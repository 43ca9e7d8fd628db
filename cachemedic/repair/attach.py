"""Attach a repair operator to the attention of a Hugging Face model, for as long as a `with` block lasts.

Repair sits inside attention, after the cache has joined past and new keys and values and before the logits. It enters
through the attention interface of transformers: while any model is protected, each registered attention function stands
behind one that repairs for the modules that are protected and calls on to it. Neither the model nor its configuration
is marked, so that a copy of either is a copy like any other; models and layers that are not protected pass straight
through.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from cachemedic.models.attention import attention_modules
from cachemedic.models.load import check_format
from cachemedic.models.usable import check_device, check_is_model, check_mode
from cachemedic.repair.attention import Attention, AttentionRepair, Gates

EAGER = "eager"


class IdleOperatorWarning(UserWarning):
    """An operator protects a model that would change nothing, because it was never trained or acts elsewhere."""


@dataclass(eq=False)
class Protection:
    """One operator attached to one model; `gates` holds those of the last forward pass by layer, if recorded."""

    operator: AttentionRepair
    record_gates: bool
    modules: frozenset[nn.Module]  # all of the model
    gates: dict[int, Gates] = field(default_factory=dict)
    thread: int = field(default_factory=threading.get_ident)  # which entered the block, and is repaired for


# The protections of an attention module, innermost last. Modules are not marked themselves: nothing to undo in them.
_protections: dict[nn.Module, list[Protection]] = {}
# The registered attention functions that a repairing one stands before, by name; None for "eager", which has no entry.
_own: dict[str, Callable | None] = {}
_changing = threading.Lock()  # what is above


@cache
def _eager_of(cls: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function that an attention class takes for "eager": each modelling file of transformers has its own."""
    forward = inspect.unwrap(cls.forward)
    names = [name for name in forward.__code__.co_names if name.endswith("eager_attention_forward")]
    if not names:
        raise ValueError(f"{cls.__name__} comes without an eager_attention_forward; choose 'sdpa' for this model")
    return forward.__globals__[names[0]]


def _eager(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """The implementation named "eager", as the class of the module would have called it."""
    attention_class: Any = type(module)  # mypy takes classes of modules for unhashable
    return _eager_of(attention_class)(module, *args, **kwargs)


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
    """`attention` as the model would call it, repaired if the module is protected in this thread."""
    own = _protections_of(module)
    if not own:
        # without a scaling of the model's the function has its own default: it gets what it was given, nothing added
        options |= {} if scaling is None else {"scaling": scaling}
        return attention(module, query, key, value, attention_mask, **options)
    if scaling is None:
        scaling = query.shape[-1] ** -0.5  # the default of every implementation; wider heads must not change it
    repaired: Attention = _Own(attention, module, attention_mask, scaling, options)
    for protection in own:
        repaired = _Repaired(repaired, protection, module.layer_idx)
    output, weights = repaired(query, key, value)
    return output.contiguous(), weights  # as the interface has it: some models view the output in another shape


def _protections_of(module: nn.Module) -> list[Protection]:
    """Those that this thread has entered. Raises `RuntimeError` where only other threads have."""
    entered = _protections.get(module)
    if not entered:
        return []
    if torch.compiler.is_compiling():  # threads share what is compiled, which cannot ask for their number
        if any(protection.thread != entered[0].thread for protection in entered):
            raise RuntimeError("several threads protect a compiled model: give each thread a model of its own")
        return entered
    thread = threading.get_ident()
    own = [protection for protection in entered if protection.thread == thread]
    if not own and not any(
        protection.thread == thread and module in protection.modules
        for layer in list(_protections.values())
        for protection in layer
    ):
        raise RuntimeError(
            f"layer {module.layer_idx} is protected in another thread, and not in this one: enter `protect` in the "
            "thread that calls the model, or give each thread a model of its own"
        )
    return own


def _stand_before_all() -> None:
    """Have every registered attention function repair for the modules that are protected."""
    registered = AttentionInterface._global_mapping
    for name in {*registered, EAGER} - set(_own):
        _own[name] = registered.get(name)
        registered[name] = partial(_attend, _own[name] or _eager)


def _step_aside() -> None:
    """The inverse, once nothing is protected any more; what was registered meanwhile stays."""
    registered = AttentionInterface._global_mapping
    for name, own in _own.items():
        if getattr(registered.get(name), "func", None) is not _attend:
            continue
        if own is None:
            del registered[name]
        else:
            registered[name] = own
    _own.clear()


def _check(model: PreTrainedModel, operator: AttentionRepair) -> list[Any]:
    """The self-attention modules of the protected layers, of a model that can be protected by this operator."""
    check_is_model(model)
    if not callable(getattr(operator, "attend", None)):
        raise TypeError(f"the operator must be a RepairOperator, not a {type(operator).__name__}")
    if not model._can_set_attn_implementation():
        raise ValueError(
            f"{type(model).__name__} does not use the attention interface of transformers "
            "(transformers.AttentionInterface), through which repair enters; choose a model that does"
        )
    operator.check_model(model.config)
    check_format(model.dtype)
    check_mode(model)
    modules = attention_modules(model, operator.layers)
    for module in modules:
        found = next(module.parameters()).device
        if found.type == "meta" and operator.device.type != "meta":
            raise ValueError(
                f"layer {module.layer_idx} of {type(model).__name__} is offloaded: load the model onto one device whole"
            )
        check_device(operator.device, found, f"layer {module.layer_idx}")
    return modules


@contextmanager
def protect(model: PreTrainedModel, operator: AttentionRepair, record_gates: bool = False) -> Iterator[Protection]:
    """Within, `model` reads its cache through `operator`: in a forward pass, a prefill, a decoding step, `generate()`.

    On exit, also after an exception, the model is what it was before; an attention implementation that is set within is
    repaired too, and stays. Copies made within (`copy.deepcopy`, `torch.save`) are not protected.

    Protections nest, and may end in any order; where two protect one layer, the inner one repairs what the outer one
    returns. With `record_gates` the yielded protection holds the gates of the last forward pass:
    `protection.gates[layer] == (a_k, a_v)`.

    A protection holds for the thread that entered it. Another thread may protect the same model for itself; without
    that, its forward passes raise `RuntimeError` meanwhile. Compiled models cannot tell threads apart: call them from
    one thread.

    Families D and E repair what is stored, and take the cache that can: `past_key_values=SketchCache(model, operator)`.

    Warns (`IdleOperatorWarning`) of an operator that would change nothing.

    Raises:
        TypeError: if `model` is no model of transformers.
        ValueError: if the model is wrapped or in training mode, does not use the attention interface or computes in
            another format than those of `load_base`, if a layer does not attend, or if the operator is for another
            model or device.
    """
    modules = _check(model, operator)
    if why := getattr(operator, "idle_because", None):
        warnings.warn(f"this operator changes nothing: {why}", IdleOperatorWarning, stacklevel=3)
    protection = Protection(operator, record_gates, frozenset(model.modules()))
    with _changing:
        for module in modules:
            _protections.setdefault(module, []).append(protection)
        _stand_before_all()
    try:
        yield protection
    finally:
        with _changing:
            for module in modules:
                _protections[module].remove(protection)
                if not _protections[module]:
                    del _protections[module]
            if not _protections:
                _step_aside()
