"""Valence-weighted distillation, by the names that the documentation uses."""

from cachemedic.training.valence.gate import MercyGate
from cachemedic.training.valence.objective import ValenceObjective
from cachemedic.training.valence.saliency import saliency
from cachemedic.training.valence.weights import valence_weights

__all__ = ["MercyGate", "ValenceObjective", "saliency", "valence_weights"]
