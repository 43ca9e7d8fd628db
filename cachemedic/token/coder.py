"""Between the stored numbers of a cache and what the joint model of an operator says of its tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cachemedic.core.keys_values import KeysValues
from cachemedic.models.load import check_format
from cachemedic.models.usable import check_device
from cachemedic.token.dense import takes_positions
from cachemedic.token.first_token import check_weights
from cachemedic.token.joint import RECENT, Prior
from cachemedic.token.joint_operator import JointOperator
from cachemedic.token.kept import Prediction
from cachemedic.token.lowest_layer import stored_in_lowest_layer
from cachemedic.token.record import TokenRecord
from cachemedic.token.token_repair import wrong_family
from cachemedic.token.vectors import TokenVectors

CODED = 1024  # tokens a row whose vectors are held at once


def check_operator(model: PreTrainedModel, operator: object) -> None:
    """Raises `TypeError` for an operator of another family than D and E, `ValueError` for one that was not calibrated
    or is made for another model (see `check_weights`), and for a model of a number format that `load_base` does not
    serve; for an operator of several runs, or on another device than the model.
    """
    joint = joint_operator(operator)
    if joint.runs > 1:
        raise ValueError(f"this operator holds {joint.runs} runs: give one of them, such as operator.select(0)")
    joint.check_model(model.config)
    check_format(model.dtype)
    check_device(joint.device, model.device, type(model).__name__)
    check_weights(model, joint.calibrated)


def joint_operator(operator: object) -> JointOperator:
    """The operator, if it is of family D or E. Raises `TypeError` for anything else."""
    if not isinstance(operator, JointOperator):
        raise wrong_family(operator)
    return operator


class Coder:
    """Writes the codes of tokens and tells their numbers again, for the caches of one model.

    Raises what `check_operator` raises.
    """

    def __init__(self, model: PreTrainedModel, operator: JointOperator) -> None:
        check_operator(model, operator)
        self.model, self.operator = model, operator
        self.joint, self.code = operator.calibrated, operator.code
        self.with_ids: bool = operator.config.options["with_ids"]
        self.vectors = TokenVectors(model, self.joint.layers)
        self.lowest = TokenVectors(model, [0])

    @property
    def layers(self) -> tuple[int, ...]:
        """Those that it tells of."""
        return self.vectors.layers

    def covered(self, way: str) -> Tensor:
        """Which parts [L, 2], keys and values by layer, it repairs by restore or estimate."""
        found = torch.zeros(self.operator.config.model.num_layers, 2, dtype=torch.bool)
        sides = self.operator.config.apply_to if way == "estimate" else "KV"
        found[list(self.layers)] = torch.tensor(["K" in sides, "V" in sides])
        return found

    @property
    def bytes_per_token(self) -> int:
        """Of a code; 0 without."""
        return 0 if self.code is None else self.code.bytes_per_token

    def encode(self, keys: list[Tensor], values: list[Tensor], record: TokenRecord, tokens: slice) -> Tensor:
        """The codes uint8 [B, n, bytes] of n `tokens` of clean keys and values [B, G, T, d] of all layers."""
        assert self.code is not None  # it has bytes a token
        starts = range(tokens.start, tokens.stop, CODED)
        parts = [slice(start, min(start + CODED, tokens.stop)) for start in starts]
        return torch.cat([self._encode(keys, values, record, part) for part in parts], 1)

    def _encode(self, keys: list[Tensor], values: list[Tensor], record: TokenRecord, tokens: slice) -> Tensor:
        assert self.code is not None
        positions = record.positions
        x = self.vectors.of(
            [keys[layer][:, :, tokens] for layer in self.layers],
            [values[layer][:, :, tokens] for layer in self.layers],
            positions[:, tokens],
        )
        z = self.joint.standardise(x, out=x)
        if not self.with_ids:
            return self.code.encode_standardised(z)
        start = max(0, tokens.start - (RECENT - 1))
        near = slice(start, tokens.stop)
        if record.erased[:, near].any():  # their numbers are gone: what is read back follows from the ids
            lowest = self._lowest_of_ids(record, start, tokens.stop)
        else:
            lowest = self.lowest.of([keys[0][:, :, near]], [values[0][:, :, near]], positions[:, near])
        prior = self.joint.prior_of(lowest).tokens(slice(tokens.start - start, None))
        return self.code.encode_standardised(z, prior)

    def restore(self, record: TokenRecord, rows: Tensor, slots: Tensor) -> Iterator[KeysValues]:
        """Keys and values [N, G, d] as stored of the tokens (rows[i], slots[i]), from code and ids alone, by layer."""
        prediction = self._predict(record, rows, slots)
        x = self.joint.reconstruct(prediction.c, prediction.prior)
        for keys, values in self.vectors.by_layer(x, record.positions[rows, slots][None]):
            yield keys[0], values[0]

    def estimate(
        self, record: TokenRecord, rows: Tensor, slots: Tensor, keys: Tensor, values: Tensor, sound: Tensor
    ) -> Iterator[KeysValues]:
        """The same from what is left of the tokens, keys and values [N, L', G, d], as well.

        sound [N, L', 2]: which of them are known to be as they were written.
        """
        read_keys, read_values = (side.permute(1, 2, 0, 3)[None] for side in (keys, values))
        prediction, positions = self._predict(record, rows, slots), record.positions[rows, slots][None]
        here = read_keys, read_values, prediction, positions, sound[None]
        found = self.operator.estimate(self.vectors, *here, in_use=True)
        for layer_keys, layer_values in zip(found[0][0], found[1][0], strict=True):
            yield layer_keys.transpose(0, 1), layer_values.transpose(0, 1)

    def _predict(self, record: TokenRecord, rows: Tensor, slots: Tensor) -> Prediction:
        """What ids and codes tell of N tokens."""
        coded = slots < record.codes.shape[1]
        prior = self._prior(record, rows, slots) if self.with_ids else None
        count = 0 if self.code is None else len(self.code.bits)
        c = torch.zeros(1, len(rows), count, dtype=self.model.dtype, device=rows.device)
        if self.code is not None and coded.any():
            some = slice(None) if coded.all() else coded  # without copies where there is nothing to choose
            c[:, some] = self.code.decode(record.codes[rows[some], slots[some]][None], dtype=self.model.dtype)
        return Prediction(c, prior, coded[None])

    def _prior(self, record: TokenRecord, rows: Tensor, slots: Tensor) -> Prior:
        first = max(0, int(slots.min()) - (RECENT - 1))
        lowest = self._lowest_of_ids(record, first, int(slots.max()) + 1)
        near = self.joint.recent(lowest)[rows, slots - first][None]
        return Prior(self.joint.features(near), lowest[rows, slots - first][None])

    def _lowest_of_ids(self, record: TokenRecord, start: int, stop: int) -> Tensor:
        """The vectors of the lowest layer of tokens from `start` to `stop`, which follow from ids and positions."""
        first = start if takes_positions(self.model) else 0  # such a model counts from the first token that it is given
        positions = record.positions[:, first:stop]
        keys, values = stored_in_lowest_layer(self.model, record.ids[:, first:stop], positions)
        return self.lowest.of([keys], [values], positions)[:, start - first :]
