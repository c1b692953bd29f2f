"""Peers of the matrix products: torch's own, with their layouts and scales prepared outside the timing."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.bench.inputs import Arguments
from penstock.bench.timing import Call


def _groups(arguments: Arguments) -> str:
    """Why torch's grouped products do not take the call, or ""."""
    x, offsets = arguments["x"], arguments["group_offsets"]
    if arguments.get("gather") is not None:
        return "has no gather; copying the rows first would be a straw man"
    if int(offsets[-1]) != x.shape[0]:
        return "has no rows after the last group"
    return ""


def _grouped_mm(arguments: Arguments) -> Call | str:
    x, w = arguments["x"], arguments["w"]
    if x.dtype is not torch.bfloat16:
        return "is for bfloat16"
    if reason := _groups(arguments):
        return reason
    ends = arguments["group_offsets"][1:].contiguous()
    return lambda: torch._grouped_mm(x, w.transpose(-2, -1), offs=ends)


def _scaled_grouped_mm(arguments: Arguments) -> Call | str:
    x, w, format = arguments["x"], arguments["w"], arguments.get("format")
    if format is None or format.granularity == "block":
        return "has a scale for each row of both operands, in FP8"
    if reason := _groups(arguments):
        return reason
    ends = arguments["group_offsets"][1:].contiguous()
    # One scale for all is the same scale for each row.
    scale = arguments["x_scale"].expand(x.shape[0]).contiguous()
    w_scale = arguments["w_scale"]
    w_scale = (w_scale.reshape(-1, 1) if w_scale.dim() == 1 else w_scale).expand(w.shape[:2]).contiguous()
    transposed = w.transpose(-2, -1)
    return lambda: torch._scaled_grouped_mm(
        x, transposed, scale, w_scale, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _scaled_mm(arguments: Arguments) -> Call | str:
    x, w, format = arguments["x"], arguments["w"], arguments["format"]
    out_dtype = arguments.get("out_dtype") or torch.bfloat16
    x_scale, w_scale = arguments["x_scale"], arguments["w_scale"]
    if format.granularity == "block":
        # cuBLAS wants the activations' scales with tokens contiguous, and takes 128×128 squares of the weights.
        x_scale = x_scale.t().contiguous().t()
        w_scale = w_scale.t()
    elif format.granularity == "token":
        x_scale, w_scale = x_scale[:, None], w_scale[None, :]
    exact = arguments.get("exact_accumulation", False) or format.granularity == "block"
    return lambda: torch._scaled_mm(
        x, w.t(), x_scale, w_scale, bias=arguments.get("bias"), out_dtype=out_dtype, use_fast_accum=not exact
    )


def _int_mm(arguments: Arguments) -> Call | str:
    x, w = arguments["x"], arguments["w"]
    if x.shape[0] <= 16:
        return "takes more than 16 rows"
    x_scale, w_scale, bias = arguments["x_scale"], arguments["w_scale"], arguments.get("bias")
    out_dtype = arguments.get("out_dtype") or torch.bfloat16

    def call() -> Tensor:
        out = torch._int_mm(x, w.t()).float() * x_scale[:, None] * w_scale
        return (out if bias is None else out + bias).to(out_dtype)

    return call


def _router(arguments: Arguments) -> Call | str:
    if not arguments["x"].is_cuda:
        return "is for a GPU"
    wide = arguments["x"].float()
    weight = arguments["w_hi"].float() + arguments["w_lo"].float() / 256
    return lambda: F.linear(wide, weight)


def _grouped_layer(arguments: Arguments) -> Call | str:
    """Sorting, gathering, torch's grouped products and the sum, each a call."""
    x, w_gate_up, w_down = arguments["x"], arguments["w_gate_up"], arguments["w_down"]
    if x.dtype is not torch.bfloat16 or arguments.get("format") is not None:
        return "is composed of torch's bfloat16 grouped products"
    ids, weights = arguments["topk_ids"], arguments["topk_weights"]
    E, k = w_gate_up.shape[0], ids.shape[1]
    if arguments.get("expert_offset", 0) or arguments.get("shared_output") is not None:
        return "computes every expert, and no shared output"
    experts = torch.arange(E, device=x.device, dtype=torch.int32)

    def call() -> Tensor:
        flat = ids.reshape(-1)
        ordered, order = flat.sort(stable=True)
        ends = torch.searchsorted(ordered, experts, right=True).to(torch.int32)
        hidden = torch._grouped_mm(x[order // k], w_gate_up.transpose(-2, -1), offs=ends)
        gate, up = hidden.chunk(2, -1)
        y = torch._grouped_mm(F.silu(gate) * up, w_down.transpose(-2, -1), offs=ends)
        spread = torch.empty_like(y)
        spread[order] = y
        return (spread.view(-1, k, x.shape[1]) * weights[..., None]).sum(1).to(x.dtype)

    return call


def _float32(arguments: Arguments) -> Arguments | str:
    """The arguments as float32 operands without scales, made once: what a CPU would compute without narrow formats."""
    if arguments["x"].is_cuda:
        return "is for a CPU"
    format, wide = arguments.get("format"), dict(arguments)
    for name in ("x", "w", "w_gate_up", "w_down"):
        if name not in arguments:
            continue
        wide[name] = arguments[name].float()
        scale = wide.pop(f"{name}_scale", None)
        if scale is None or format is None:
            continue
        squares = format.granularity == "block" and name != "x"
        spread = format.spread(scale, wide[name].shape, weight=squares)
        wide[name].mul_(spread[:, None, None] if wide[name].dim() == 3 and spread.dim() == 1 else spread)
    wide.pop("format", None)
    return wide


def _linear_float32(arguments: Arguments) -> Call | str:
    wide = _float32(arguments)
    if isinstance(wide, str):
        return wide
    x, bias = wide["x"], arguments.get("bias")
    w = wide["w"] if "w" in wide else wide["w_hi"].float() + wide["w_lo"].float() / 256
    bias = None if bias is None else bias.float()
    return lambda: F.linear(x, w, bias)


def _reference_float32(operator: str) -> Callable[[Arguments], Call | str]:
    """The operator's reference on float32 operands."""

    def prepare(arguments: Arguments) -> Call | str:
        from penstock.bench.run import catalogue

        wide = _float32(arguments)
        return wide if isinstance(wide, str) else partial(catalogue()[operator], **wide, impl="reference")

    return prepare


MATMUL: dict[str, dict[str, Callable[[Arguments], Any]]] = {
    "grouped_gemm": {
        "torch _grouped_mm": _grouped_mm,
        "torch _scaled_grouped_mm": _scaled_grouped_mm,
        "float32 reference": _reference_float32("grouped_gemm"),
    },
    "gemm_fp8": {"torch _scaled_mm": _scaled_mm, "float32 F.linear": _linear_float32},
    "gemm_int8": {"torch _int_mm": _int_mm, "float32 F.linear": _linear_float32},
    "gemm_bf16_fp32": {"cuBLAS float32": _router, "float32 F.linear": _linear_float32},
    "fused_moe": {"torch _grouped_mm": _grouped_layer, "float32 reference": _reference_float32("fused_moe")},
}
