"""What follows attention in a layer: a gated MLP, or a mixture of experts in its place."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from penstock.ops import fused_moe, gelu_and_mul, moe_route, silu_and_mul
from penstock.serve.models.parameters import ExpertWeights, LayerWeights
from penstock.serve.models.spec import ExpertsSpec

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu_and_mul,
    "gelu_tanh": gelu_and_mul,
    "gelu": partial(gelu_and_mul, approximate="none"),
}


class Mlp:
    """down(activation(gate(x)) · up(x)), bound to its parameters."""

    __slots__ = ("activation", "down", "down_bias", "gate_up", "gate_up_bias")

    def __init__(self, activation: str, weights: LayerWeights):
        assert weights.gate_up is not None and weights.down is not None
        self.activation = _ACTIVATIONS[activation]
        self.gate_up, self.gate_up_bias = weights.gate_up, weights.gate_up_bias
        self.down, self.down_bias = weights.down, weights.down_bias

    def __call__(self, hidden: Tensor) -> Tensor:
        """[T, H] → [T, H]."""
        return linear(self.activation(linear(hidden, self.gate_up, self.gate_up_bias)), self.down, self.down_bias)


class Experts:
    """Each token's best experts, weighted, and the shared MLP of all tokens, bound to their parameters."""

    __slots__ = ("route", "weights", "wide")

    def __init__(self, spec: ExpertsSpec, weights: ExpertWeights):
        self.weights = weights
        self.wide = spec.float32_router
        self.route = {
            "top_k": spec.top_k,
            "scoring": spec.scoring,
            "renormalize": spec.renormalize,
            "num_groups": spec.num_groups,
            "top_groups": spec.top_groups,
            "scale": spec.scale,
            "bias": weights.router_bias,
        }

    def __call__(self, hidden: Tensor) -> Tensor:
        """[T, H] → [T, H]."""
        own = self.weights
        logits = linear(hidden.float() if self.wide else hidden, own.router).float()
        ids, weights = moe_route(logits, **self.route)
        shared = None
        if own.shared_gate_up is not None and own.shared_down is not None:
            shared = linear(silu_and_mul(linear(hidden, own.shared_gate_up)), own.shared_down)
            if own.shared_gate is not None:
                shared *= torch.sigmoid(linear(hidden, own.shared_gate))
        return fused_moe(hidden, own.gate_up, own.down, ids, weights, shared_output=shared)
