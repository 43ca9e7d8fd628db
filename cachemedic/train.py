"""Training of repair operators: all runs of a sweep in one loop, on the clean-cache bank.

Runs are seeds x conditions, seed-major. Conditions of one seed share data and corruption draws (paired comparisons);
different seeds share none: each has its own slice of the bank and its own generators. Generators are derived from
(seed, step), so that a resumed run continues to the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from tqdm import tqdm

from cachemedic.attention import protect
from cachemedic.bank import Bank, BankConfig, open_bank, weights_digest
from cachemedic.corruption import Mixture, corrupt
from cachemedic.corruption_spec import CorruptionEvent
from cachemedic.corruption_types import NONE
from cachemedic.gram import Gram, layer_terms
from cachemedic.models import Base
from cachemedic.objective import RepairObjective, StepOutputs
from cachemedic.operators import RepairOperator
from cachemedic.student import shared_prefix, starting_at

Objective = Callable[[StepOutputs], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class TrainConfig:
    """One sweep. `objectives` are the conditions; each is trained under every seed."""

    family: str = "A"
    layers: tuple[int, ...] = tuple(range(12))
    rank: int = 8
    apply_to: str = "KV"
    corrupted_layers: str = "all"  # "all": faults hit storage; "protected": faults on the protected layers only
    objectives: tuple[RepairObjective, ...] = (RepairObjective(),)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    mixture: Mixture = field(default_factory=Mixture)
    bank: BankConfig = BankConfig()
    steps: int = 300
    batch: int = 16  # samples per run and step
    lr: float = 3e-3
    clip: float = 1.0  # gradient norm per run
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        if self.corrupted_layers not in ("all", "protected"):
            raise ValueError(f"corrupted_layers must be 'all' or 'protected', not {self.corrupted_layers!r}")
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise ValueError(f"seeds must be distinct and at least one, not {self.seeds}")
        for name in ("steps", "batch", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.bank.samples < self.batch * len(self.seeds):
            raise ValueError(
                f"a bank of {self.bank.samples} samples is too small for {len(self.seeds)} seeds with batches of "
                f"{self.batch}: different seeds share no sample"
            )

    @property
    def runs(self) -> int:
        return len(self.seeds) * len(self.objectives)

    def key(self, base: Base) -> str:
        """The name of the trained operators: a hash of this configuration and of the base."""
        text = json.dumps([asdict(self), base.name, weights_digest(base)], sort_keys=True, default=str)
        return f"{Path(base.name).name}-{self.family}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def generator(*name: int | str) -> torch.Generator:
    """A generator seeded by its name: equal names give equal draws, different names independent ones."""
    digest = hashlib.sha256(json.dumps(name).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def stack_objectives(objectives: tuple[RepairObjective, ...], seeds: int) -> RepairObjective:
    """One objective whose weights are one number a run, runs seed-major."""
    if len({o.temperature for o in objectives}) != 1:
        raise ValueError("all conditions of one sweep must share the distillation temperature")
    weights = {
        name: tuple(getattr(o, name) for o in objectives) * seeds
        for name in ("lambda_id", "lambda_contr", "alpha_contr", "lambda_w")
    }
    return RepairObjective(temperature=objectives[0].temperature, **weights)


@dataclass
class Draw:
    """The data of one step: S seeds x B samples, L' layers from the first corrupted or protected one on."""

    rows: torch.Tensor  # [S, B] indices into the bank
    keys: torch.Tensor  # corrupted [S, B, L', G, T, d]
    values: torch.Tensor
    events: list[list[CorruptionEvent]]


class Trainer:
    """Trains the operators of one `TrainConfig`; `folder` receives checkpoint and log, and is resumed from."""

    def __init__(self, base: Base, config: TrainConfig, folder: Path, bank: Bank | None = None) -> None:
        self.base, self.config, self.folder = base, config, folder
        self.bank = open_bank(base, config.bank) if bank is None else bank
        seeds = [seed for seed in config.seeds for _ in config.objectives]
        self.operator = RepairOperator.create(
            config.family, base.model.config, layers=config.layers, rank=config.rank, apply_to=config.apply_to,
            seed=seeds, runs=config.runs,
        )  # fmt: skip
        self.objective = stack_objectives(config.objectives, len(config.seeds))
        self.optimizer = torch.optim.Adam(self.operator.parameters(), lr=config.lr)
        # the student starts at the first layer that sees a corruption or a repair
        self.first = 0 if config.corrupted_layers == "all" else min(config.layers)
        self.step = 0
        self.key = config.key(base)

    def draw(self, step: int) -> Draw:
        """Samples, events and corrupted caches of one step, for every seed by its own generator."""
        config, bank = self.config, self.bank
        share = len(bank) // len(config.seeds)
        rows: list = []
        keys: list = []
        values: list = []
        events: list = []
        hit = torch.zeros(bank.keys.shape[1], dtype=torch.bool)
        hit[list(config.layers) if config.corrupted_layers == "protected" else slice(None)] = True
        for position, seed in enumerate(config.seeds):
            draws = generator("train", seed, step)
            picked = position * share + torch.randint(share, (config.batch,), generator=draws)
            k, v = bank.keys[picked][:, self.first :], bank.values[picked][:, self.first :]
            drawn = config.mixture.draw(draws, config.batch, tuple(bank.keys.shape[1:4]))
            drawn = [
                replace(e, layers=(e.layers & hit)[self.first :], heads=e.heads[self.first :]) for e in drawn
            ]
            donor_k, donor_v = k.roll(1, 0), v.roll(1, 0)  # another text of the same seed
            k, v = corrupt(k, v, drawn, draws, donor_k, donor_v)
            for collected, new in ((rows, picked), (keys, k), (values, v), (events, drawn)):
                collected.append(new)
        return Draw(torch.stack(rows), torch.stack(keys), torch.stack(values), events)

    def forward(self, draw: Draw) -> tuple[StepOutputs, dict[str, torch.Tensor]]:
        """Student pass and Gram terms of one step; also `rho_k` and `rho_v` [R, B, P] for inspection."""
        config, bank, model = self.config, self.bank, self.base.model
        conditions, decoded = len(config.objectives), bank.logits.shape[1]
        runs = draw.rows.repeat_interleave(conditions, 0)  # [R, B]
        ids = bank.ids[runs.flatten()][:, bank.prefix :]
        positions = torch.arange(bank.prefix, bank.prefix + decoded).expand(len(ids), -1)
        hidden = bank.hidden[runs.flatten()][:, self.first]
        with (
            shared_prefix(model, draw.keys, draw.values, self.first, conditions),
            starting_at(model, self.first, hidden),
            protect(model, self.operator, record_gates=True) as protection,
        ):
            logits = model(ids, position_ids=positions, use_cache=False).logits
        clean = bank.keys[draw.rows], bank.values[draw.rows]
        terms: dict[str, list[torch.Tensor]] = {"identity": [], "rho": [], "rho_k": [], "rho_v": []}
        found: list[torch.Tensor] = []
        for layer in config.layers:
            grams = [
                Gram.of(before[:, :, layer], after[:, :, layer - self.first])
                for before, after in zip(clean, (draw.keys, draw.values), strict=True)
            ]
            found.append(grams[0].found + grams[1].found)
            gate_k, gate_v = (
                None if gate is None else gate.unflatten(0, (config.runs, -1)) for gate in protection.gates[layer]
            )
            for name, value in layer_terms(grams[0], grams[1], self.operator.factors(layer), (gate_k, gate_v)).items():
                terms[name].append(value)
        stacked = {name: torch.stack(values, -1) for name, values in terms.items()}
        clean_event = torch.tensor([[e.type == NONE for e in events] for events in draw.events])
        outputs = StepOutputs(
            z_clean=bank.logits[runs],
            z_rep=logits.unflatten(0, (config.runs, -1)),
            identity=stacked["identity"],
            rho=stacked["rho"],
            is_clean=clean_event.repeat_interleave(conditions, 0),
            is_corrupted=(torch.stack(found, -1) > 0).repeat_interleave(conditions, 0),
            parameters=list(self.operator.parameters()),
        )
        return outputs, stacked

    def train_step(self) -> list[dict]:
        """One update of all runs; returns the log records, one a run."""
        draw = self.draw(self.step)
        outputs, stacked = self.forward(draw)
        parts = self.objective(outputs)
        self.optimizer.zero_grad()
        parts["loss"].sum().backward()  # runs share no parameter: each gets the gradient of its own loss
        self._clip()
        self.optimizer.step()
        self.step += 1
        if not torch.isfinite(parts["loss"]).all():
            bad = [i for i, x in enumerate(parts["loss"].tolist()) if x != x or abs(x) == float("inf")]
            raise FloatingPointError(f"the loss of runs {bad} is not finite at step {self.step}; the checkpoint is kept")
        return self._records(draw, outputs, stacked, parts)

    def _clip(self) -> None:
        gradients = [p.grad for p in self.operator.parameters() if p.grad is not None]
        norm = sum(g.flatten(1).square().sum(1) for g in gradients).sqrt()  # [R]
        scale = (self.config.clip / norm.clamp_min(1e-12)).clamp_max(1.0)
        for gradient in gradients:
            gradient.mul_(scale.view(-1, *[1] * (gradient.ndim - 1)))

    @torch.no_grad()
    def _records(self, draw: Draw, outputs: StepOutputs, stacked: dict, parts: dict) -> list[dict]:
        conditions, now = len(self.config.objectives), datetime.now(UTC).isoformat(timespec="seconds")
        logged = [[event.as_record() for event in events] for events in draw.events]
        records = []
        for run in range(self.config.runs):
            seed, condition = divmod(run, conditions)
            hit = outputs.is_corrupted[run]
            rho = {name: stacked[name][run][hit].flatten() for name in ("rho", "rho_k", "rho_v")}
            none = rho["rho"].numel() == 0
            records.append({
                "run_id": f"{self.key}/seed{self.config.seeds[seed]}/condition{condition}",
                "phase": "train",
                "timestamp_utc": now,
                "step": self.step,
                **{f"loss_{short}": float(parts[name][run]) for short, name in LOSSES.items()},
                "rho_mean": None if none else float(rho["rho"].mean()),
                "rho_p95": None if none else float(rho["rho"].quantile(0.95)),
                "rho_k_mean": None if none else float(rho["rho_k"].mean()),
                "rho_v_mean": None if none else float(rho["rho_v"].mean()),
                "corruption_type": [record["type"] for record in logged[seed]],
                "corruption_severity": [record["severity"] for record in logged[seed]],
                "events": logged[seed],
            })  # fmt: skip
        return records

    def save(self) -> None:
        """Checkpoint: operator, optimiser and step, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {"operator": self.operator.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        temporary = self.folder / "checkpoint.tmp"
        torch.save(state, temporary)
        os.replace(temporary, self.folder / "checkpoint.pt")

    def resume(self) -> None:
        """Go back to the checkpoint, if there is one, and drop the log lines that came after it."""
        checkpoint, log = self.folder / "checkpoint.pt", self.folder / "log.jsonl"
        if checkpoint.exists():
            state = torch.load(checkpoint, weights_only=True)
            self.operator.load_state_dict(state["operator"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
        if log.exists():
            with open(log, "rb+") as file:
                kept = 0
                for line in file:
                    if not line.endswith(b"\n") or json.loads(line)["step"] > self.step:
                        break
                    kept += len(line)
                file.truncate(kept)

    def run(self) -> RepairOperator:
        """Train to the end (from the last checkpoint on) and return the operator stack; an interrupt loses nothing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.resume()
        what = f"train {self.config.family} x {self.config.runs} runs on {self.base.name}"
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as log:
            try:
                bar = tqdm(total=self.config.steps, initial=self.step, desc=what)
                while self.step < self.config.steps:
                    records = self.train_step()
                    log.writelines(json.dumps(record) + "\n" for record in records)
                    bar.update()
                    bar.set_postfix(kd=f"{sum(r['loss_kd'] for r in records) / len(records):.4f}")
                    if self.step % self.config.checkpoint_every == 0:
                        log.flush()
                        self.save()
            finally:
                log.flush()
                if self.step:
                    self.save()
        return self.operator


LOSSES = {"total": "loss", "kd": "kd", "id": "identity", "contr": "contraction"}


def load_or_train(base: Base, config: TrainConfig, trained: Path, work: Path, retrain: bool = False) -> RepairOperator:
    """The trained operators of `config`: those kept under `trained` (unless `retrain`), else trained now and kept there.

    `work` holds checkpoints and logs; an interrupted training goes on from there.
    """
    key = config.key(base)
    if not retrain and (trained / key / "config.json").exists():
        operator = RepairOperator.from_pretrained(trained / key)
        operator.check_model(base.model.config)
        return operator
    trainer = Trainer(base, config, work / key)
    operator = trainer.run()
    operator.save_pretrained(trained / key)
    (trainer.folder / "checkpoint.pt").unlink()  # the log stays
    return operator
