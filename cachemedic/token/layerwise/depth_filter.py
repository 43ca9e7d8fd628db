"""The estimator of families D and E for one layer: from a damaged token to what it was.

A layer is predicted from what the layer below was repaired to (`Transform`); E starts from its stored code instead. The
deviation of the damaged token from that base is innovation plus damage. A small network says for each head how much of
it to believe: the size of its noise, from which size on an element is an outlier, and whether exact zeros are losses.
What is believed is projected on the innovation's coordinates and shrunk as for normal variables (Wiener 1949);
elements that are not believed are filled in from the estimate and the projection repeated, the EM algorithm for missing
data (Dempster, Laird and Rubin 1977). All tensors are in units of `Transform.scale`, which commute with the rotation of
keys. Damage is judged as it was stored, in rotated keys; the statistics are those of unrotated ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cachemedic.token.layerwise.token_vectors import Rotation

FEATURES = 15
OUTPUTS = 5  # of the network for each head: noise, gate, outlier threshold, distrust of zeros, logit bias
TINY = 1e-6
OUTLIER = 9.0  # an element whose square is beyond this many times the expected one is believed half
DISTRUST_OF_ZEROS = 4.0  # before training, as a logit
DEAD = 0.05  # gates below this are exactly zero: sound tokens stay as they are, bit for bit


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Of one layer. basis [D, m]; energy [m, H']: how much of a coordinate's variance shows in an element of each head;
    outside [H']: mean square of a clean innovation outside of the basis. H' = 2 G, key heads first.
    """

    basis: Tensor
    energy: Tensor
    outside: Tensor

    @classmethod
    def of(cls, axes: Tensor, variance: Tensor, coordinates: int, heads: int) -> LayerStatistics:
        """From all axes [D, D] and their variances [D], of which the first `coordinates` are used."""
        energy = axes.square().T.unflatten(-1, (heads, -1)).mean(-1)
        return cls(axes[:, :coordinates], energy[:coordinates], variance[coordinates:] @ energy[coordinates:])


@dataclass(frozen=True, eq=False)
class Sight:
    """A token at one layer: deviation [N, T, D] from the base; lost [N, T, D], grain [N, T, H'] as in `Observation`;
    prior [N, T, m]: variance of the innovation about the base; told: numbers [N, T] about the token as a whole.
    """

    deviation: Tensor
    lost: Tensor
    grain: Tensor
    prior: Tensor
    told: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Evidence:
    """expected [N, T, H']: mean square of the deviation of a sound token; noise [N, T, H']: what was seen beyond that;
    features [N, T, H', F] for the network.
    """

    expected: Tensor
    noise: Tensor
    features: Tensor

    @property
    def damage(self) -> Tensor:
        """Noise in units of what is expected, a mean over heads [N, T]."""
        return self.noise.mean(-1) / self.expected.mean(-1)


def weigh(statistics: LayerStatistics, sight: Sight, positions: Tensor, rotation: Rotation, window: int) -> Evidence:
    """The evidence of one layer for tokens at `positions` [N, T]; the network hears of `window` neighbours a side."""
    heads = statistics.energy.shape[1]
    seen = (~sight.lost).to(sight.deviation.dtype).unflatten(-1, (heads, -1))
    count = seen.sum(-1).clamp_min(1.0)
    size = sight.deviation.unflatten(-1, (heads, -1)).abs() * seen
    expected = sight.prior @ statistics.energy + statistics.outside + TINY
    robust = (size.sum(-1) / count).square() * (torch.pi / 2)  # of a normal variable; hardly moved by a few outliers
    square = size.square().sum(-1) / count
    unrotated = rotation.undo(sight.deviation)
    beyond = unrotated - (unrotated @ statistics.basis) @ statistics.basis.mT
    own = [
        (robust / expected + TINY).log(),
        (square / expected + TINY).log(),
        (size.amax(-1).square() / expected + TINY).log(),
        (beyond.unflatten(-1, (heads, -1)).square().mean(-1) / (statistics.outside + TINY) + TINY).log(),
        1 - seen.mean(-1),
        sight.grain,
    ]
    token = [x.mean(-1) for x in (own[0], own[1], own[4])]
    token.append(_around(token[0], (positions >= 0).to(token[0].dtype), window))
    token += [(x + TINY).log() for x in sight.told]
    token.append((positions == 0).to(token[0].dtype))
    features = torch.stack([*own, *(x[..., None].expand_as(robust) for x in token)], -1)
    return Evidence(expected, (robust - expected).clamp_min(0), features)


def _around(x: Tensor, valid: Tensor, window: int) -> Tensor:
    """Mean of x [N, T] over the neighbours that are no padding."""
    sums = F.avg_pool1d(torch.stack([x * valid, valid], 1), 2 * window + 1, 1, window)
    return sums[:, 0] / sums[:, 1].clamp_min(TINY)


@dataclass(frozen=True, eq=False)
class Estimate:
    """innovation [N, T, D] as stored (keys rotated); gate [N, T, D] in [0, 1]: how much of the token to replace; bias
    [N, T, G] for its attention logits; variance [N, T, 1] that is left, a mean over coordinates.
    """

    innovation: Tensor
    gate: Tensor
    bias: Tensor
    variance: Tensor


def estimate(
    statistics: LayerStatistics, sight: Sight, evidence: Evidence, decided: Tensor, rotation: Rotation, rounds: int
) -> Estimate:
    """The innovation of one layer, from the evidence and the network's numbers `decided` [N, T, H', OUTPUTS]."""
    heads = evidence.expected.shape[-1]
    head_dim = sight.deviation.shape[-1] // heads
    noise_offset, gate, threshold, zeros, bias = decided.unbind(-1)
    noise = evidence.noise * noise_offset.exp() + TINY
    least = noise.amin(-1, keepdim=True)

    def spread(x: Tensor) -> Tensor:  # [N, T, H'] -> [N, T, D]
        return x.repeat_interleave(head_dim, dim=-1)

    limit = spread((evidence.expected + noise) * OUTLIER * threshold.exp())
    trust = 1 / (1 + (sight.deviation.square() / limit).square())
    trust = trust * (1 - sight.lost * spread(torch.sigmoid(zeros + DISTRUST_OF_ZEROS)))
    # a head of more noise than the least counts as seen in part only, by the ratio of variances
    believed = trust * spread((least + evidence.expected) / (noise + evidence.expected))
    shrink = sight.prior / (sight.prior + least)
    seen = believed * sight.deviation
    innovation = torch.zeros_like(seen)
    for _ in range(rounds):
        filled = rotation.undo(seen + (1 - believed) * innovation)
        innovation = rotation.redo(((filled @ statistics.basis) * shrink) @ statistics.basis.mT)
    keep = trust * (1 - spread(torch.sigmoid(gate)))
    gates = ((1 + 2 * DEAD) * (1 - keep) - DEAD).clamp(0, 1)
    replaced = gates.mean(-1, keepdim=True)
    left = (sight.prior * (1 - shrink)).mean(-1, keepdim=True) * replaced
    return Estimate(innovation, gates, bias[..., : heads // 2] * replaced, left)
