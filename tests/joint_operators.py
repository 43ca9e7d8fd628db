"""Operators with a joint model of a small model's tokens, measured on random ids."""

from dataclasses import replace
from functools import cache

import torch
from small_models import VOCABULARY, model_of
from transformers import DynamicCache

from cachemedic.models.shape import ModelShape
from cachemedic.repair.operator import RepairOperator
from cachemedic.token.joint import SINKS, JointModel, recent
from cachemedic.token.joint_operator import JointOperator, SketchAssisted, TokenAware
from cachemedic.token.lowest_layer import lowest_layer
from cachemedic.token.vectors import TokenVectors


@cache
def joint_of(name: str, layers: tuple[int, ...] | None = None) -> JointModel:
    """Principal axes of all tokens but the first ones, and a prior by ridge regression."""
    model = model_of(name)
    ids = torch.randint(1, VOCABULARY, (40, 60), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(60).expand(40, -1)
    clean = DynamicCache()
    model(ids, past_key_values=clean)
    vectors = TokenVectors(model, layers)
    keys, values = ([getattr(clean.layers[n], side) for n in vectors.layers] for side in ("keys", "values"))
    x = vectors.of(keys, values, positions)[:, SINKS:].flatten(0, 1)
    mean, scale = x.mean(0), 1 / x.std(0).clamp_min(1e-3)
    z = (x - mean) * scale
    lowest = lowest_layer(model, ids, positions)
    lowest_mean, lowest_scale = lowest.mean((0, 1)), 1 / lowest.std((0, 1)).clamp_min(1e-3)
    regressors = recent((lowest - lowest_mean) * lowest_scale)[:, SINKS:].flatten(0, 1)
    gram = regressors.double().T @ regressors.double()
    full = torch.linalg.solve(
        gram + 0.01 * len(regressors) * torch.eye(len(gram)).double(), regressors.double().T @ z.double()
    )
    prior_out = torch.linalg.svd(full, full_matrices=False).Vh.float()
    features = regressors @ full.float() @ prior_out.T
    innovation = z - features @ prior_out
    axes = torch.linalg.svd(innovation.double(), full_matrices=False).Vh.bfloat16()
    c = innovation @ axes.float().T
    return JointModel(
        of=ModelShape.of(model.config),
        layers=vectors.layers,
        mean=mean,
        scale=scale,
        axes=axes,
        variance=c.var(0),
        rest=(innovation - c @ axes.float()).square().mean(0) + 1e-6,
        lowest_mean=lowest_mean,
        lowest_scale=lowest_scale,
        prior_in=full.float() @ prior_out.T,
        prior_out=prior_out,
        prior_variance=features.var(0),
    )


def operator_of(name: str, share: float | None = 0.4, with_ids: bool = True, **expected_kl: float) -> JointOperator:
    """An untrained operator of family E, or of D without a share, that knows the tokens of a small model."""
    cls = TokenAware if share is None else SketchAssisted
    definition = RepairOperator.create("A", model_of(name).config).config
    options = cls.default_options | {"with_ids": with_ids} | ({} if share is None else {"share": share})
    definition = replace(definition, family="D" if share is None else "E", options=options)
    parameters = cls.initial_parameters(definition, torch.Generator().manual_seed(0))
    operator = cls(definition, {key: p[None] for key, p in parameters.items()})
    operator.set_joint(joint_of(name), expected_kl)
    return operator
