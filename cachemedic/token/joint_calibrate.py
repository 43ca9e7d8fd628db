"""`calibrate`: what makes an operator of D or E useful before any training."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cachemedic.core.divergence import kd_loss
from cachemedic.core.errors import check_given
from cachemedic.core.integers import seed_number
from cachemedic.core.threads import one_thread
from cachemedic.corruption.apply import corrupt
from cachemedic.corruption.spec import CorruptionSpec, draw_event
from cachemedic.models.cache import stack_cache, unstack_cache
from cachemedic.models.load import Base, check_format
from cachemedic.models.usable import check_device, check_is_model, check_mode
from cachemedic.repair.operator import RepairOperator
from cachemedic.token.calibration_text import Texts, default_texts, held_out, windows
from cachemedic.token.code import SHARES
from cachemedic.token.coder import joint_operator
from cachemedic.token.joint import JointModel
from cachemedic.token.joint_calibration import clean_caches, fit_joint_model
from cachemedic.token.joint_operator import JointOperator
from cachemedic.token.plausible import statistics, thresholds
from cachemedic.token.trust_fit import fit_trust

MEASURED, PREFIX, DECODED = 8, 128, 32  # windows, tokens of each that are lost, tokens decoded after them
FITTED, CHECKED = 8, 24  # windows that the trust network sees, and that clean tokens are checked on
NOISE = 0.5  # of the damage that "estimate" and "leave" are measured on, over the size of each vector
GOOD = 0.05  # nats that a recommended code leaves with every token lost


@one_thread()
def calibrate(
    operator: RepairOperator, base: Base, texts: Texts | None = None, joint: JointModel | None = None, seed: int = 0
) -> JointOperator:
    """Gives an operator of D or E the joint model of a base and measures what it leaves; returns the operator.

    texts: strings, or lists of them by kind (None: documentation, code, reviews and dialogue that come with the
    packages). What is to be repaired should be among the kinds. joint: a joint model that was measured before.
    One text in eight of each kind is not calibrated on: the error of codes of several lengths is measured on those and
    printed. It computes on one thread, so that the result is the same for any number of them. Warns if the operator
    protects a part of the layers only: the others keep their damage.
    Raises `TypeError` for an operator of another family and for what is no base; `ValueError` for an operator of
    another model or on another device, for a base in training mode, wrapped, or that rotates its keys in a way that is
    not served, and for too little text.
    """
    operator = joint_operator(operator)
    if not isinstance(base, Base):
        raise TypeError(f"calibrate takes a base, as `load_base` returns it, not a {type(base).__name__}")
    if joint is not None:
        check_given("joint", joint, JointModel)
    check_is_model(base.model)
    operator.check_model(base.model.config)
    check_device(operator.device, base.model.device, base.name)
    check_mode(base.model)
    seed = seed_number(seed)
    if operator.runs > 1:
        raise ValueError(f"calibrate one run, not {operator.runs}, and `set_joint` its joint model to the others")
    check_format(base.model.dtype)
    depth = operator.config.model.num_layers
    if len(operator.layers) < depth:
        warnings.warn(
            f"this operator protects {len(operator.layers)} of {depth} layers: damage in the others stays. Use "
            "layers='all' unless faults cannot reach them",
            stacklevel=2,
        )
    measured_on, unseen = held_out(default_texts(base, seed) if texts is None else texts)
    _checked_on(base, unseen, seed)  # too little text is refused before the long work
    joint = fit_joint_model(base, measured_on, operator.layers, seed=seed) if joint is None else joint
    operator.set_joint(joint)
    length = min(PREFIX, base.context)
    fit_trust(operator, base.model, windows(base, measured_on, FITTED, length, seed + 3), seed=seed)
    operator.set_joint(joint, expected_kl(operator, base, unseen, seed), alarms(operator, base, unseen, seed))
    return operator


@torch.inference_mode()
def expected_kl(operator: JointOperator, base: Base, texts: Texts, seed: int = 0) -> dict[str, float]:
    """Nats of KL to the clean model, a decoded token, with every token of a prefix of 128 lost, by way of repair.

    "restore" and "erase"; "estimate" and "leave" after gaussian noise of half the size of each vector. On windows of
    `texts`; prints "restore" for codes of several lengths.
    """
    prefix = min(PREFIX, base.context - DECODED)
    ids = windows(base, texts, MEASURED, prefix + DECODED, seed + 2).to(base.model.device)
    ((_, cache),) = list(clean_caches(base, ids[:, :prefix], len(ids)))
    keys, values = stack_cache(cache)
    positions = torch.arange(prefix, device=ids.device).expand(len(ids), -1)
    clean = _log_p(base, ids, keys, values, prefix)

    def left(found: tuple[Tensor, Tensor], erased: bool = False) -> float:
        log_p = _log_p(base, ids, *found, prefix, erased)
        return float(kd_loss(clean, log_p, temperature=1.0))

    spec = CorruptionSpec("gaussian", parameter=NOISE)
    generator = torch.Generator().manual_seed(seed)
    events = [draw_event(spec, (keys.shape[1], keys.shape[2], prefix), generator) for _ in ids]
    noisy = corrupt(keys, values, events, generator)
    kept = operator.write_tokens(base.model, keys, values, ids[:, :prefix], positions)
    of_tokens: dict[str, Any] = {"ids": ids[:, :prefix], "positions": positions, "kept": kept}
    found = {
        "restore": left(operator.repair(base.model, *noisy, **of_tokens, way="restore")),
        "estimate": left(operator.repair(base.model, *noisy, **of_tokens)),
        "leave": left(noisy),
        "erase": left((keys, values), erased=True),
    }
    if operator.code is not None:
        _print_shares(operator, (keys, values), noisy, of_tokens, base.model, left)
    return found


def alarms(operator: JointOperator, base: Base, texts: Texts, seed: int = 0) -> dict[str, list[float]]:
    """The thresholds of `check_cache`, from clean caches of windows of `texts`."""
    clean = clean_caches(base, _checked_on(base, texts, seed))
    return thresholds(torch.cat([statistics(base.model, operator, *stack_cache(c), rows)[0] for rows, c in clean]))


def _checked_on(base: Base, texts: Texts, seed: int) -> Tensor:
    return windows(base, texts, CHECKED, min(2 * PREFIX, base.context), seed + 4)


def _print_shares(
    operator: JointOperator,
    clean: tuple[Tensor, Tensor],
    lost: tuple[Tensor, Tensor],
    of_tokens: dict[str, Any],
    model: PreTrainedModel,
    left: Callable[[tuple[Tensor, Tensor]], float],
) -> None:
    """Says what codes of several lengths leave of these tokens, and which is the shortest that leaves little."""
    recommended = None
    for share in SHARES:
        try:
            options = operator.config.options | {"share": share}
            other = type(operator)(replace(operator.config, options=options), dict(operator.named_parameters()))
            other.set_joint(operator.calibrated)
        except ValueError:  # less than a byte a token
            continue
        kept = other.write_tokens(model, *clean, of_tokens["ids"], of_tokens["positions"])
        kl = left(other.repair(model, *lost, **(of_tokens | {"kept": kept}), way="restore"))
        print(f"code of 1/{1 / share:.0f} of the bytes, {other.bytes_per_token} a token: KL {kl:.3g}, every token lost")
        recommended = share if recommended is None and kl <= GOOD else recommended
    if recommended is not None:
        print(f"recommended: share=1/{1 / recommended:.0f}, the shortest that leaves {GOOD} or less")


def _log_p(base: Base, ids: Tensor, keys: Tensor, values: Tensor, prefix: int, erased: bool = False) -> Tensor:
    """Log probabilities [B, M, V] of the tokens after the prefix, decoded on a cache; erased: without reading it."""
    mask = torch.ones_like(ids)
    if erased:
        mask[:, 1:prefix] = 0  # the first token stays: models need a place for attention that goes nowhere
    positions = torch.arange(prefix, ids.shape[1], device=ids.device).expand(len(ids), -1)
    stored = unstack_cache(keys.to(base.model.dtype), values.to(base.model.dtype))
    logits = base.model(ids[:, prefix:], attention_mask=mask, position_ids=positions, past_key_values=stored).logits
    return logits.float().log_softmax(-1)
