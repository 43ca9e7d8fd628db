"""Training of repair operators: all runs of a sweep in one loop, on the clean-cache bank.

Runs are seeds x conditions, seed-major. Conditions of one seed share data and corruption draws (paired comparisons);
different seeds share none.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cachemedic.core.files import naming, remove_leftovers, seal, write_atomically
from cachemedic.core.progress import tqdm
from cachemedic.core.tensors import flattened, read_tensors, tensor_bytes, unflattened
from cachemedic.core.threads import one_thread
from cachemedic.corruption.severity import shipped_map
from cachemedic.models.attention import attention_modules
from cachemedic.models.load import Base
from cachemedic.repair.attach import IdleOperatorWarning
from cachemedic.repair.operator import RepairOperator
from cachemedic.training.bank import WITH_REVIEWS, Bank, open_bank
from cachemedic.training.config import TrainConfig, sweep_objective
from cachemedic.training.draws import Draw, draw_step
from cachemedic.training.forward import Students, forward
from cachemedic.training.keep_best import EVERY, KeepBest
from cachemedic.training.log import LOG, drop_after, log_records
from cachemedic.training.run_adam import RunAdam
from cachemedic.training.step_data import StepOutputs
from cachemedic.training.valence.gate import GateKeeper, Verdict
from cachemedic.training.valence.head import Valence, shipped_valence
from cachemedic.training.valence.objective import ValenceObjective
from cachemedic.training.valence.projection import projection
from cachemedic.training.valence.quantiser import KVQuantiser

CHECKPOINT = "checkpoint.safetensors"
VALIDATION_STEP, VALIDATIONS = 1_000_000, 2  # draws of steps that no training reaches
FITTED = 8  # texts of the bank that `prepare` of an operator sees


class Trainer:
    """Trains the operators of one `TrainConfig`; `folder` receives checkpoint and log, and is resumed from.

    `valence` is the head that a valence objective or a mercy gate needs, from last hidden states [..., width] to
    [0, 1]^m (None: the one that comes with the base). `statistics` are what `prepare` of the operator takes, the joint
    model of families D and E (None: shipped or measured). Operators that repair stored tokens, and quantisers, are
    validated as they train, and every run returns its best parameters.
    Raises `ValueError` for a configuration that does not fit the base, before the bank is computed.
    """

    def __init__(
        self,
        base: Base,
        config: TrainConfig,
        folder: Path,
        bank: Bank | None = None,
        valence: Valence | None = None,
        statistics: Any = None,
    ) -> None:
        self.base, self.config, self.folder = base, config, folder
        seeds = [seed for seed in config.seeds for _ in config.objectives]
        self.operator = RepairOperator.create(
            config.family, base.model.config, layers=config.layers, rank=config.rank, apply_to=config.apply_to,
            seed=seeds, runs=config.runs, **config.options,
        ).to(base.model.device)  # fmt: skip
        attention_modules(base.model, range(config.first_layer, base.config.num_hidden_layers))  # students need all
        shape = self.operator.config.model
        cache_shape = (shape.num_layers, shape.num_kv_heads, config.bank.prefix)
        self.severity_map = base.severity_map or shipped_map()
        for corruption in config.mixture.weights:  # severities must be calibrated
            self.severity_map.reach(corruption, config.mixture.base, cache_shape)
        self.objective = sweep_objective(config.objectives, len(config.seeds))
        self.valence = shipped_valence(base) if valence is None and config.needs_valence else valence
        self.bank = open_bank(base, config.bank) if bank is None else bank
        self.best: KeepBest | None = None
        faults = tuple(kind for kind, weight in config.mixture.weights.items() if weight) if config.repairs else ()
        self.operator.prepare(base, config.bank.source, self.bank.ids[:FITTED], faults, statistics)
        self.first = config.first_layer
        self.quantiser, self.strength = self._quantiser(), self._strength()
        if self.operator.repairs_tokens or self.quantiser is not None:
            self.best = KeepBest(torch.nn.ModuleDict(self.trained), config.runs)
        self.optimizer = RunAdam((p for part in self.trained.values() for p in part.parameters()), lr=config.lr)
        self.keeper = None if config.gate is None else GateKeeper(config.gate, config.runs, self.optimizer)
        self._unseen: Bank | None = None  # for validation
        self.step = 0
        self.key = config.key(base)
        conditions = range(len(config.objectives))
        self.run_ids = [f"{self.key}/seed{seed}/condition{c}" for seed in config.seeds for c in conditions]

    def _quantiser(self) -> KVQuantiser | None:
        if self.config.quantiser is None:
            return None
        clean = self.bank.keys[:1], self.bank.values[:1]
        return KVQuantiser.calibrated(self.config.quantiser, *clean, self.config.runs).to(self.base.model.device)

    def _strength(self) -> torch.nn.ParameterDict | None:
        if not any(o.learn_lam for o in self.config.valence_objectives):
            return None
        begin = [o.lam if isinstance(o, ValenceObjective) else 0.0 for o in self.config.objectives]
        lam = torch.tensor(begin * len(self.config.seeds), device=self.base.model.device)
        return torch.nn.ParameterDict({"lam": torch.nn.Parameter(lam)})

    @property
    def trained(self) -> dict[str, torch.nn.Module]:
        """What the optimiser moves, by its name in a checkpoint."""
        parts = {
            "operator": self.operator if self.config.repairs else None,
            "quantiser": self.quantiser if self.config.learns_steps else None,
            "strength": self.strength,
        }
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def students(self) -> Students:
        strength = None if self.strength is None else self.strength["lam"]
        return Students(
            self.base, self.config, self.bank, self.operator, self.first, self.quantiser, self.valence, strength
        )

    def draw(self, step: int) -> Draw:
        """Samples, events and corrupted caches of one step."""
        return draw_step(self.config, self.bank, self.first, step, self.severity_map)

    def forward(self, draw: Draw) -> StepOutputs:
        """The student pass of one step and the terms of the repair."""
        return forward(self.students, draw)

    def train_step(self) -> list[dict]:
        """One update of all runs; returns the log records, one a run.

        Raises `FloatingPointError` if a loss is not finite, `MercyGateError` if the gate blocks a run for too long.
        """
        if self.config.schedule == "linear":
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.lr * (1 - self.step / self.config.steps)
        draw = self.draw(self.step)
        outputs = self.forward(draw)
        parts = self.objective(outputs)
        self.optimizer.zero_grad()
        parts["loss"].sum().backward()  # runs share no parameter: each gets the gradient of its own loss
        norms = self._clip()
        diverged = ~(parts["loss"].isfinite() & norms.isfinite())
        if diverged.any():
            runs = diverged.nonzero().flatten().tolist()
            raise FloatingPointError(f"loss or gradient of runs {runs} is not finite at step {self.step + 1}")
        verdict = self._update(draw)
        self.step += 1
        return log_records(self.run_ids, self.step, draw.events, outputs, parts, verdict)

    def _update(self, draw: Draw) -> Verdict | None:
        """The update on `draw`, under the eyes of the gate if it is due, or if the state may be the one to return."""
        update = self.step + 1
        if self.keeper is None or not (self.keeper.gate.due(update) or self._may_return(update)):
            self.optimizer.step()
            return None
        return self.keeper.step(update, lambda gate: projection(self.students, gate, draw))

    def _may_return(self, step: int) -> bool:
        """Whether the state after `step` updates may be what training returns."""
        return step == self.config.steps or (self.best is not None and step % EVERY == 0)

    def _clip(self) -> torch.Tensor:
        """Clips the gradient of each run by its norm; returns the norms [R] before that."""
        parameters = [p for part in self.trained.values() for p in part.parameters()]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norms = torch.stack([g.view(len(g), -1).square().sum(1) for g in gradients]).sum(0).sqrt()
        scale = (self.config.clip / norms.clamp_min(1e-12)).clamp_max(1.0)
        for gradient in gradients:
            gradient.mul_(scale.view(-1, *[1] * (gradient.ndim - 1)))
        return norms

    def save(self) -> None:
        """Checkpoint: what is trained, optimiser, gate and step, whole or not at all."""
        tensors, rest = flattened({name: part.state_dict() for name, part in self._state().items()})
        record = {"key": self.key, "step": self.step, "state": rest}
        write_atomically(self.folder / CHECKPOINT, tensor_bytes(tensors, record))

    def _state(self) -> dict[str, Any]:
        keeper = {} if self.keeper is None else {"gate": self.keeper}
        best = {} if self.best is None else {"best": self.best}
        return {**self.trained, "optimizer": self.optimizer, **keeper, **best}

    @torch.no_grad()
    def validate(self) -> torch.Tensor:
        """The loss [R] on windows and faults of the validation split, the same ones at every call."""
        if self._unseen is None:
            split = "validation" + WITH_REVIEWS * self.config.bank.split.endswith(WITH_REVIEWS)
            count = self.config.batch * len(self.config.seeds)
            self._unseen = open_bank(self.base, replace(self.config.bank, split=split, samples=count))
        students = replace(self.students, bank=self._unseen)
        draws = (
            draw_step(self.config, self._unseen, self.first, VALIDATION_STEP + i, self.severity_map)
            for i in range(VALIDATIONS)
        )
        return torch.stack([self.objective(forward(students, draw))["loss"] for draw in draws]).mean(0)

    def resume(self) -> None:
        """Go back to the checkpoint, if there is one, and drop the log lines that came after it.

        Raises `ValueError` if the checkpoint is damaged or of another configuration or base.
        """
        checkpoint, log = self.folder / CHECKPOINT, self.folder / LOG
        remove_leftovers(self.folder)
        if checkpoint.exists():
            try:
                tensors, record = read_tensors(checkpoint)
            except ValueError as error:
                raise ValueError(f"{error}; delete it to train from the start") from error
            if record["key"] != self.key:
                raise ValueError(f"{checkpoint} belongs to {record['key']}, not to {self.key}: choose another folder")
            state = unflattened(tensors, record["state"])
            for name, part in self._state().items():
                part.load_state_dict(state[name])
            self.step = record["step"]
        if log.exists():
            drop_after(log, self.step, self.config.runs)

    @one_thread()
    def run(self) -> RepairOperator:
        """Train to the end, on one thread, from the last checkpoint if there is one, and return the operator stack."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.resume()
        log_path = self.folder / LOG
        what = f"train {self.config.family} x {self.config.runs} runs on {self.base.name}"
        with (
            warnings.catch_warnings(action="ignore", category=IdleOperatorWarning),  # training begins with the identity
            open(log_path, "ab", buffering=0) as log,
            tqdm(total=self.config.steps, initial=self.step, desc=what) as bar,
        ):
            if self.step == 0:
                self._begin()
            while self.step < self.config.steps:
                records = self.train_step()
                with naming(log_path):
                    log.writelines(seal(record, indent=None) for record in records)
                bar.update()
                bar.set_postfix(loss=f"{sum(r['loss_total'] for r in records) / len(records):.4f}")
                if self.best is not None and self._may_return(self.step):
                    self.best.update(self._losses())
                if self.step % self.config.checkpoint_every == 0 or self.step == self.config.steps:
                    self.save()
        if self.keeper is not None:
            self.keeper.end()
        if self.best is not None:
            self.best.restore()
        return self.operator

    def _begin(self) -> None:
        """Judge the state before training, which may be the best or the last one to pass."""
        if self.keeper is not None:
            self.keeper.start(lambda gate: projection(self.students, gate, self.draw(0)))
        if self.best is not None and self.config.steps:
            self.best.update(self._losses())

    def _losses(self) -> torch.Tensor:
        """`validate`, and infinite for runs that are not in a state that has passed the gate."""
        losses = self.validate()
        return losses if self.keeper is None else losses.cpu().where(self.keeper.has_passed, torch.inf)
