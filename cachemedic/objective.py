"""The repair objective and its terms, by the names that the documentation uses."""

from cachemedic.training.objective import (
    RepairObjective,
    contraction_loss,
    contraction_ratio,
    identity_loss,
    kd_loss,
)

__all__ = ["RepairObjective", "contraction_loss", "contraction_ratio", "identity_loss", "kd_loss"]
