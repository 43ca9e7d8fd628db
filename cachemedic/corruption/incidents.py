"""Incidents that users of serving systems report, each as a function of a whole cache: the damage benchmark.

A corruption type of `types` sees the stored numbers of keys or values alone. An incident sees both, all layers, heads
and positions, and the cache of another request: a wrong layout or a wrong place mixes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from cachemedic.core.keys_values import KeysValues
from cachemedic.core.registry import Registry
from cachemedic.corruption.apply import corrupt
from cachemedic.corruption.spec import CorruptionSpec, draw_event
from cachemedic.corruption.storage_faults import FORMATS, PAGE, flip_bits

PAGES = 4  # whole pages that a cache has to hold: then every incident has room
DRAFT = 4  # rejected tokens that a speculative decoder left behind
LAYER_SHARE = 0.5  # of the layers are read with a wrong scale
WRONG_SCALE = 2.0  # over the right one
FP8 = torch.float8_e4m3fn

Turn = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, eq=False)
class WholeCache:
    """What an incident sees of one request: keys k and values v [L, G, T, d], and those of another request.

    turn(k, n): keys as if they were written n positions later, of a model that rotates them; None for any other.
    """

    k: Tensor
    v: Tensor
    donor_k: Tensor
    donor_v: Tensor
    generator: torch.Generator
    turn: Turn | None

    @property
    def positions(self) -> int:
        """T, the number of cached tokens."""
        return self.k.shape[2]

    def draw(self, below: int) -> int:
        """A whole number from 0 up to, but not including, `below`."""
        return int(torch.randint(below, (), generator=self.generator))

    def both(self, change: Callable[[Tensor], Tensor]) -> KeysValues:
        """The same change of the keys and of the values."""
        return change(self.k), change(self.v)


Incident = Callable[[WholeCache], KeysValues]
AnyIncident = TypeVar("AnyIncident", bound=Incident)

INCIDENTS: Registry[Incident] = Registry("incident")


def register_incident(name: str) -> Callable[[AnyIncident], AnyIncident]:
    """Makes an incident known by `name`: decorates a function of a `WholeCache` that returns the damaged keys and
    values [L, G, T, d] and leaves the given ones as they are.

        @register_incident("second_layer_lost")
        def second_layer_lost(cache):
            lost = torch.ones_like(cache.k)
            lost[1] = 0
            return cache.k * lost, cache.v * lost

    Raises `ValueError` for a name that another definition has.
    """

    def register(incident: AnyIncident) -> AnyIncident:
        INCIDENTS.add(name, incident, incident)
        return incident

    return register


def strike(
    name: str,
    k: Tensor,
    v: Tensor,
    donor_k: Tensor,
    donor_v: Tensor,
    generators: Sequence[torch.Generator],
    turn: Turn | None = None,
) -> KeysValues:
    """The keys and values [B, L, G, T, d] after an incident; what it does not hit keeps every bit.

    Row b, without padding, draws from generators[b] alone; its donor is row b of the donors, of the same shape. `turn`:
    see `WholeCache`. Raises `ValueError` for an unknown name, tensors of different shapes, fewer than four pages of
    positions, and another number of generators than rows.
    """
    incident = INCIDENTS[name]
    shapes = {tuple(x.shape) for x in (k, v, donor_k, donor_v)}
    if len(shapes) != 1 or k.dim() != 5:
        raise ValueError(f"keys, values and their donors must be [B, L, G, T, d] alike, got {sorted(shapes)}")
    if k.shape[3] < PAGES * PAGE:
        raise ValueError(f"an incident needs at least {PAGES * PAGE} positions, the cache holds {k.shape[3]}")
    if len(generators) != len(k):
        raise ValueError(f"{len(k)} rows need as many generators, got {len(generators)}")
    rows = zip(k, v, donor_k, donor_v, generators, strict=True)
    struck = [incident(WholeCache(*row, turn)) for row in rows]
    return torch.stack([keys for keys, _ in struck]), torch.stack([values for _, values in struck])


def _of_type(cache: WholeCache, spec: CorruptionSpec) -> KeysValues:
    """What a corruption type makes of the cache."""
    event = draw_event(spec, (*cache.k.shape[:2], cache.positions), cache.generator)
    own, donors = (cache.k[None], cache.v[None]), (cache.donor_k[None], cache.donor_v[None])
    k, v = corrupt(*own, [event], cache.generator, *donors)
    return k[0], v[0]


# --- tokens of other requests -----------------------------------------------------------------------------------------


@register_incident("swapped_page")
def swapped_page(cache: WholeCache) -> KeysValues:
    """One page holds what another request has at the same positions."""
    return _of_type(cache, CorruptionSpec("page_swap", parameter=PAGE / cache.positions))


@register_incident("stale_page")
def stale_page(cache: WholeCache) -> KeysValues:
    """One page was never written: it holds what an older prompt had at other positions."""
    return _of_type(cache, CorruptionSpec("stale_page", parameter=PAGE / cache.positions))


@register_incident("overwritten_prefix")
def overwritten_prefix(cache: WholeCache) -> KeysValues:
    """Another request wrote into a prefix that both share, the first half: a quarter of the positions, in one run."""
    shared = ("window", 0, cache.positions // 2)
    return _of_type(cache, CorruptionSpec("contiguous_overwrite", parameter=cache.positions // 4, time=shared))


@register_incident("rejected_drafts")
def rejected_drafts(cache: WholeCache) -> KeysValues:
    """Draft tokens that were rejected were left in place: the last positions hold another continuation."""
    k, v = cache.both(torch.clone)
    k[:, :, -DRAFT:], v[:, :, -DRAFT:] = cache.donor_k[:, :, -DRAFT:], cache.donor_v[:, :, -DRAFT:]
    return k, v


# --- transfers that were cut off --------------------------------------------------------------------------------------


def _cut(cache: WholeCache) -> int:
    """The middle of a random page of the second half: what lies from there on did not arrive."""
    pages = cache.positions // PAGE
    first = pages // 2
    return PAGE * (first + cache.draw(pages - first)) + PAGE // 2


@register_incident("transfer_cut_zero")
def transfer_cut_zero(cache: WholeCache) -> KeysValues:
    """A transfer ended in the middle of a page: all that follows is zero, as memory was when it was taken."""
    k, v = cache.both(torch.clone)
    start = _cut(cache)
    k[:, :, start:], v[:, :, start:] = 0, 0
    return k, v


@register_incident("transfer_cut_old")
def transfer_cut_old(cache: WholeCache) -> KeysValues:
    """A transfer ended in the middle of a page: all that follows is what an older prompt left there."""
    k, v = cache.both(torch.clone)
    start = _cut(cache)
    k[:, :, start:], v[:, :, start:] = cache.donor_k[:, :, start:], cache.donor_v[:, :, start:]
    return k, v


# --- right numbers in the wrong place ---------------------------------------------------------------------------------


@register_incident("packed_read_as_split")
def packed_read_as_split(cache: WholeCache) -> KeysValues:
    """Memory laid out as [G, T, d] is read as [T, G, d], in all layers. With one head nothing changes."""
    heads, tokens = cache.k.shape[1:3]

    def read(x: Tensor) -> Tensor:
        return x.reshape(-1, tokens, heads, x.shape[3]).transpose(1, 2).contiguous()

    return cache.both(read)


@register_incident("permuted_heads")
def permuted_heads(cache: WholeCache) -> KeysValues:
    """Heads were written under another tensor-parallel degree: the halves of all heads stand in the other order.

    With one head nothing changes.
    """
    return cache.both(lambda x: x.roll(x.shape[1] // 2, dims=1))


@register_incident("wrong_positions")
def wrong_positions(cache: WholeCache) -> KeysValues:
    """Behind the second page, positions are off by one page.

    Rotated keys are rotated as if they stood a page earlier. Where keys are not rotated, and positions are part of a
    token's content, every token stands a page later than it should: the last page of tokens is lost.
    """
    start = 2 * PAGE
    if cache.turn is not None:
        k = torch.cat([cache.k[:, :, :start], cache.turn(cache.k[:, :, start:], -PAGE)], 2)
        return k, cache.v.clone()
    return cache.both(lambda x: torch.cat([x[:, :, :start], x[:, :, start - PAGE : -PAGE]], 2))


# --- wrong numbers ----------------------------------------------------------------------------------------------------


@register_incident("wrong_fp8_scale")
def wrong_fp8_scale(cache: WholeCache) -> KeysValues:
    """Half of the layers, drawn, are stored as fp8 (e4m3, a scale a layer) and read with twice the scale."""
    layers = cache.k.shape[0]
    chosen = torch.randperm(layers, generator=cache.generator)[: max(1, int(LAYER_SHARE * layers))]

    def read(x: Tensor) -> Tensor:
        result, stored = x.clone(), x[chosen]
        largest = stored.abs().amax((1, 2, 3), keepdim=True)
        scale = (largest / torch.finfo(FP8).max).clamp_min(torch.finfo(x.dtype).tiny)
        result[chosen] = (stored / scale).to(FP8).to(x.dtype) * (WRONG_SCALE * scale)
        return result

    return cache.both(read)


def _flip(cache: WholeCache, bits: int) -> KeysValues:
    """Flips so many neighbouring bits of one number, stored in bf16, from the highest exponent bit down."""
    k, v = cache.both(lambda x: x.clone(memory_format=torch.contiguous_format))
    x = (k, v)[cache.draw(2)].view(-1)
    place = cache.draw(len(x))
    number = slice(place, place + 1)
    width = FORMATS["bf16"].fields["exponent"][1]
    x[number] = flip_bits(x[number], "bf16", "exponent", torch.arange(width - bits, width)).to(x.dtype)
    return k, v


@register_incident("single_bit_flip")
def single_bit_flip(cache: WholeCache) -> KeysValues:
    """The highest exponent bit of one number flips, the one that does most harm.

    A number below 2 becomes far too large, any other nearly zero.
    """
    return _flip(cache, 1)


@register_incident("multi_bit_flip")
def multi_bit_flip(cache: WholeCache) -> KeysValues:
    """Two to eight neighbouring bits of one number flip at once, from the highest exponent bit down."""
    return _flip(cache, 2 + cache.draw(7))


@register_incident("zero_layer")
def zero_layer(cache: WholeCache) -> KeysValues:
    """All keys and values of one layer, drawn, are zero."""
    k, v = cache.both(torch.clone)
    layer = cache.draw(len(k))
    k[layer], v[layer] = 0, 0
    return k, v
