"""The CPU path of fused_moe: torch's products for the tokens of each expert that any token chose."""

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.core.formats import FORMATS, FP8_BLOCK
from penstock.ops.matmul.fp8_cpu import decoded, multiply
from penstock.ops.matmul.scales import expert_scale, input_format, kinds


def compute(
    out: Tensor,
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w_gate_up_scale: Tensor | None,
    w_down_scale: Tensor | None,
    x_scale: Tensor | None,
    shared_output: Tensor | None,
    format: str | None,
    activation: str,
    expert_offset: int,
) -> None:
    """Writes the weighted sums; slots are sorted by expert, so that each expert's rows are one run."""
    T, k = topk_ids.shape
    E = w_gate_up.shape[0]
    if format is not None:
        x = _quantised(x, x_scale, format)
    local, order = (topk_ids.reshape(-1) - expert_offset).sort(stable=True)
    outputs = out.new_zeros(T * k, x.shape[1])
    experts, counts = local.unique_consecutive(return_counts=True)
    start = 0
    for expert, rows in zip(experts.tolist(), counts.tolist(), strict=True):
        slots = order[start : start + rows]
        start += rows
        if 0 <= expert < E:
            gate, up = _product(x[slots // k], w_gate_up, w_gate_up_scale, expert, format).chunk(2, -1)
            product = F.silu(gate.float()).mul_(up)
            product = product.to(x.dtype) if format is None else _quantised(product, None, FP8_BLOCK.name)
            outputs[slots] = _product(product, w_down, w_down_scale, expert, format).to(out.dtype)
    inside = (topk_ids >= expert_offset) & (topk_ids < expert_offset + E)
    weights = torch.where(inside, topk_weights, 0)
    by_token = outputs.view(T, k, x.shape[1])
    total = torch.zeros(x.shape, dtype=torch.float32)
    for slot in range(k):
        total.addcmul_(by_token[:, slot].float(), weights[:, slot, None])
    out.copy_(total if shared_output is None else total.add_(shared_output))


def _quantised(x: Tensor, x_scale: Tensor | None, format: str) -> Tensor:
    """What x is after quantisation, in float32; without a scale it is quantised here."""
    if x_scale is not None:
        return decoded(x, torch.float32).mul_(FORMATS[format].spread(x_scale, x.shape))
    kind = input_format(format)
    wide = x.float()
    scale = kind.spread(kind.dynamic_scale(wide), x.shape)
    return decoded(kind.encode(wide / scale), torch.float32).mul_(scale)


def _product(x: Tensor, w: Tensor, w_scale: Tensor | None, expert: int, format: str | None) -> Tensor:
    if format is None or w_scale is None:
        return F.linear(x, w[expert])
    return multiply(x, w[expert], expert_scale(w_scale, expert, len(w), format), kinds(format)[1])
