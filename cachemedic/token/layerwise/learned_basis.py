"""Axes of the innovation that are learned: by what decoding from the code alone does to the model's output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from cachemedic.core.divergence import kd_loss
from cachemedic.data.text_source import EMBEDDED_TEXT, TextSource
from cachemedic.data.windows import sample_windows
from cachemedic.models.cache import stack_cache, unstack_cache
from cachemedic.models.load import Base
from cachemedic.token.layerwise.sketch_code import SketchCode
from cachemedic.token.layerwise.token_vectors import KeyRotation, join, split
from cachemedic.token.layerwise.transform import Transform
from cachemedic.token.scalar_codes import decode, encode

STEPS, BATCH, PREFIX, DECODED, LEARNING_RATE = 60, 4, 96, 16, 1e-3


def learn_basis(
    base: Base, code: SketchCode, layers: Sequence[int], known: int, source: TextSource = EMBEDDED_TEXT, seed: int = 3
) -> Transform:
    """The transform of `code` with other axes: of least KL to the clean model where `layers` are read from codes.

    `known` is how many of the layers the token ids tell.
    Gradients pass the quantiser as if it were not there (Bengio et al. 2013); after every update the axes are made
    orthonormal again (a QR retraction).
    """
    transform, rotation = code.transform, KeyRotation(base.model)
    text = source.documents_of("operator_train")
    rows = sample_windows(base, text, STEPS * BATCH, PREFIX + DECODED, seed).to(base.model.device)
    axes = transform.basis.clone().requires_grad_()
    optimizer = torch.optim.Adam([axes], lr=LEARNING_RATE)
    for ids in tqdm(rows.split(BATCH), desc=f"axes of the sketch on {base.name}"):
        positions = torch.arange(PREFIX, device=ids.device).expand(len(ids), -1)
        turn = rotation.at(positions)
        with torch.no_grad():
            teacher = base.model(ids, use_cache=True)
            teacher.past_key_values.crop(-DECODED)
            key, value = stack_cache(teacher.past_key_values)
            x = turn.undo(join(key, value).float())
            z = transform.standardise(x[:, list(layers)])
        decoded = transform.restore(_through(code, axes, z, positions == 0, known))
        whole = x.index_copy(1, torch.tensor(layers, device=x.device), decoded)
        stored = unstack_cache(*split(turn.redo(whole).to(key.dtype), key.shape[2]))
        student = base.model(ids[:, PREFIX:], past_key_values=stored).logits
        optimizer.zero_grad()
        kd_loss(teacher.logits[:, PREFIX:], student).backward()
        optimizer.step()
        with torch.no_grad():
            q, r = torch.linalg.qr(axes)
            axes.copy_(q * r.diagonal(dim1=1, dim2=2).sign()[:, None])
    return replace(transform, basis=axes.detach())


def _through(code: SketchCode, axes: Tensor, z: Tensor, is_first: Tensor, known: int) -> Tensor:
    """What the codes of z [B, P, T, D] along `axes` say, with a straight-through gradient."""
    out: list[Tensor] = []
    m = code.bits.shape[1]
    for layer in range(code.transform.num_layers):
        if layer < known:
            out.append(z[:, layer])
            continue
        predicted = code.transform.predict(layer, out[-1] if out else None, is_first)
        y = (z[:, layer] - predicted) @ axes[layer, :, :m] / code.spread[layer]
        said = decode(encode(y.detach(), code.bits[layer]), code.bits[layer])
        coded = (code.bits[layer] > 0).to(y)
        y = (y + (said - y).detach()) * coded
        out.append(predicted + (y * code.spread[layer]) @ axes[layer, :, :m].mT)
    return torch.stack(out, 1)
