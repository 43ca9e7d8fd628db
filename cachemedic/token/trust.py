"""The trained network of D and E: how much noise the parts of a token hold beyond what the algebra sees.

An exchanged token, or a rotated one, deviates like a noisy one but follows another distribution: how a part deviates,
and how the other parts of its token do, tell them apart. All parts share one small network, each
with an embedding of its own. It ends in zeros: untrained, the algebra stands.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cachemedic.token.estimate import PartStatistics, Trust

FEATURES = 11
GAIN = 8.0  # of the output: few updates take a part from believed to not believed
BY_IDS, BY_CODE = 0.6, 0.75  # regression of a token on what these predict, below which it is another token
NOTHING = 40.0  # what to add to the logarithm of the noise where nothing is believed
SMALLEST, LARGEST = 1e-3, 1e4  # of ratios, before their logarithm


def initial_trust(parts: int, hidden: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Parameters of one run; the output is zero."""
    return {
        "trust_in": torch.randn(FEATURES, hidden, generator=generator) / FEATURES**0.5,
        "trust_part": torch.randn(parts, hidden, generator=generator) * 0.1,
        "trust_out": torch.zeros(hidden, 1),
        "trust_bias": torch.zeros(1),
    }


def noise_correction(parameters: Mapping[str, Tensor], parts: PartStatistics) -> Tensor:
    """What to add [R*B, T, P] to the logarithm of the noise; parameters [R, ...] of R runs, rows run-major."""
    x = features(parts)
    rows = x.reshape(len(parameters["trust_in"]), -1, *x.shape[2:])
    return network(parameters, rows, parameters["trust_part"][:, None]).view(x.shape[:-1])


def unless_another(trust: Trust, least: Tensor, parts: PartStatistics) -> Tensor:
    """What `trust` says, and of tokens that hold another text that nothing of them is believed.

    What was read regresses on its prediction by 1, whatever noise was added to it, and by less where it is another
    token's. One part hardly shows that, all of a token together do. least [B, T]: the regression of a token.
    """
    heard = (~parts.exact & ~parts.sound) * (1 - parts.lost)
    regression = (parts.regression * heard).sum(-1) / heard.sum(-1).clamp_min(SMALLEST)
    return torch.where((regression < least)[..., None], NOTHING, trust(parts))


def network(parameters: Mapping[str, Tensor], x: Tensor, embedding: Tensor) -> Tensor:
    """The network on features x [R, N, ..., FEATURES] and the embedding [R, N or 1, ..., hidden] of their parts."""
    hidden = torch.bmm(x.flatten(1, -2), parameters["trust_in"]).view(*x.shape[:-1], -1)
    output = torch.bmm(torch.tanh(hidden + embedding).flatten(1, -2), parameters["trust_out"])
    return (GAIN * (output + parameters["trust_bias"][:, None])).clamp(-GAIN, GAIN).view(x.shape[:-1])


def features(parts: PartStatistics) -> Tensor:
    """Of every part [B, T, P, FEATURES]: its own, the means over its token, and of the lowest layer."""
    sized = [x.clamp(SMALLEST, LARGEST).log() / 2 for x in (parts.deviation_power, parts.residual_power, parts.power)]
    own = torch.stack([*sized, parts.lost, parts.regression.clamp(-2, 3)], -1)
    inexact = (~parts.exact).float()[..., None]
    token = (own * inexact).sum(2) / inexact.sum(2).clamp_min(1)
    off = parts.power - 2 * parts.regression + 1  # the power of the deviation, over that of what is predicted
    off = off.clamp(SMALLEST, LARGEST).log() / 2
    lowest = ((off * parts.exact).sum(2) / parts.exact.sum(2).clamp_min(1))[..., None]
    return torch.cat([own, torch.cat([token, lowest], -1)[:, :, None].expand(-1, -1, own.shape[2], -1)], -1)
