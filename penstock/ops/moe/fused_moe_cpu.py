"""The CPU path of fused_moe: torch's products for the tokens of each expert that any token chose."""

import torch
import torch.nn.functional as F
from torch import Tensor


def compute(
    out: Tensor,
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    shared_output: Tensor | None,
    expert_offset: int,
) -> None:
    """Writes the weighted sums; slots are sorted by expert, so that each expert's rows are one run."""
    T, k = topk_ids.shape
    E = w_gate_up.shape[0]
    local, order = (topk_ids.reshape(-1) - expert_offset).sort(stable=True)
    outputs = x.new_zeros(T * k, x.shape[1])
    experts, counts = local.unique_consecutive(return_counts=True)
    start = 0
    for expert, rows in zip(experts.tolist(), counts.tolist(), strict=True):
        slots = order[start : start + rows]
        start += rows
        if 0 <= expert < E:
            gate, up = F.linear(x[slots // k], w_gate_up[expert]).chunk(2, -1)
            product = F.silu(gate.float()).mul_(up).to(x.dtype)
            outputs[slots] = F.linear(product, w_down[expert])
    inside = (topk_ids >= expert_offset) & (topk_ids < expert_offset + E)
    weights = torch.where(inside, topk_weights, 0)
    by_token = outputs.view(T, k, x.shape[1])
    total = torch.zeros(x.shape, dtype=torch.float32)
    for slot in range(k):
        total.addcmul_(by_token[:, slot].float(), weights[:, slot, None])
    out.copy_(total if shared_output is None else total.add_(shared_output))
