"""Which models can be worked with: models of transformers, not wrapped, in evaluation mode."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

LISTS = (nn.ModuleList, nn.ModuleDict)


def check_is_model(model: object) -> None:
    """Raises `TypeError` for what is no model of transformers, and `ValueError`, which names the model inside, for a
    wrapper (`DataParallel`, an adapter, a compiled model): what is called or hooked would not be the model.
    """
    if isinstance(model, PreTrainedModel):
        return
    if isinstance(model, nn.Module):
        for name, module in model.named_modules():
            if isinstance(module, PreTrainedModel):
                raise ValueError(
                    f"{type(model).__name__} wraps the model that is meant: give the {type(module).__name__} inside, "
                    f"`.{name}`"
                )
    held = getattr(model, "model", None)
    hint = ": give its `.model`" if isinstance(held, PreTrainedModel) else ""
    raise TypeError(f"the model must be one of transformers (PreTrainedModel), not a {type(model).__name__}{hint}")


def check_mode(model: PreTrainedModel) -> None:
    """Raises `ValueError` if any part is in training mode: with dropout on, no two passes write the same cache."""
    for name, module in model.named_modules():
        if module.training and not isinstance(module, LISTS):  # a list that was made anew is in no mode
            part = f"{type(model).__name__}{f', in its part {name},' if name else ''}"
            raise ValueError(
                f"{part} is in training mode, where dropout makes every pass another one: call model.eval()"
            )


def check_device(of_operator: torch.device, found: torch.device, where: str) -> None:
    """Raise `ValueError` unless an operator is on the device `found`; where: what else is there."""
    if found != of_operator:
        raise ValueError(f"the operator is on {of_operator}, {where} on {found}: move one of them")
