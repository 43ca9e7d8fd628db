"""The very first token of a text, which the joint model leaves out: an attention sink, often the same in every text."""

from __future__ import annotations

from torch import Tensor

from cachemedic.token.joint import JointModel, Prior

ALIKE = 0.5  # regression on the known first token from which on, without ids, the first token counts as that one
OFF = 0.01  # of its power, by which the lowest layer of the known first token may differ from what an id tells


def with_first(joint: JointModel, found: Tensor, read: Tensor, prior: Prior | None, positions: Tensor) -> Tensor:
    """Estimates `found` [B, T, D], changed in place: at position 0 what calibration knows, if it is that token.

    Any other token there is as it was `read` [B, T, D]; prior: what the ids tell; positions [B, T]. Vectors are as they
    are stored: at position 0 keys have no rotation.
    """
    rows, slots = (positions == 0).nonzero(as_tuple=True)
    as_read = read[rows, slots].float().nan_to_num()
    found[rows, slots] = as_read.to(found.dtype)
    if joint.first is None:
        return found
    first = joint.first.float()
    if prior is not None and joint.lowest_is_exact:
        lowest = first[: prior.lowest.shape[-1]]
        off, size = prior.lowest[rows, slots].float() - lowest, lowest.square().sum()
        same = off.square().sum(-1) < OFF * size
    else:
        same = as_read @ first > ALIKE * first.square().sum()
    found[rows[same], slots[same]] = first.to(found.dtype)
    return found
