"""Training of repair operators: all runs of a sweep in one loop, on the clean-cache bank.

Runs are seeds x conditions, seed-major. Conditions of one seed share data and corruption draws (paired comparisons);
different seeds share none: each has its own slice of the bank and its own generators. Generators are derived from
(seed, step), so that a resumed run continues to the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from cachemedic import severity
from cachemedic.attention import protect
from cachemedic.bank import Bank, open_bank
from cachemedic.corruption import corrupt
from cachemedic.corruption_spec import CorruptionEvent
from cachemedic.corruption_types import NONE
from cachemedic.families import FoldedOperator
from cachemedic.gram import Gram, layer_terms
from cachemedic.models import Base
from cachemedic.objective import StepOutputs
from cachemedic.operators import RepairOperator
from cachemedic.student import shared_prefix, starting_at
from cachemedic.text import write_atomically
from cachemedic.train_config import TrainConfig, stack_objectives
from cachemedic.train_log import drop_after, log_records


def generator(*name: int | str) -> torch.Generator:
    """A generator seeded by its name: equal names give equal draws, different names independent ones."""
    digest = hashlib.sha256(json.dumps(name).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass
class Draw:
    """The data of one step: S seeds x B samples, L' layers from the first corrupted or protected one on."""

    rows: torch.Tensor  # [S, B] indices into the bank
    keys: torch.Tensor  # corrupted [S, B, L', G, T, d]
    values: torch.Tensor
    events: list[list[CorruptionEvent]]


class Trainer:
    """Trains the operators of one `TrainConfig`; `folder` receives checkpoint and log, and is resumed from.

    Raises `ValueError` for a configuration that does not fit the base, before the bank is computed.
    """

    def __init__(self, base: Base, config: TrainConfig, folder: Path, bank: Bank | None = None) -> None:
        self.base, self.config, self.folder = base, config, folder
        seeds = [seed for seed in config.seeds for _ in config.objectives]
        self.operator = RepairOperator.create(
            config.family, base.model.config, layers=config.layers, rank=config.rank, apply_to=config.apply_to,
            seed=seeds, runs=config.runs,
        ).to(base.model.device)  # fmt: skip
        shape = self.operator.config.model
        for corruption in config.mixture.weights:  # severities must be calibrated
            severity.reach(corruption, config.mixture.base, (shape.num_layers, shape.num_kv_heads, config.bank.prefix))
        self.objective = stack_objectives(config.objectives, len(config.seeds))
        self.bank = open_bank(base, config.bank) if bank is None else bank
        self.optimizer = torch.optim.Adam(self.operator.parameters(), lr=config.lr)
        # the student starts at the first layer that sees a corruption or a repair
        self.first = 0 if config.corrupted_layers == "all" else min(config.layers)
        self.step = 0
        self.key = config.key(base)
        conditions = range(len(config.objectives))
        self.run_ids = [f"{self.key}/seed{seed}/condition{c}" for seed in config.seeds for c in conditions]

    def draw(self, step: int) -> Draw:
        """Samples, events and corrupted caches of one step, on the CPU, for every seed by its own generator."""
        config, bank = self.config, self.bank
        share = len(bank) // len(config.seeds)
        rows = []
        events: list[list[CorruptionEvent]] = []
        # a layer at a time in memory, as student and Gram matrices read them: without that they copy each layer first
        shape = len(config.seeds), config.batch
        keys, values = (
            x.new_empty(x.shape[1] - self.first, *shape, *x.shape[2:]).permute(1, 2, 0, 3, 4, 5)
            for x in (bank.keys, bank.values)
        )
        layers, heads, length = bank.keys.shape[1:4]
        hit = torch.zeros(layers, dtype=torch.bool)
        hit[list(config.layers) if config.corrupted_layers == "protected" else slice(None)] = True
        for position, seed in enumerate(config.seeds):
            draws = generator("train", seed, step)
            picked = torch.randint(share, (config.batch,), generator=draws)
            donors = picked + torch.randint(1, max(share, 2), (config.batch,), generator=draws)
            # donors: another text of the same seed
            picked, donors = position * share + picked, position * share + donors % share
            drawn = config.mixture.draw(draws, config.batch, (layers, heads, length))
            drawn = [replace(e, layers=(e.layers & hit)[self.first :], heads=e.heads[self.first :]) for e in drawn]
            for sample, (row, donor, event) in enumerate(zip(picked.tolist(), donors.tolist(), drawn, strict=True)):
                # one by one, from views of the bank: nothing but the result is copied
                stored = [x[i : i + 1, self.first :] for i in (row, donor) for x in (bank.keys, bank.values)]
                k, v = corrupt(stored[0], stored[1], [event], draws, stored[2], stored[3])
                keys[position, sample], values[position, sample] = k[0], v[0]
            rows.append(picked)
            events.append(drawn)
        return Draw(torch.stack(rows), keys, values, events)

    def forward(self, draw: Draw) -> tuple[StepOutputs, dict[str, torch.Tensor]]:
        """Student pass and Gram terms of one step; also `rho_k` and `rho_v` [R, B, P] for inspection."""
        config, bank, model, operator = self.config, self.bank, self.base.model, self.operator
        assert isinstance(operator, FoldedOperator)  # only a fold has Gram terms
        device, dtype = model.device, model.dtype
        conditions, decoded = len(config.objectives), bank.logits.shape[1]
        runs = draw.rows.repeat_interleave(conditions, 0)  # [R, B]
        ids = bank.ids[runs.flatten(), bank.prefix :].to(device)
        positions = torch.arange(bank.prefix, bank.prefix + decoded, device=device).expand(len(ids), -1)
        hidden = bank.hidden[runs.flatten(), self.first].to(device, dtype)
        corrupted = draw.keys.to(device), draw.values.to(device)
        with (
            shared_prefix(model, corrupted[0].to(dtype), corrupted[1].to(dtype), self.first, conditions),
            starting_at(model, self.first, hidden),
            protect(model, operator, record_gates=True) as protection,
        ):
            logits = model(ids, position_ids=positions, use_cache=False).logits
        terms: dict[str, list[torch.Tensor]] = {"identity": [], "rho": [], "rho_k": [], "rho_v": []}
        found: list[torch.Tensor] = []
        for layer in config.layers:
            grams = [
                Gram.of(clean[draw.rows, layer].to(device), after[:, :, layer - self.first])
                for clean, after in zip((bank.keys, bank.values), corrupted, strict=True)
            ]
            found.append(grams[0].found + grams[1].found)
            gate_k, gate_v = (
                None if gate is None else gate.unflatten(0, (config.runs, -1)) for gate in protection.gates[layer]
            )
            for name, value in layer_terms(grams[0], grams[1], operator.factors(layer), (gate_k, gate_v)).items():
                terms[name].append(value)
        stacked = {name: torch.stack(values, -1) for name, values in terms.items()}
        untouched = [[e.type == NONE or e.severity == 0 for e in events] for events in draw.events]
        outputs = StepOutputs(
            z_clean=bank.logits[runs].to(device),
            z_rep=logits.float().unflatten(0, (config.runs, -1)),
            identity=stacked["identity"],
            rho=stacked["rho"],
            is_clean=torch.tensor(untouched, device=device).repeat_interleave(conditions, 0),
            is_corrupted=(torch.stack(found, -1) > 0).repeat_interleave(conditions, 0),
            parameters=list(operator.parameters()),
        )
        return outputs, stacked

    def train_step(self) -> list[dict]:
        """One update of all runs; returns the log records, one a run."""
        draw = self.draw(self.step)
        outputs, stacked = self.forward(draw)
        parts = self.objective(outputs)
        self.optimizer.zero_grad()
        parts["loss"].sum().backward()  # runs share no parameter: each gets the gradient of its own loss
        norms = self._clip()
        diverged = ~(parts["loss"].isfinite() & norms.isfinite())
        if diverged.any():
            runs = diverged.nonzero().flatten().tolist()
            raise FloatingPointError(f"loss or gradient of runs {runs} is not finite at step {self.step + 1}")
        self.optimizer.step()
        self.step += 1
        return log_records(self.run_ids, self.step, draw.events, outputs, stacked, parts)

    def _clip(self) -> torch.Tensor:
        """Clips the gradient of each run by its norm; returns the norms [R] before that."""
        gradients = [p.grad for p in self.operator.parameters() if p.grad is not None]
        norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
        scale = (self.config.clip / norms.clamp_min(1e-12)).clamp_max(1.0)
        for gradient in gradients:
            gradient.mul_(scale.view(-1, *[1] * (gradient.ndim - 1)))
        return norms

    def save(self) -> None:
        """Checkpoint: operator, optimiser and step, whole or not at all."""
        state = {
            "key": self.key,
            "step": self.step,
            "operator": self.operator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(self.folder / "checkpoint.pt", buffer.getvalue())

    def resume(self) -> None:
        """Go back to the checkpoint, if there is one, and drop the log lines that came after it.

        Raises `ValueError` if the checkpoint is damaged or of another configuration or base.
        """
        checkpoint, log = self.folder / "checkpoint.pt", self.folder / "log.jsonl"
        if checkpoint.exists():
            try:
                state = torch.load(io.BytesIO(checkpoint.read_bytes()), weights_only=True, map_location="cpu")
            except Exception as error:  # of many kinds, according to where the damage is
                raise ValueError(f"{checkpoint} is damaged; delete it to train from the start: {error}") from error
            if state["key"] != self.key:
                raise ValueError(f"{checkpoint} belongs to {state['key']}, not to {self.key}: choose another folder")
            self.operator.load_state_dict(state["operator"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
        if log.exists():
            drop_after(log, self.step)

    def run(self) -> RepairOperator:
        """Train to the end, from the last checkpoint on if there is one, and return the operator stack."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.resume()
        what = f"train {self.config.family} x {self.config.runs} runs on {self.base.name}"
        with (
            open(self.folder / "log.jsonl", "a", encoding="utf-8") as log,
            tqdm(total=self.config.steps, initial=self.step, desc=what) as bar,
        ):
            while self.step < self.config.steps:
                records = self.train_step()
                log.writelines(json.dumps(record) + "\n" for record in records)
                bar.update()
                bar.set_postfix(kd=f"{sum(r['loss_kd'] for r in records) / len(records):.4f}")
                if self.step % self.config.checkpoint_every == 0 or self.step == self.config.steps:
                    log.flush()
                    self.save()
        return self.operator


def load_or_train(base: Base, config: TrainConfig, trained: Path, work: Path, retrain: bool = False) -> RepairOperator:
    """The trained operators of `config`: those kept under `trained` (unless `retrain`), else trained and kept there.

    `work` holds checkpoints and logs; an interrupted training goes on from there.
    """
    key = config.key(base)
    if not retrain and (trained / key / "config.json").exists():
        operator = RepairOperator.from_pretrained(trained / key)
        operator.check_model(base.model.config)
        return operator.to(base.model.device)
    trainer = Trainer(base, config, work / key)
    operator = trainer.run()
    operator.save_pretrained(trained / key)
    (trainer.folder / "checkpoint.pt").unlink()  # the log stays
    return operator
