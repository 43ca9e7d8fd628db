"""The folded operator families A, B and C: query-gated low-rank maps of keys and values.

All three repair key k as k_hat = k + (k W * a(q)) U^T with a gate a(q) in [0, 1]^r, and values likewise. The gate
depends on the query only, so the repair moves out of attention (associativity of the products):

    q k_hat^T = q~ k^T        with q~ = q + (q U * a_k(q)) W^T
    A v_hat   = o + (o W * a_v(q)) U^T    with o = A v

It costs O(d r) a query and head and nothing that grows with the number of cached tokens, runs on any attention kernel,
and gives each query of a prefill its own gate without breaking causality.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cachemedic.core.integers import LONGEST, whole_number
from cachemedic.core.keys_values import KeysValues
from cachemedic.repair.attention import Attention, Gates
from cachemedic.repair.config import OperatorConfig
from cachemedic.repair.gram import Gram, layer_terms
from cachemedic.repair.inward_clamp import InwardClamp
from cachemedic.repair.operator import RepairOperator
from cachemedic.repair.registry import register_family


class FoldedOperator(RepairOperator):
    """What A, B and C share: gates from a small MLP of the query, factors W and U, and the fold.

    Options: `gate_hidden`, units of the gate's hidden layer (None: twice the rank); for A and B `share_heads`, one set
    of parameters for all heads of a layer (True) or one a query head; for C `head_embedding`.
    """

    gate_in: Tensor
    gate_out: Tensor
    gate_out_bias: Tensor

    def gates(self, layer: int, query: Tensor) -> Gates:
        """The gates (a_k, a_v) of `query` [R*B, H, M, d], [R*B, H, M, r] each; None where nothing is repaired."""
        x = self._group(query).to(self.gate_in.dtype)
        hidden = torch.baddbmm(self._of(layer, "gate_bias"), x, self._of(layer, "gate_in"))
        hidden = torch.tanh(self._condition_on_head(hidden, query.shape))
        gates = self._activate(torch.baddbmm(self._of(layer, "gate_out_bias"), hidden, self._of(layer, "gate_out")))
        by_side = dict(zip(self.config.sides, gates.split(self.rank, dim=-1), strict=True))
        a_k, a_v = (self._ungroup(by_side[side], query.shape) if side in by_side else None for side in "kv")
        return a_k, a_v

    @property
    def idle_because(self) -> str | None:
        return "it was never trained, and starts as the identity" if self._is_identity() else None

    def _is_identity(self) -> bool:
        return not any(getattr(self, f"u_{side}").any() for side in self.config.sides)

    def factors(self, layer: int) -> dict[str, tuple[Tensor, Tensor]]:
        """The factors (W, U) of each repaired tensor, "k" and "v": [R, d, r] each, [R, H, d, r] with a set a head."""
        shape = (self.runs, -1, self.head_dim, self.rank)
        pairs = {side: self._factors(layer, side) for side in self.config.sides}
        if self.config.options.get("share_heads", True):
            return pairs
        return {side: (w.reshape(shape), u.reshape(shape)) for side, (w, u) in pairs.items()}

    def fold_query(self, layer: int, query: Tensor, gates: Gates) -> Tensor:
        """The query [R*B, H, M, d] that sees the stored keys as `query` would see the repaired ones."""
        if gates[0] is None:
            return query
        w, u = self._factors(layer, "k")
        return self._low_rank_update(query, u, gates[0], w)

    def fold_output(self, layer: int, output: Tensor, gates: Gates) -> Tensor:
        """The attention output [R*B, H, M, d] over repaired values, from that over the stored ones."""
        if gates[1] is None:
            return output
        w, u = self._factors(layer, "v")
        return self._low_rank_update(output, w, gates[1], u)

    def attend(
        self, layer: int, attention: Attention, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor | None, Gates]:
        """See `RepairOperator.attend`; keys and values pass through untouched."""
        gates = self.gates(layer, query)
        output, weights = attention(self.fold_query(layer, query, gates), key, value)
        return self.fold_output(layer, output.transpose(1, 2), gates).transpose(1, 2), weights, gates

    def repair_terms(self, layer: int, clean: KeysValues, found: KeysValues, gates: Gates) -> dict[str, Tensor]:
        """See `Trainable.repair_terms`; in Gram space, where no repaired cache is formed."""
        keys, values = (Gram.of(sound, hit) for sound, hit in zip(clean, found, strict=True))
        damage = (keys.found + values.found).repeat_interleave(self.runs // len(found[0]), 0)
        return {**layer_terms(keys, values, self.factors(layer), gates), "found": damage}

    def materialise(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The repaired keys and values themselves, for each query its own: the slow reference of the fold.

        query [R*B, H, M, d], key and value [R*B, G, T, d] -> two tensors [R*B, H, M, T, d].
        """
        repeats = query.shape[1] // key.shape[1]
        factors, gates = self.factors(layer), dict(zip("kv", self.gates(layer, query), strict=True))
        repaired = []
        for side, stored in (("k", key), ("v", value)):
            x = stored.repeat_interleave(repeats, dim=1)[:, :, None]  # [R*B, H, 1, T, d]
            gate = gates[side]
            if gate is None:
                repaired.append(x.expand(-1, -1, query.shape[2], -1, -1))
                continue
            w, u = (f if f.dim() == 4 else f[:, None] for f in factors[side])  # [R, H or 1, d, r]
            w, u = (f.repeat_interleave(len(query) // self.runs, dim=0)[:, :, None] for f in (w, u))
            repaired.append(x + (x @ w * gate[..., None, :]) @ u.mT)
        return repaired[0], repaired[1]

    def _factors(self, layer: int, side: str) -> tuple[Tensor, Tensor]:
        """W and U of one side in grouped form, [N, d, r] each."""
        return self._of(layer, f"w_{side}"), self._of(layer, f"u_{side}")

    def _activate(self, x: Tensor) -> Tensor:
        """From the MLP's output to gates in [0, 1]."""
        return torch.sigmoid(x)

    def _condition_on_head(self, hidden: Tensor, shape: torch.Size) -> Tensor:
        """Hook for families whose gate knows the head; `hidden` is grouped, `shape` that of the query."""
        return hidden

    def _of(self, layer: int, name: str) -> Tensor:
        """A parameter [R, P or 1, ...] at one layer, in grouped form [N, ., .]; with 1 for P all layers share it."""
        parameter = getattr(self, name)
        return parameter[:, self.layers.index(layer) % parameter.shape[1]].flatten(0, -3)

    def _low_rank_update(self, x: Tensor, into: Tensor, gate: Tensor, out_of: Tensor) -> Tensor:
        """x + (x into * gate) out_of^T for x [R*B, H, M, d], in the precision of the parameters."""
        grouped = self._group(x).to(into.dtype)
        codes = torch.bmm(grouped, into) * self._group(gate)
        return self._ungroup(torch.baddbmm(grouped, codes, out_of.mT), x.shape).to(x.dtype)

    # Grouped form [N, rows, n]: all rows that meet one matrix. N = R, or R * H when each head has its own parameters.

    def _group(self, x: Tensor) -> Tensor:
        rows, heads, queries, width = x.shape
        if rows % self.runs:
            raise ValueError(f"{rows} batch rows do not divide among the {self.runs} runs of this operator")
        if self.config.options.get("share_heads", True):
            return x.reshape(self.runs, -1, width)
        x = x.reshape(self.runs, -1, heads, queries, width).transpose(1, 2)
        return x.reshape(self.runs * heads, -1, width)

    def _ungroup(self, x: Tensor, shape: torch.Size) -> Tensor:
        rows, heads, queries, _ = shape
        if self.config.options.get("share_heads", True):
            return x.reshape(rows, heads, queries, -1)
        x = x.reshape(self.runs, heads, rows // self.runs, queries, -1).transpose(1, 2)
        return x.reshape(rows, heads, queries, -1)


def _places(config: OperatorConfig) -> tuple[int, ...]:
    """The leading axes of parameters that each layer, and with `share_heads=False` each query head, has of its own."""
    return (len(config.layers), *(() if config.options["share_heads"] else (config.model.num_heads,)))


def _gate_parameters(config: OperatorConfig, places: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
    """A random gate MLP for each of `places`; a zero output is a gate of one half."""
    d, hidden = config.model.head_dim, config.options["gate_hidden"]
    hidden = 2 * config.rank if hidden is None else whole_number("gate_hidden", hidden, 1, LONGEST)
    outputs = config.rank * len(config.sides)
    return {
        "gate_in": torch.randn(*places, d, hidden, generator=generator) / d**0.5,
        "gate_bias": torch.zeros(*places, 1, hidden),
        "gate_out": torch.randn(*places, hidden, outputs, generator=generator) / hidden**0.5,
        "gate_out_bias": torch.zeros(*places, 1, outputs),
    }


def _identity_factors(config: OperatorConfig, places: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
    """W with random orthonormal columns and U = 0 for each side and each of `places`."""
    shape = (*places, config.model.head_dim, config.rank)
    parameters = {}
    for side in config.sides:
        parameters[f"w_{side}"] = torch.linalg.qr(torch.randn(shape, generator=generator)).Q
        parameters[f"u_{side}"] = torch.zeros(shape)
    return parameters


@register_family("A")
class QueryGatedAdditive(FoldedOperator):
    """Family A: K_hat = K + (K W_k * a_k(q)) U_k^T with a = sigmoid(MLP(q)); the identity by U = 0."""

    default_options = {"gate_hidden": None, "share_heads": True}

    @classmethod
    def initial_parameters(cls, config: OperatorConfig, generator: torch.Generator) -> dict[str, Tensor]:
        places = _places(config)
        return _gate_parameters(config, places, generator) | _identity_factors(config, places, generator)


@register_family("B")
class LearnedBasisShrinkage(FoldedOperator):
    """Family B: K_hat = K - (K B * (1 - s(q))) B^T with B orthonormal and s in [0, 1], so that it never expands.

    B is the orthogonal factor of a free matrix (QR). s = clamp(MLP(q), 0, 1) starts at exactly 1, the identity, where a
    gradient that asks for shrinkage passes. In terms of the fold, W = B, U = -B and the gate is 1 - s.
    """

    default_options = {"gate_hidden": None, "share_heads": True}

    @classmethod
    def initial_parameters(cls, config: OperatorConfig, generator: torch.Generator) -> dict[str, Tensor]:
        places = _places(config)
        parameters = _gate_parameters(config, places, generator)
        parameters["gate_out"].zero_()
        parameters["gate_out_bias"].fill_(1)
        for side in config.sides:
            parameters[f"basis_{side}"] = torch.randn(*places, config.model.head_dim, config.rank, generator=generator)
        return parameters

    def _is_identity(self) -> bool:
        return not self.gate_out.any() and bool((self.gate_out_bias == 1).all())

    def _factors(self, layer: int, side: str) -> tuple[Tensor, Tensor]:
        free = self._of(layer, f"basis_{side}")
        full = torch.promote_types(free.dtype, torch.float32)  # there is no QR in half precision
        basis = torch.linalg.qr(free.to(full)).Q.to(free.dtype)
        return basis, -basis

    def _activate(self, x: Tensor) -> Tensor:
        return 1 - InwardClamp.apply(x)


@register_family("C")
class GlobalOperator(FoldedOperator):
    """Family C: the map of A with one W, U and gate MLP for all protected layers.

    The gate's hidden layer is conditioned by a learned embedding of the layer and, with the option `head_embedding`, of
    the query head.
    """

    default_options = {"gate_hidden": None, "head_embedding": False}
    head_embedding: Tensor

    @classmethod
    def initial_parameters(cls, config: OperatorConfig, generator: torch.Generator) -> dict[str, Tensor]:
        parameters = _gate_parameters(config, (1,), generator) | _identity_factors(config, (1,), generator)
        hidden = parameters["gate_in"].shape[-1]
        parameters["gate_bias"] = 0.1 * torch.randn(len(config.layers), 1, hidden, generator=generator)
        if config.options["head_embedding"]:
            parameters["head_embedding"] = 0.1 * torch.randn(config.model.num_heads, 1, hidden, generator=generator)
        return parameters

    def _condition_on_head(self, hidden: Tensor, shape: torch.Size) -> Tensor:
        if not self.config.options["head_embedding"]:
            return hidden
        _, heads, queries, _ = shape
        by_head = hidden.view(self.runs, -1, heads, queries, hidden.shape[-1]) + self.head_embedding[:, None]
        return by_head.view_as(hidden)
