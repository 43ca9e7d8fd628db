"""The repair objective and its terms, by the names that the documentation uses."""

from cachemedic.core.divergence import contraction_loss, contraction_ratio, identity_loss, kd_loss
from cachemedic.training.objective import RepairObjective

__all__ = ["RepairObjective", "contraction_loss", "contraction_ratio", "identity_loss", "kd_loss"]
