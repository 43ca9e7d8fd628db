"""A Hugging Face cache that families D and E look after: it keeps the sketch of its tokens and scrubs them."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, StaticLayer

from cachemedic.core.errors import nearest_valid
from cachemedic.repair.attach import Watch
from cachemedic.token.layerwise.operator import TokenAware
from cachemedic.token.layerwise.scrub import Scrubber
from cachemedic.token.layerwise.token_record import RecordWriter, TokenRecord

POLICIES = {"load": None, "every": 1}


@dataclass(frozen=True, eq=False)
class ScrubReport:
    """What a scrub found: `tokens` that it read, without padding; by protected layer how many of them it `changed`, and
    suspicion [B, P, T], a score of damage.
    """

    tokens: int
    changed: tuple[int, ...]
    suspicion: Tensor


class SketchCache(Cache):
    """The cache to give to a model, or to `generate`, within `protect(model, operator)` for an operator of D or E.

        with protect(model, operator):
            model.generate(ids, past_key_values=SketchCache(model, operator))

    The ids and positions of all tokens are kept, and with family E the code of each token, computed when it is written:
    both where the faults do not reach. They follow the tokens through beam search, cropping and the selection of rows.

    A scrub repairs all that is stored, in place. It runs before the first forward pass on a cache that was loaded, and
    with `scrub` = n also before the first pass after every n others ("every": n = 1; "load": only when loaded). A copy
    (`copy.copy`, `copy.deepcopy`, `corrupt_cache`) counts as loaded, because what happened to it is not known; call
    `mark_loaded` where tensors were changed or restored in other ways.

    Args:
        model: whose cache it is.
        operator: calibrated, of one run.
        scrub: "load", "every" or a number of forward passes.
        cache: an empty cache to take the storage from: a `DynamicCache` (the default) or `StaticCache`, offloaded or
            not, without sliding windows.

    Raises:
        ValueError: for an operator of several runs, of another model, or not calibrated; for a policy or a cache that
            is none of these.
    """

    def __init__(
        self, model: PreTrainedModel, operator: TokenAware, scrub: str | int = "load", cache: Cache | None = None
    ) -> None:
        self.scrubber = _scrubber(model, operator)
        self.interval = _interval(scrub)
        self.depth = model.config.get_text_config(decoder=True).num_hidden_layers
        # the storage: its layers, how new ones are made, and how they are offloaded
        self.__dict__.update(vars(DynamicCache() if cache is None else _empty(cache)))
        self.record: TokenRecord | None = None
        self.report: ScrubReport | None = None  # of the last scrub
        self._writer: RecordWriter | None = None  # during a forward pass
        self._watch = Watch(active=False)  # of the protection that began it
        self._loaded = False
        self._age = 0  # forward passes since the last scrub

    @property
    def operator(self) -> TokenAware:
        return self.scrubber.operator

    @property
    def is_compileable(self) -> bool:
        """Never: it does more than to store, also with preallocated layers."""
        return False

    @property
    def bytes_per_token(self) -> int:
        """Of the sketch, over all layers; 0 for family D."""
        return math.ceil(self.scrubber.bytes_per_token)

    def sketch_bytes(self) -> int:
        """The memory that the sketch takes."""
        return 0 if self.record is None else self.record.sketch.nbytes

    def mark_loaded(self) -> None:
        """Have all that is stored scrubbed before the next forward pass."""
        self._loaded = True

    def begin(self, ids: Tensor, positions: Tensor, watch: Watch) -> None:
        """Called before each forward pass over tokens ids [B, M] at positions [B, M], -1 for padding.

        The pass may write for as long as `watch` is active. Raises `ValueError` if the cache holds tokens that were not
        written within `protect`.
        """
        recorded = 0 if self.record is None else len(self.record)
        if (stored := int(self.get_seq_length())) != recorded:
            raise ValueError(
                f"this SketchCache holds {stored} tokens, {recorded} of them written by complete forward passes within "
                "`protect`: call `reset` and prefill it again"
            )
        if self.record is not None and (self._loaded or (self.interval is not None and self._age >= self.interval)):
            self.scrub()
        self._writer, self._watch = RecordWriter(self.scrubber, self.record, ids, positions), watch

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `Cache.update`. Raises `ValueError` outside of `protect`."""
        writer = self._writer
        # the watch: a pass that failed leaves its writer, which knows nothing of a pass outside of `protect`
        if writer is None or writer.layer != layer_idx or not self._watch.active:
            raise ValueError(
                "a SketchCache has to know the tokens that it stores: use it within `protect(model, operator)`"
            )
        stored = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        writer.write(key_states, value_states)
        if writer.layer == self.depth:
            self.record, self._writer = writer.finish(), None
            self._age += 1
        return stored

    @torch.inference_mode()  # caches made in that mode may be changed in it only
    def scrub(self) -> ScrubReport:
        """Repairs all cached tokens in place; sound ones keep every bit.

        Raises `ValueError` for an empty cache.
        """
        if self.record is None:
            raise ValueError("there is nothing to scrub: the cache is empty")
        record, device = self.record, self.record.ids.device
        if self.offloading:  # the next layer may be on its way back
            torch.cuda.default_stream(device).wait_stream(self.prefetch_stream)
        layers = [self.layers[index] for index in self.scrubber.layers]
        keys, values = (
            [getattr(layer, side)[:, :, : len(record)].to(device) for layer in layers] for side in ("keys", "values")
        )
        found = self.scrubber.mend(keys, values, record.ids, record.positions, record.codes(self.scrubber))
        if self.offloading:
            for stored in zip(layers, keys, values, strict=True):
                _store(*stored)
        valid = record.positions >= 0
        counts = (found.changed & valid[:, None]).sum((0, 2)).tolist()
        self.report = ScrubReport(int(valid.sum()), tuple(counts), found.suspicion)
        self._loaded, self._age = False, 0
        return self.report

    def reset(self) -> None:
        """See `Cache.reset`."""
        super().reset()
        self.record = self.report = self._writer = None
        self._loaded, self._age = False, 0

    def crop(self, tokens_to_remove: int) -> None:
        """See `Cache.crop`."""
        super().crop(tokens_to_remove)
        if self.record is not None:
            self.record = self.record.up_to(int(self.get_seq_length())) if self.get_seq_length() else None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """See `Cache.reorder_cache`."""
        super().reorder_cache(beam_idx)
        self._choose(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """See `Cache.batch_repeat_interleave`."""
        super().batch_repeat_interleave(repeats)
        self._choose(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """See `Cache.batch_select_indices`."""
        super().batch_select_indices(indices)
        self._choose(lambda x: x[indices])

    def _choose(self, choose: Any) -> None:
        if self.record is not None:
            self.record = self.record.rows(choose)

    def __copy__(self) -> SketchCache:
        return self._like(vars(self) | {"layers": [copy.copy(layer) for layer in self.layers]})

    def __deepcopy__(self, memo: dict[int, Any]) -> SketchCache:
        own = vars(self) | {"scrubber": None, "_writer": None}  # the model is not part of its cache
        return self._like(copy.deepcopy(own, memo) | {"scrubber": self.scrubber})

    def __reduce__(self) -> Any:
        raise TypeError("a SketchCache is not pickled: keep a cache of `cachemedic.SketchCache`, which has `save`")

    def _like(self, state: dict[str, Any]) -> SketchCache:
        """Another cache in this state, between forward passes, that counts as loaded."""
        result = object.__new__(type(self))
        result.__dict__.update(state, _writer=None, _loaded=True)
        return result


def _scrubber(model: PreTrainedModel, operator: TokenAware) -> Scrubber:
    """What looks after one cache. Raises `ValueError` for an operator that cannot."""
    if operator.runs != 1:
        raise ValueError(f"a SketchCache takes an operator of one run, not {operator.runs}: `select` one")
    return Scrubber(model, operator)


def _interval(scrub: str | int) -> int | None:
    """Forward passes between scrubs; None: no limit."""
    if isinstance(scrub, str):
        if scrub not in POLICIES:
            raise nearest_valid("scrub policy", scrub, POLICIES)
        return POLICIES[scrub]
    if scrub < 1:
        raise ValueError(f"scrub must be 'load', 'every' or 1 or more forward passes, not {scrub}")
    return scrub


def _empty(cache: Cache) -> Cache:
    """The cache, if a SketchCache can take over its storage."""
    if cache.get_seq_length() > 0:
        raise ValueError(
            f"the cache holds {int(cache.get_seq_length())} tokens already: a SketchCache takes an empty one"
        )
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, StaticLayer):
            raise ValueError(
                f"a SketchCache stores in layers of a DynamicCache or StaticCache without sliding windows, not in a "
                f"{type(layer).__name__}"
            )
    return cache


def _store(layer: Any, keys: Tensor, values: Tensor) -> None:
    """Puts repaired tokens in the place of those that were stored."""
    for side, new in (("keys", keys), ("values", values)):
        stored = getattr(layer, side)
        if isinstance(layer, StaticLayer):
            stored[:, :, : new.shape[2]] = new
        else:
            setattr(layer, side, new.to(stored.device))
