"""hpc.fuse_moe and hpc.group_gemm over our operators; hpc_ops.py exports what is public here."""

import torch
from torch import Tensor, nn

from penstock.core.formats import FP8_BLOCK, FP8_TENSOR
from penstock.integrations.hpc_ops_attention import owners
from penstock.ops.matmul.grouped_gemm import grouped_gemm as _grouped_gemm
from penstock.ops.moe.fused_moe import fused_moe as _fused_moe


def fuse_moe(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    gate_up_scale: Tensor,
    down_scale: Tensor,
    act_and_mul_scale: Tensor,
    topk_ids: Tensor,
    topk_scale: Tensor,
    rank_ep: int,
    num_expert_total: int,
    use_bf16_mul: bool = True,
    shared_output: Tensor | None = None,
    output: Tensor | None = None,
) -> Tensor:
    """A mixture of experts in FP8 with one scale for each tensor, by fused_moe.

    gate_up_scale and down_scale [experts] bring products back, act_and_mul_scale [1] multiplies the gated product before it is
    stored in FP8. Ours stores that product with a scale for each row and 128 columns instead, which is finer.
    """
    options = {
        "x_scale": torch.ones(1, device=x.device),
        "w_gate_up_scale": gate_up_scale.view(-1),
        "w_down_scale": (down_scale * act_and_mul_scale).view(-1),
        "format": FP8_TENSOR,
        "expert_offset": rank_ep * gate_up_weight.shape[0],
        "shared_output": shared_output,
    }
    return _fused_moe(x, gate_up_weight, down_weight, topk_ids, topk_scale, out=output, **options)


def fuse_moe_pertensor_fp8(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    gate_up_scale: Tensor,
    down_scale: Tensor,
    act_and_mul_scale: Tensor,
    topk_ids: Tensor,
    topk_scale: Tensor,
    rank_ep: int,
    num_expert_total: int,
    use_bf16_mul: bool = True,
    shared_output: Tensor | None = None,
) -> Tensor:
    """fuse_moe."""
    weights = (gate_up_weight, down_weight, gate_up_scale, down_scale, act_and_mul_scale)
    return fuse_moe(x, *weights, topk_ids, topk_scale, rank_ep, num_expert_total, use_bf16_mul, shared_output)


def fuse_moe_blockwise(
    x: Tensor,
    x_scale: Tensor,
    gate_up_weight: Tensor,
    gate_up_weight_scale: Tensor,
    down_weight: Tensor,
    down_weight_scale: Tensor,
    topk_ids: Tensor,
    topk_scale: Tensor,
    rank_ep: int,
    num_expert_total: int,
    shared_output: Tensor | None = None,
    output: Tensor | None = None,
) -> Tensor:
    """A mixture of experts in FP8 with a scale for each 128 columns of a token and 128 × 128 of a weight, by fused_moe.

    The last dimension of weight scales may be padded, as hpc-ops wants it to a multiple of 4.
    """
    options = {
        "x_scale": x_scale,
        "w_gate_up_scale": _without_padding(gate_up_weight_scale, gate_up_weight),
        "w_down_scale": _without_padding(down_weight_scale, down_weight),
        "format": FP8_BLOCK,
        "expert_offset": rank_ep * gate_up_weight.shape[0],
        "shared_output": shared_output,
    }
    return _fused_moe(x, gate_up_weight, down_weight, topk_ids, topk_scale, out=output, **options)


def fuse_moe_blockwise_fp8(
    x: Tensor,
    x_scale: Tensor,
    gate_up_weight: Tensor,
    gate_up_weight_scale: Tensor,
    down_weight: Tensor,
    down_weight_scale: Tensor,
    topk_ids: Tensor,
    topk_scale: Tensor,
    rank_ep: int,
    num_expert_total: int,
    shared_output: Tensor | None = None,
) -> Tensor:
    """fuse_moe_blockwise."""
    weights = (gate_up_weight, gate_up_weight_scale, down_weight, down_weight_scale)
    return fuse_moe_blockwise(x, x_scale, *weights, topk_ids, topk_scale, rank_ep, num_expert_total, shared_output)


def group_gemm_pertensor_fp8(
    x: Tensor,
    weight: Tensor,
    seqlens: Tensor,
    cu_seqlens: Tensor,
    y_scale: Tensor,
    num_seq_per_group_avg: int = 32,
    output: Tensor | None = None,
    tma_desc: Tensor | None = None,
    task_map_workspace: Tensor | None = None,
) -> Tensor:
    """(rows of group g · weight[g]ᵀ) · y_scale[g] in bfloat16, by grouped_gemm; rows between groups are computed too."""
    options = {"x_scale": torch.ones(1, device=x.device), "w_scale": y_scale, "format": FP8_TENSOR}
    return _grouped_gemm(x, weight, cu_seqlens, out=output, **options)


group_gemm_fp8 = group_gemm_pertensor_fp8


def group_gemm_blockwise_fp8(
    x: Tensor,
    weight: Tensor,
    seqlens: Tensor,
    cu_seqlens: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    num_seq_per_group_avg: int = 32,
    output: Tensor | None = None,
    tma_desc: Tensor | None = None,
    task_map_workspace: Tensor | None = None,
) -> Tensor:
    """Rows of group g times weight[g]ᵀ in bfloat16, by grouped_gemm; w_scale as in fuse_moe_blockwise.

    x_scale is [⌈K/128⌉, padded rows]: each group's scales begin at a multiple of 16, 32 or 64, by num_seq_per_group_avg.
    """
    group, offset = owners(x.shape[0], cu_seqlens)
    column = (_aligned_starts(seqlens, num_seq_per_group_avg)[group] + offset).clamp(max=x_scale.shape[1] - 1)
    options = {"x_scale": x_scale.t()[column], "w_scale": _without_padding(w_scale, weight), "format": FP8_BLOCK}
    return _grouped_gemm(x, weight, cu_seqlens, out=output, **options)


def reformat_x_scale(
    x_scale: Tensor, seqlens: Tensor, cu_seqlens: Tensor, num_seq_per_group_avg: int, output: Tensor | None = None
) -> Tensor:
    """[rows, ⌈K/128⌉] in groups that begin at cu_seqlens → the x_scale of group_gemm_blockwise_fp8."""
    rows, columns = x_scale.shape
    # One column more takes what lies between the groups.
    wide = x_scale.new_zeros(columns, rows + 1) if output is None else nn.functional.pad(output, (0, 1))
    group, offset = owners(rows, cu_seqlens)
    start = _aligned_starts(seqlens, num_seq_per_group_avg)[group]
    wide[:, torch.where(offset < seqlens[group], start + offset, wide.shape[1] - 1)] = x_scale.t()
    return wide[:, :-1].contiguous() if output is None else output.copy_(wide[:, :-1])


def _aligned_starts(seqlens: Tensor, average: int) -> Tensor:
    """Where each group begins when every one is padded to the tile that this average length chooses."""
    tile = 16 if average <= 16 else 32 if average <= 32 else 64
    padded = (seqlens + tile - 1) // tile * tile
    return padded.cumsum(0) - padded


def _without_padding(scale: Tensor, weight: Tensor) -> Tensor:
    return scale[..., : -(-weight.shape[-1] // 128)].contiguous()
