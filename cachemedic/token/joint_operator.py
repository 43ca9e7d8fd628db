"""Families D (token-aware) and E (sketch-assisted): repair of whole cached tokens under the joint model.

D stores nothing: it goes by the joint model of clean tokens, by the damaged numbers, and by the token ids if it has
them. E also keeps a code of each token, written when the token was, and the numbers of the first four positions. Both
repair what is stored, not what one layer reads, before any training, which only teaches them whom to trust.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cachemedic.core.integers import LONGEST, whole_number
from cachemedic.data.text_source import TextSource
from cachemedic.models.load import Base
from cachemedic.repair.config import OperatorConfig
from cachemedic.repair.operator import STATISTICS
from cachemedic.repair.registry import register_family
from cachemedic.token.code import TokenCode, check_share
from cachemedic.token.estimate import Trust, estimate
from cachemedic.token.first_token import with_first
from cachemedic.token.joint import JointModel, Prior
from cachemedic.token.joint_calibration import joint_of
from cachemedic.token.joint_files import file_of, find_joint, shipped_joint
from cachemedic.token.kept import Kept, Prediction, hashes_of, kept_sinks, with_sinks
from cachemedic.token.parts import DeviationModel
from cachemedic.token.rounded import half_steps
from cachemedic.token.scratch import Scratch
from cachemedic.token.shared_rotation import undo_shared_rotation
from cachemedic.token.trust import BY_CODE, BY_IDS, initial_trust, noise_correction, unless_another
from cachemedic.token.trust_fit import EstimatingOperator, fit_trust
from cachemedic.token.vectors import TokenVectors

Alarms = dict[str, list[float]]  # thresholds of `check_cache`, by rate of false alarms
FROM_CODE = 1  # the second kind of prediction; the first is from the ids alone
PIECE = 128  # tokens, over all rows, that are estimated at once: their numbers stay in the processor's cache


class JointOperator(EstimatingOperator):
    """What D and E share. `calibrate` gives it a joint model, without which it repairs nothing.

    rank: how many axes an estimate moves along, as a mean over the heads of all layers.
    Options: `with_ids`, whether token ids are used; `rounds` of the estimate; `hidden` units of the trust network.
    """

    default_options: dict[str, Any] = {"with_ids": True, "rounds": 2, "hidden": 16}

    def __init__(self, config: OperatorConfig, parameters: dict[str, Tensor]) -> None:
        super().__init__(config, parameters)
        self.joint: JointModel | None = None
        self.code: TokenCode | None = None
        self.expected_kl: dict[str, float] = {}  # nats, by way of repair
        self.alarms: Alarms = {}
        self.deviations: DeviationModel | None = None  # of the joint model, as an estimate takes it

    @classmethod
    def initial_parameters(cls, config: OperatorConfig, generator: torch.Generator) -> dict[str, Tensor]:
        for name in ("rounds", "hidden"):
            whole_number(name, config.options[name], 1, LONGEST)
        parts = 2 * config.model.num_kv_heads * len(config.layers)
        if "share" in config.options:
            check_share(config.options["share"], parts * config.model.head_dim)
        return initial_trust(parts, config.options["hidden"], generator)

    @classmethod
    def shipped_statistics(cls, base_name: str) -> str | None:
        """See `Trainable`: those of the joint model."""
        joint = shipped_joint(base_name)
        return None if joint is None else joint.digest

    def prepare(
        self, base: Base, source: TextSource, ids: Tensor, faults: Sequence[str], statistics: JointModel | None = None
    ) -> None:
        """See `Trainable`: the joint model, and the trust network where there are `faults`."""
        self.set_joint(joint_of(base, self.layers, source) if statistics is None else statistics)
        if faults:
            fit_trust(self, base.model, ids, faults)

    def set_joint(
        self, joint: JointModel, expected_kl: dict[str, float] | None = None, alarms: Alarms | None = None
    ) -> None:
        """Gives the operator its joint model, E its code, and what was measured of both.

        Raises `ValueError` for a joint model of other layers or shape.
        """
        if (joint.of, joint.layers) != (self.config.model, self.layers):
            raise ValueError(
                f"a joint model of {joint.of} and layers {list(joint.layers)} does not fit an operator of "
                f"{self.config.model} and layers {list(self.layers)}"
            )
        self.joint = joint.to(self.device)
        joint, with_ids = self.calibrated, self.config.options["with_ids"]
        self.code = self._code(joint)
        self.expected_kl, self.alarms = dict(expected_kl or {}), dict(alarms or {})
        left = [joint.variance, *([self.code.left] if self.code else [])]
        count = min(joint.coordinates, self.rank * self.config.model.num_kv_heads * len(self.layers))
        exact = torch.full((len(left),), with_ids, device=self.device)
        self.deviations = DeviationModel.of(joint, torch.stack(left), exact, count)

    def _code(self, joint: JointModel) -> TokenCode | None:
        """Hook: what E writes."""
        return None

    @property
    def calibrated(self) -> JointModel:
        """The joint model that it goes by: without ids, if it uses none. Raises `ValueError` if there is none."""
        if self.joint is None:
            raise ValueError("this operator knows no clean tokens yet: give it to `calibrate` with a base first")
        return self.joint if self.config.options["with_ids"] else self.joint.without_ids

    @property
    def digest(self) -> str:
        """sha256 of all that it is: definition, parameters, joint model."""
        found = hashlib.sha256(f"{self.config} {self._held()}".encode())
        for name, p in sorted(self.named_parameters()):
            found.update(name.encode() + p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    @property
    def bytes_per_token(self) -> int:
        """Of the code; 0 without. A cache keeps hashes besides."""
        return 0 if self.code is None else self.code.bytes_per_token

    @property
    def fixed_bytes(self) -> int:
        """What joint model and parameters take, whatever the number of tokens."""
        return self.calibrated.fixed_bytes + sum(p.nbytes for p in self.parameters())

    def predict(self, prior: Prior | None, codes: Tensor | None = None, like: Tensor | None = None) -> Prediction:
        """From codes [B, T, bytes] and the prior; c is unknown without codes (`like` [B, T, ...]: how many tokens)."""
        if codes is not None and self.code is not None:
            c, coded = self.code.decode(codes, torch.float32 if prior is None else prior.features.dtype), True
        else:
            known = like if prior is None else prior.features
            assert known is not None  # there is nothing else that says how many tokens there are
            c, coded = known.new_zeros(*known.shape[:2], 0), False
        return Prediction(c, prior, torch.full(c.shape[:2], coded, device=c.device))

    def estimate(
        self,
        vectors: TokenVectors,
        keys: Tensor,
        values: Tensor,
        prediction: Prediction,
        positions: Tensor,
        sound: Tensor | None = None,
        trust: Trust | None = None,
        in_use: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [B, L', G, T, d] of the protected layers, repaired, from those that were read.

        positions [B, T]; sound [B, T, L', 2] bool: keys and values known to be as they were written. With R runs B is
        R rows of samples, run-major. trust: corrects the noise instead of the operator's own network. in_use: whether a
        rotation that tokens share is undone first, and tokens of another text are told; training sees faults as they
        are.
        """
        joint, deviations = self.calibrated, self.deviations
        assert deviations is not None  # as there is a joint model
        parts = deviations.parts
        x = joint.reconstruct(prediction.c, prediction.prior)
        angles = vectors.rotation.angles(positions.to(x.device), torch.float32)
        read = parts.stack(keys, values)
        by_part = None if sound is None else sound[..., None].expand(*sound.shape, parts.heads).flatten(2)
        rounded = half_steps(read, parts, by_part) if in_use else None
        in_use &= bool(prediction.prior is not None or prediction.coded.any())  # else all tokens are told the same
        least = torch.tensor([-torch.inf if prediction.prior is None else BY_IDS, BY_CODE], device=x.device)
        if in_use and rounded is None:
            read = undo_shared_rotation(read, x, angles, parts, positions, by_part)
        kind = prediction.coded.long() * FROM_CODE
        own = partial(noise_correction, {name: p.float() for name, p in self.named_parameters()})
        rounds, trust = self.config.options["rounds"], trust or own
        pieces, scratch, size = [], Scratch(), max(1, PIECE // len(read))
        for piece in (slice(start, start + size) for start in range(0, read.shape[1], size)):
            turned = None if angles is None else (angles[0][:, piece], angles[1][:, piece])
            known_sound, steps = (None if known is None else known[:, piece] for known in (by_part, rounded))
            of_piece = kind[:, piece], x[:, piece], read[:, piece], turned
            judge = partial(unless_another, trust, least[kind[:, piece]]) if in_use else trust
            found = estimate(deviations, *of_piece, rounds, judge, known_sound, steps, scratch)
            pieces.append(found.to(keys.dtype))
        found = with_first(joint, torch.cat(pieces, 1), read, prediction.prior, positions)
        sides = zip("kv", parts.unstack(found), (keys, values), strict=True)
        new_keys, new_values = (new if side in self.config.sides else old for side, new, old in sides)
        return new_keys, new_values

    def write_tokens(
        self, model: PreTrainedModel, keys: Tensor, values: Tensor, ids: Tensor, positions: Tensor, lossy: bool = False
    ) -> Kept | None:
        """See `TokenOperator`; None for D."""
        if self.code is None:
            return None
        layers = list(self.layers)
        x = TokenVectors(model, layers).of(keys[:, layers], values[:, layers], positions)
        prior = self.prior(model, ids, positions)
        codes = self.code.encode(x, prior)
        if lossy:
            return Kept(codes)
        return Kept(codes, hashes_of(keys, values, layers), kept_sinks(keys, values, positions))

    def prior(self, model: PreTrainedModel, ids: Tensor, positions: Tensor) -> Prior | None:
        """See `TokenOperator`; None for an operator that does not use ids."""
        return self.calibrated.prior(model, ids, positions) if self.config.options["with_ids"] else None

    def repair_in_use(self, *read: Any) -> tuple[Tensor, Tensor]:
        """See `TokenOperator`. An estimate first looks at what tokens share, which training does not."""
        return self.repair_with_prior(*read, in_use=True)

    def repair_with_prior(
        self,
        vectors: TokenVectors,
        keys: Tensor,
        values: Tensor,
        prior: Prior | None,
        positions: Tensor,
        kept: Kept | None = None,
        way: str = "estimate",
        *,
        in_use: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """See `TokenOperator`; in_use: see `estimate`. With what E kept, all that is as written keeps every bit."""
        layers = list(self.layers)
        here = keys[:, layers], values[:, layers]
        prediction = self.predict(prior, None if kept is None else kept.codes, like=keys[:, 0, 0, :, :1])
        sound = None if kept is None else kept.sound(keys, values, layers)
        if way == "restore":
            new = vectors.back(self.calibrated.reconstruct(prediction.c, prediction.prior), positions)
        else:
            new = self.estimate(vectors, *here, prediction, positions, sound, in_use=in_use)
        repaired = []
        for number, (whole, side, old) in enumerate(zip((keys, values), new, here, strict=True)):
            whole, side = whole.clone(), side.to(whole.dtype)
            if sound is not None:
                side = torch.where(sound[..., number].permute(0, 2, 1)[:, :, None, :, None], old, side)
            whole[:, layers] = side
            if kept is not None and kept.sinks is not None:
                whole = with_sinks(whole, kept.sinks[number].to(whole), positions)
            repaired.append(whole)
        return repaired[0], repaired[1]

    def _like(self, config: OperatorConfig, parameters: dict[str, Tensor]) -> JointOperator:
        other = type(self)(config, parameters)
        if self.joint is not None:
            other.set_joint(self.joint, self.expected_kl, self.alarms)
        return other

    def _held(self) -> object:
        return self.joint and self.calibrated.digest

    def _apply(self, fn: Any, recurse: bool = True) -> JointOperator:
        super()._apply(fn, recurse)
        if self.joint is not None:  # to the device where the parameters are now
            self.set_joint(self.joint, self.expected_kl, self.alarms)
        return self

    def _files_beside(self) -> dict[str, bytes | None]:
        if self.joint is None:
            return {STATISTICS: None}
        record = {"joint": self.joint.digest, "expected_kl": self.expected_kl, "alarms": self.alarms}
        return {STATISTICS: (json.dumps(record, indent=2) + "\n").encode()} | file_of(self.joint)

    def _read_beside(self, folder: Path, named: str | None) -> None:
        if named is None:
            return
        content = (folder / STATISTICS).read_bytes() if (folder / STATISTICS).is_file() else b""
        if hashlib.sha256(content).hexdigest() != named:
            raise ValueError(f"{folder / STATISTICS} is missing, damaged or not of this operator")
        record = json.loads(content)
        self.set_joint(find_joint(folder, record["joint"]), record["expected_kl"], record["alarms"])


@register_family("D")
class TokenAware(JointOperator):
    """Family D: nothing is stored."""


@register_family("E")
class SketchAssisted(JointOperator):
    """Family E: D with a code of each token. Option `share`: its bytes over those of a bf16 cache."""

    default_options = JointOperator.default_options | {"share": 1 / 128}

    def _code(self, joint: JointModel) -> TokenCode:
        return TokenCode(joint, self.config.options["share"])
