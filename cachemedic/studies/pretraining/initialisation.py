"""Initialises a small model with an induction circuit, so that retrieval does not have to emerge by chance.

Induction heads (Olsson et al. 2022) form late: at this size a random start had not begun to copy after 6 M tokens. Two
heads are therefore set by hand before training: one of layer 0 attends to the previous token and writes its embedding
into a slot of the residual stream; one of layer 2 matches the current token against that slot and copies the token it
finds. Everything else keeps its random start, and training is free to change all of it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

HEAD = 32  # head size; the residual stream of width 128 is divided at the start:
POSITION = slice(0, 32)  # absolute positions (GPT-2) or one constant (Llama)
PREVIOUS = slice(32, 64)  # the slot for the previous token
MATCHED = slice(64, 96)  # the part of a token's embedding that is matched
COPIED = slice(96, 128)  # the part that is copied
PREVIOUS_LAYER, INDUCTION_LAYER = 0, 2


@torch.no_grad()
def add_induction_circuit(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Set head 0 of layers 0 and 2 of an untrained model of width 128 (GPT-2 or Llama architecture) in place."""
    if isinstance(model, GPT2LMHeadModel):
        _gpt2(model, generator)
    elif isinstance(model, LlamaForCausalLM):
        _llama(model)
    else:
        raise TypeError(f"no induction circuit for {type(model).__name__}; allowed: GPT2LMHeadModel, LlamaForCausalLM")


def _gpt2(model: GPT2LMHeadModel, generator: torch.Generator) -> None:
    body, identity = model.transformer, torch.eye(HEAD)
    layers: Any = body.h
    embeddings, positions = body.wte.weight, body.wpe.weight
    embeddings[:, : PREVIOUS.stop] = 0
    embeddings *= 2  # keeps the token's norm with half of the coordinates
    frequencies = torch.rand(HEAD // 2, generator=generator) * math.pi  # incommensurate: no distance looks like another
    angles = torch.arange(len(positions))[:, None] * frequencies
    positions.zero_()
    positions[:, POSITION] = 0.04 * torch.cat([angles.cos(), angles.sin()], 1)
    cos, sin = frequencies.cos().diag(), frequencies.sin().diag()
    one_back = torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])  # position vector of m -> of m - 1

    def set_head(layer: int, query: torch.Tensor, key: torch.Tensor, reads: tuple[slice, slice, slice]) -> torch.Tensor:
        weight, width = layers[layer].attn.c_attn.weight, embeddings.shape[1]
        for part, (matrix, rows) in enumerate(zip((query, key, identity), reads, strict=True)):
            columns = weight[:, part * width : part * width + HEAD]
            columns.zero_()
            columns[rows] = matrix
        output = layers[layer].attn.c_proj.weight[:HEAD]
        output.zero_()
        return output

    set_head(PREVIOUS_LAYER, one_back, identity, (POSITION, POSITION, MATCHED))[:, PREVIOUS] = 0.04 * identity
    matching = 1.2 * identity
    set_head(INDUCTION_LAYER, matching, matching, (MATCHED, PREVIOUS, COPIED))[:, COPIED] = 0.08 * identity


def _llama(model: LlamaForCausalLM) -> None:
    body, identity = model.model, torch.eye(HEAD)
    rope: Any = model.config.rope_parameters
    embeddings = body.embed_tokens.weight
    embeddings[:, : PREVIOUS.stop] = 0
    embeddings *= 2
    embeddings[:, 0] = 0.1  # a constant, from which rotary attention makes a purely positional head
    theta = rope["rope_theta"] ** (-torch.arange(HEAD // 2) / (HEAD // 2))
    fast = (torch.arange(HEAD // 2) < 6).float()
    zero = torch.zeros(HEAD // 2)
    key = 1.5 * torch.cat([fast, zero])
    one_back = 1.5 * torch.cat([fast * theta.cos(), -fast * theta.sin()])  # scores peak one position back
    slow = (torch.arange(HEAD) % (HEAD // 2) >= 6).float().diag()  # matching must not depend on distance

    def set_head(layer: int) -> tuple[torch.Tensor, ...]:
        attention = body.layers[layer].self_attn
        parts = [attention.q_proj.weight[:HEAD], attention.k_proj.weight[:HEAD], attention.v_proj.weight[:HEAD]]
        parts.append(attention.o_proj.weight[:, :HEAD])
        for part in parts:
            part.zero_()
        return tuple(parts)

    q, k, v, o = set_head(PREVIOUS_LAYER)
    q[:, 0], k[:, 0], v[:, MATCHED], o[PREVIOUS] = one_back, key, identity, 0.04 * identity
    q, k, v, o = set_head(INDUCTION_LAYER)
    q[:, MATCHED], k[:, PREVIOUS], v[:, COPIED], o[COPIED] = 1.5 * slow, 1.5 * slow, identity, 0.08 * identity
