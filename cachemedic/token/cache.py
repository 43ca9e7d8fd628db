"""A Hugging Face cache that keeps ids, hashes and codes of its tokens, and so can be checked and repaired."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import StaticLayer

from cachemedic.core.errors import check_given
from cachemedic.models.usable import check_mode
from cachemedic.token.cache_files import load_cache, save_cache
from cachemedic.token.check import CheckReport, check
from cachemedic.token.forward_hook import ForwardHooks
from cachemedic.token.hashes import HASH_BYTES, PART_BYTES
from cachemedic.token.joint import RECENT, SINKS
from cachemedic.token.joint_operator import JointOperator
from cachemedic.token.policy import Policy
from cachemedic.token.record import TokenRecord, sinks_of
from cachemedic.token.recorded_cache import RecordedCache
from cachemedic.token.repair_report import RepairReport
from cachemedic.token.storage import empty_storage, without_window
from cachemedic.token.ways import carry_out

ID_BYTES, POSITION_BYTES, ERASED_BYTES = 8, 8, 1  # of a token in the record
PAGE = 16  # tokens that are coded at once: a step of one token would read all of the transform for it


class SketchCache(RecordedCache):
    """The cache to give to a model, or to `generate`, as `past_key_values`: it knows what was written.

        cache = SketchCache(model, operator)
        model.generate(ids, past_key_values=cache)
        print(cache.check())
        print(cache.repair(budget=0.1))

    Ids, positions and hashes of all tokens are kept, with an operator the numbers of the first four positions, and with
    family E the codes of complete pages of 16 tokens; all of it away from the keys and values, which it is there to
    check and to repair. It follows the tokens through beam search, cropping and the selection of rows. Forward
    pre-hooks on the model, which go with the last of its caches, tell it the ids.

    Args:
        model: a dense decoder in evaluation mode.
        operator: calibrated, of family D or E; None: tokens are checked, recomputed or erased, and nothing is coded.
        storage: an empty cache to take the storage from: a `DynamicCache` (the default) or `StaticCache`, offloaded or
            not, without sliding windows.
        seed: of the multipliers of the hash, which whoever damages the cache on purpose must not know.

    Raises:
        TypeError: for an operator of another family, and for what is no model.
        ValueError: for a model that is wrapped, in training mode, or has an encoder, latent attention or layers that do
            not attend, an operator of another model or not calibrated, a storage that holds tokens or slides.
    """

    def __init__(
        self, model: PreTrainedModel, operator: JointOperator | None = None, storage: Cache | None = None, seed: int = 0
    ) -> None:
        self.bind(model, operator, seed)
        self._store_in(DynamicCache() if storage is None else empty_storage(storage))
        self.report: CheckReport | None = None  # of the last check
        self._hooks = ForwardHooks.of(model)
        self._new: tuple[Tensor, Tensor] | None = None  # ids and positions, during a forward pass
        self._written: tuple[list[Tensor], list[Tensor]] = [], []  # keys and values of its layers so far

    @property
    def bytes_per_token(self) -> float:
        """What is kept beside a token: id, position, whether it is erased, hash and code; the first positions apart."""
        kept = ID_BYTES + POSITION_BYTES + ERASED_BYTES + HASH_BYTES + PART_BYTES * self.shape.num_layers
        return kept + (0 if self.coder is None else self.coder.bytes_per_token)

    @property
    def is_compileable(self) -> bool:
        """Whether masks have to tell which places of preallocated layers are empty: during a forward pass.

        Before that `generate` asks whether it may compile the model: not with a cache that does more than to store.
        """
        return self._new is not None and self.preallocated

    @property
    def preallocated(self) -> bool:
        """See `HookedCache`."""
        return any(isinstance(layer, StaticLayer) for layer in self.layers)

    def begin(self, ids: Tensor, positions: Tensor) -> None:
        """See `HookedCache`.

        Raises `ValueError` in training mode, for tokens that preallocated layers have no room for, and if the cache
        holds tokens it was not told of.
        """
        check_mode(self.model)
        needed, rooms = self.get_seq_length() + ids.shape[1], [getattr(x, "max_cache_len", None) for x in self.layers]
        if any(room is not None and needed > room for room in rooms):
            raise ValueError(
                f"the StaticCache that this SketchCache stores in has room for {rooms[0]} tokens, and these make "
                f"{int(needed)}: give one with a larger max_cache_len"
            )
        if self.record is not None or self.get_seq_length():
            _ = self.kept
        self._new, self._written = (ids, positions), ([], [])

    def adopt(self, cache: Cache, ids: Tensor, positions: Tensor) -> None:
        """Takes over the layers of a filled cache as what was written; `look_after` checks them first.

        ids and positions [B, T] of its tokens, positions -1 for padding. A sliding window is taken over as a plain
        layer, which goes on to hold every token.
        """
        self._store_in(cache)
        self.layers = [without_window(layer) for layer in self.layers]
        layers: list[Any] = self.layers
        sides = [[getattr(layer, side)[:, :, : ids.shape[1]] for layer in layers] for side in ("keys", "values")]
        self._remember(sides[0], sides[1], ids, positions)

    def known_positions(self) -> Tensor:
        """See `HookedCache`."""
        return self.kept.positions

    def unread(self) -> Tensor | None:
        """See `HookedCache`."""
        return self.record.erased if self.record is not None and self.record.erased.any() else None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `Cache.update`. Raises `ValueError` for a pass of another model, or of tokens that have no id each."""
        keys, values = self._written
        if self._new is None or layer_idx != len(keys):
            raise ValueError(
                "a SketchCache has to know the tokens that it stores: use it with the model it was made for"
            )
        if (written := key_states.shape[2]) != (announced := self._new[0].shape[1]):
            raise ValueError(
                f"{type(self.model).__name__} stores {written} tokens for {announced} ids: each needs an id"
            )
        stored = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        keys.append(key_states)
        values.append(value_states)
        if len(keys) == self.shape.num_layers:
            self._remember(keys, values, *self._new)
            self._new, self._written = None, ([], [])
        return stored

    @torch.inference_mode()
    def _remember(self, keys: list[Tensor], values: list[Tensor], ids: Tensor, positions: Tensor) -> None:
        """Adds the tokens of a complete forward pass to the record."""
        size = 0 if self.coder is None else self.coder.bytes_per_token
        starts = bool(((positions >= 0) & (positions < SINKS)).any())
        if self.coder is not None and (starts or self.record is None):
            sinks = sinks_of(keys, values, positions)
        else:
            sinks = keys[0].new_zeros(len(ids), 0)
        new = TokenRecord.of(ids, positions, self.hasher.of(keys, values), sinks, size)
        self.record = new if self.record is None else self.record.then(new)
        self._encode(ids.shape[1])

    def _encode(self, new: int) -> None:
        """Codes the pages that are complete, the last `new` tokens among them; damage in older ones puts it off."""
        record = self.kept
        start = record.codes.shape[1]
        if self.coder is None or not self.coder.bytes_per_token or (count := (len(record) - start) // PAGE) == 0:
            return
        older = slice(max(0, start - (RECENT - 1)), len(record) - new)
        keys, values = self.numbers()
        if older.start < older.stop:
            now = self.hasher.of([x[:, :, older] for x in keys], [x[:, :, older] for x in values])
            if ((now.whole != record.hashes.whole[:, older]) & record.valid[:, older]).any():
                return
        codes = self.coder.encode(keys, values, record, slice(start, start + count * PAGE))
        self.record = replace(record, codes=torch.cat([record.codes, codes], 1))

    @torch.inference_mode()
    def check(self, others: Collection[SketchCache] = ()) -> CheckReport:
        """Which tokens are not what was written, where, and what happened to them.

        others: caches whose tokens may have come here (stale or swapped pages); tokens of this one are looked for
        anyway. Raises `ValueError` for an empty cache, and for `others` of another seed or format.
        """
        numbers, record = self.numbers(), self.kept
        known = []
        check_given("others", others, (list, tuple, set, frozenset))
        for other in others:
            check_given("each of others", other, SketchCache)
            if other.seed != self.seed or not torch.equal(other.hasher.multipliers, self.hasher.multipliers):
                raise ValueError("only caches of one model, number format and seed have hashes that can be compared")
            known.append(other.kept.hashes.whole[other.kept.valid])
        found = check(self.hasher, *numbers, record.hashes, record.valid, known)
        self.report = replace(found, erased=int((record.erased & (record.positions >= 0)).sum()))
        return self.report

    def repair(self, method: str = "auto", budget: float | None = None) -> RepairReport:
        """Checks the cache and repairs the tokens that are not what was written, in place.

        Args:
            method: "recompute" (from the ids, exact), "restore" (from code and ids), "estimate" (from these and what is
                left of the token), "erase" (attention does not read the token any more), or "auto": for each token the
                way of least expected KL that the budget allows.
            budget: the time that may be taken, as a share of a prefill of the cached text; None: any. What each way
                takes is measured once in a process, before the first repair with a budget, for about as long as
                a dozen passes over a few hundred tokens take, which does not count. Tokens that there is no time for
                are erased, or left as they are where little of them is damaged or more than a quarter would go.

        Tokens that were written while others were damaged are what the model made of these: no repair sees that, and
        `expected_kl` of the report leaves it out. Without a budget tokens that were erased are computed again, too.

        Raises `ValueError` for an unknown method, one that the operator cannot serve, a negative budget, and a model
        in training mode.
        """
        policy = Policy(self, method, budget)  # refuses before any work
        return carry_out(self, self.check(), policy)

    def save(self, folder: str | Path) -> None:
        """Writes the numbers, and apart from them ids, hashes and codes, as safetensors. See `load`."""
        check_given("folder", folder, (str, Path))
        save_cache(self, Path(folder))

    @classmethod
    def load(cls, folder: str | Path, model: PreTrainedModel, operator: JointOperator | None = None) -> SketchCache:
        """Reads what `save` wrote and checks it; `cache.report` says what was found.

        Raises `FileNotFoundError` where a file is missing, and `ValueError` for ids, hashes or codes that are damaged,
        for other weights of the model and another operator than the cache was written with.
        """
        check_given("folder", folder, (str, Path))
        cache = cls(model, operator)
        load_cache(cache, Path(folder))
        cache.check()
        return cache

    def reset(self) -> None:
        """See `Cache.reset`."""
        super().reset()
        self.record = self.report = self._new = self._hasher = None

    def crop(self, tokens_to_remove: int) -> None:
        """See `Cache.crop`. Raises `ValueError` for preallocated storage."""
        if self.preallocated:
            raise ValueError("the layers of a StaticCache cannot be cropped: use the storage of a DynamicCache")
        super().crop(tokens_to_remove)
        if self.record is not None:
            length = int(self.get_seq_length())
            self.record = self.record.up_to(length) if length else None

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

    def _choose(self, choose: Callable[[Tensor], Tensor]) -> None:
        if self.record is not None:
            self.record = self.record.rows(choose)

    def _store_in(self, cache: Cache) -> None:
        """Takes over the layers of a cache, how it makes new ones, and how it offloads them."""
        resident = getattr(cache, "only_non_sliding", True)
        super().__init__(layers=cache.layers, offloading=cache.offloading, offload_only_non_sliding=resident)
        self.layer_class_to_replicate = cache.layer_class_to_replicate

    def __copy__(self) -> SketchCache:
        return self._like([copy.copy(layer) for layer in self.layers])

    def __deepcopy__(self, memo: dict[int, Any]) -> SketchCache:
        return self._like(copy.deepcopy(self.layers, memo))

    def _like(self, layers: list[Any]) -> SketchCache:
        """Another cache between forward passes, with layers of its own; the record is never changed in place."""
        result = SketchCache(self.model, self.operator, seed=self.seed)
        result._store_in(self)
        result.layers = layers
        result.record, result.report = self.record, self.report
        return result

    def __reduce__(self) -> Any:
        raise TypeError("a SketchCache is not pickled: use `cache.save(folder)` and `SketchCache.load`")
