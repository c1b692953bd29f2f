"""y = (x · wᵀ) · scales + bias with FP8 operands."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost, nbytes
from penstock.core.check import DENSE, anything, boolean
from penstock.core.formats import BLOCK, FORMATS, Format, name_of
from penstock.core.op import op
from penstock.ops.matmul import _cases
from penstock.ops.matmul.counters import counters_fault
from penstock.ops.matmul.scales import FP8_FORMATS, dequantised, is_fp8_format, kinds, scale_fault, unfit, weight_shapes
from penstock.ops.matmul.tensor_core import accumulated

CODES = (torch.float8_e4m3fn, torch.float64)
RESULTS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _named(value: object) -> str | None:
    return f"one of {', '.join(FP8_FORMATS)} (penstock.core.formats)" if value is None else is_fp8_format(value)


SPEC = {
    "x": ("M K", CODES),
    "w": ("N K", "x"),
    "x_scale": anything,
    "w_scale": anything,
    "bias?": ("N", RESULTS, DENSE),
    "counters?": ("C", torch.int32),
    "format": _named,
    "exact_accumulation": boolean,
    "out?": ("M N", RESULTS, DENSE),
}


@op(
    "(Tensor(a!) out, Tensor x, Tensor w, Tensor x_scale, Tensor w_scale, Tensor? bias, Tensor(b!)? counters, str format,"
    " bool exact_accumulation) -> ()",
    SPEC,
    tile=128,
)
def gemm_fp8(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    *,
    format: Format,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    exact_accumulation: bool = False,
    counters: Tensor | None = None,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """The product of quantised activations and weights, at the rate of FP8 tensor cores.

    Args:
        x: [M, K] float8_e4m3fn, stride 1 along K.
        w: [N, K] float8_e4m3fn, stride 1 along K.
        x_scale: float32: FP8_TENSOR [1], FP8_TOKEN [M], FP8_BLOCK [M, ⌈K/128⌉].
        w_scale: float32: FP8_TENSOR [1], FP8_TOKEN [N] (a scale an output channel), FP8_BLOCK [⌈N/128⌉, ⌈K/128⌉].
        format: FP8_TENSOR, FP8_TOKEN or FP8_BLOCK.
        bias: [N], added in float32.
        out_dtype: bfloat16, float16 or float32.
        exact_accumulation: values are multiplied as float16, whose products add up in float32, at half the rate. Hopper's FP8
            accumulator keeps some 14 bits; FP8_BLOCK moves it to float32 every 128 of K in any case.
        counters: what gemm_counters returned, to save a fill for small M; made on the spot by default.
        out: [M, N].
        impl: "auto", "triton", "cpu" or "reference".
    Returns: [M, N] in out_dtype.
    Raises: ContractError when shapes, dtypes or scales disagree; NotSupported when no implementation takes the call.
    Source: Micikevicius et al., arXiv:2209.05433; DeepSeek-AI, arXiv:2412.19437 (block scales, promotion).
    """
    name = name_of(format)
    launch = gemm_fp8.pick(impl, x, w, x_scale, w_scale, bias, counters, name, exact_accumulation, out)
    if out is None:
        out = x.new_empty(x.shape[0], w.shape[0], dtype=torch.float64 if x.dtype is torch.float64 else out_dtype)
    launch(out, x, w, x_scale, w_scale, bias, counters, name, exact_accumulation)
    return out


@gemm_fp8.relation
def _relation(
    x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, counters: Tensor | None, format: str, **others: object
) -> tuple[str, str] | None:
    return (
        scale_fault(format, "x_scale", x_scale, [FORMATS[format].scale_shape(x.shape)])
        or scale_fault(format, "w_scale", w_scale, weight_shapes(format, tuple(w.shape)))
        or counters_fault(counters)
    )


@gemm_fp8.reference
def _reference(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    counters: Tensor | None,
    format: str,
    exact_accumulation: bool,
) -> Tensor:
    y = dequantised(x, x_scale, format) @ dequantised(w, w_scale, format, weight=True).t()
    return y if bias is None else y + bias


@gemm_fp8.baseline
def _baseline(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    counters: Tensor | None,
    format: str,
    exact_accumulation: bool,
) -> Tensor:
    if exact_accumulation:
        return _reference(x, w, x_scale, w_scale, bias, counters, format, exact_accumulation)
    restart = BLOCK if format == "FP8_BLOCK" else None
    y = accumulated(dequantised(x, x_scale, format), dequantised(w, w_scale, format, weight=True), restart)
    return y if bias is None else y + bias


def _fits(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, **others: object) -> str | None:
    return unfit(x=x, w=w, x_scale=x_scale, w_scale=w_scale)


@gemm_fp8.impl("triton", needs=("triton",), supports=_fits, instructions=("QGMMA", "HGMMA"))
def _triton(
    out: Tensor,
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    counters: Tensor | None,
    format: str,
    exact_accumulation: bool,
) -> None:
    from penstock.ops.matmul.gemm_triton import launch

    kind = "fp8_block" if format == "FP8_BLOCK" else "fp8"
    scales = kinds(format)
    launch(out, x, w, x_scale, w_scale, *scales, kind=kind, bias=bias, counters=counters, exact=exact_accumulation)


@gemm_fp8.impl("cpu", needs=("cpu",))
def _cpu(
    out: Tensor,
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    counters: Tensor | None,
    format: str,
    exact_accumulation: bool,
) -> None:
    if x.dtype is torch.float64:
        out.copy_(_reference(x, w, x_scale, w_scale, bias, counters, format, exact_accumulation))
        return
    from penstock.ops.matmul.fp8_cpu import gemm

    y = gemm(x, w, x_scale, w_scale, format, rough=out.dtype is torch.bfloat16 and not exact_accumulation)
    out.copy_(y if bias is None else y.add_(bias))


@gemm_fp8.cost
def _cost(x: Tensor, w: Tensor, out_dtype: torch.dtype = torch.bfloat16, **options: Any) -> Cost:
    (M, K), N = x.shape, w.shape[0]
    return Cost(bytes=nbytes(x, w) + M * N * out_dtype.itemsize, flops=2 * M * N * K, rate="fp8")


@gemm_fp8.cases
def cases() -> Iterable[Case]:
    """Every format with few and many rows, then the shapes of a server."""
    return _cases.fp8()
