"""What follows attention in a layer: a gated MLP, or a mixture of experts in its place."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from penstock.ops import fused_moe, gelu_and_mul, moe_route, silu_and_mul, silu_and_mul_quant
from penstock.serve.models.linear import QuantizedLinear, linear
from penstock.serve.models.parameters import ExpertWeights, LayerWeights, Matrix
from penstock.serve.models.quantized_experts import QuantizedExperts
from penstock.serve.models.spec import ExpertsSpec

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu_and_mul,
    "gelu_tanh": gelu_and_mul,
    "gelu": partial(gelu_and_mul, approximate="none"),
}


def gated_down(activation: Callable[[Tensor], Tensor], gate_up: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
    """down(activation(gate) · up) [T, H] of [gate | up] [T, 2I]; silu's product is quantised in one pass where down is."""
    if activation is not silu_and_mul or not isinstance(weight, QuantizedLinear):
        return linear(activation(gate_up), weight, bias)
    [product] = weight.products
    operand = silu_and_mul_quant(gate_up, format=product.format, scale=product.static_scale(len(gate_up)))
    return product.multiply(operand, gate_up.dtype, bias)


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
        return gated_down(self.activation, linear(hidden, self.gate_up, self.gate_up_bias), self.down, self.down_bias)


class Experts:
    """Each token's best experts, weighted, and the shared MLP of all tokens, bound to their parameters."""

    __slots__ = ("matrices", "options", "route", "weights", "wide")

    def __init__(self, spec: ExpertsSpec, weights: ExpertWeights):
        self.weights = weights
        gate_up, down = weights.gate_up, weights.down
        self.options: dict[str, Any] = {}
        if isinstance(gate_up, QuantizedExperts) and isinstance(down, QuantizedExperts):
            self.options = {"w_gate_up_scale": gate_up.scale, "w_down_scale": down.scale, "format": gate_up.format}
            gate_up, down = gate_up.codes, down.codes
        assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
        self.matrices = gate_up, down
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
            shared = gated_down(silu_and_mul, linear(hidden, own.shared_gate_up), own.shared_down)
            if own.shared_gate is not None:
                shared *= torch.sigmoid(linear(hidden, own.shared_gate))
        return fused_moe(hidden, *self.matrices, ids, weights, shared_output=shared, **self.options)
