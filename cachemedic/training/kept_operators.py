"""Trained operators, kept by the key of their configuration: read where they are, else trained once."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock

from cachemedic.models.load import Base
from cachemedic.repair.operator import RepairOperator
from cachemedic.training.config import TrainConfig
from cachemedic.training.log import LOG, ship_log
from cachemedic.training.trainer import CHECKPOINT, Trainer


def load_or_train(base: Base, config: TrainConfig, trained: Path, work: Path, retrain: bool = False) -> RepairOperator:
    """The trained operators of `config`: those kept under `trained` (unless `retrain`), else trained and kept there.

    What else was trained or measured lies beside the operators, in trained / config.key(base): a quantiser
    (`KVQuantiser.from_pretrained`), the log, and the checks of a mercy gate (`cachemedic.training.log`).
    `work` holds checkpoints and logs of training in progress; an interrupted training goes on from there.
    """
    key = config.key(base)
    work.mkdir(parents=True, exist_ok=True)
    with FileLock(work / f"{key}.lock"):  # notebooks that run side by side may ask for the same operators
        if retrain or not (trained / key / "config.json").exists():
            _train(base, config, trained / key, work / key)
        operator = RepairOperator.from_pretrained(trained / key)
    operator.check_model(base.model.config)
    return operator.to(base.model.device)


def _train(base: Base, config: TrainConfig, folder: Path, work: Path) -> None:
    """Trains in `work` and writes into `folder`, the operators last."""
    trainer = Trainer(base, config, work)
    operator = trainer.run()
    if trainer.quantiser is not None:
        trainer.quantiser.save_pretrained(folder)
    ship_log(work / LOG, folder)
    operator.save_pretrained(folder)
    (work / CHECKPOINT).unlink(missing_ok=True)  # the log stays
