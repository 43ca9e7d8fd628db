"""Operators of families D and E that know the tokens of tiny bases."""

from functools import cache

from tiny import DOCUMENTS
from tiny_training import tiny_base

from cachemedic.models.load import Base
from cachemedic.repair.operator import RepairOperator
from cachemedic.token.joint import JointModel
from cachemedic.token.joint_calibration import fit_joint_model
from cachemedic.token.joint_operator import JointOperator

LAYERS = (0, 1, 2)


@cache
def base_of(architecture: str) -> Base:
    return tiny_base(architecture)


@cache
def joint_of(architecture: str, layers: tuple[int, ...] = LAYERS) -> JointModel:
    return fit_joint_model(base_of(architecture), DOCUMENTS, layers)


def calibrated(architecture="gpt2", family="E", layers=LAYERS, runs=1, **options) -> JointOperator:
    """An untrained operator with a joint model; with a long code, as tiny tokens have few numbers."""
    options = ({"share": 1 / 16} if family == "E" else {}) | options
    config = base_of(architecture).model.config
    operator = RepairOperator.create(family, config, layers, runs=runs, **options)
    operator.set_joint(joint_of(architecture, layers))
    return operator
