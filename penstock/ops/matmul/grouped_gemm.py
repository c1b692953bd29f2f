"""y[i] = x[i] · w[e]ᵀ for the rows i of each group e: one expert's tokens each, in one launch."""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost
from penstock.core.check import DENSE, INDICES, anything, boolean
from penstock.core.formats import BLOCK, FORMATS, Format, name_of
from penstock.core.op import op
from penstock.ops.matmul import _cases
from penstock.ops.matmul.scales import dequantised, expert_scale, is_fp8_format, scale_fault, weight_shapes
from penstock.ops.matmul.tensor_core import accumulated

OPERANDS = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn)
RESULTS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
MAX_EXPERTS = 512
Product = Callable[[Tensor, Tensor], Tensor]

SPEC = {
    "x": ("T K", OPERANDS),
    "w": ("E N K", "x"),
    "group_offsets": ("E+1", INDICES, DENSE),
    "x_scale": anything,
    "w_scale": anything,
    "gather?": ("R", INDICES, DENSE),
    "format": is_fp8_format,
    "exact_accumulation": boolean,
    "out?": ("* N", RESULTS, DENSE),
}


@op(
    "(Tensor(a!) out, Tensor x, Tensor w, Tensor group_offsets, Tensor? x_scale, Tensor? w_scale, Tensor? gather,"
    " str? format, bool exact_accumulation) -> ()",
    SPEC,
    tile=128,
)
def grouped_gemm(
    x: Tensor,
    w: Tensor,
    group_offsets: Tensor,
    *,
    x_scale: Tensor | None = None,
    w_scale: Tensor | None = None,
    format: Format | None = None,
    gather: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    exact_accumulation: bool = False,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """The product of each group of rows with the weights of its expert; which rows, only the device knows.

    Rows of group e are x[group_offsets[e] : group_offsets[e + 1]], or x[gather[…]] of the same range, read where they lie.
    Offsets begin with 0 and do not fall; groups may be empty. Rows past the last offset, and rows whose gather index lies
    outside x, come out as zeros.

    Args:
        x: [T, K] bfloat16, float16 or float8_e4m3fn; float32 and float64 on CPU; stride 1 along K.
        w: [E, N, K] in x.dtype, stride 1 along K; E up to 512.
        group_offsets: [E + 1] int32.
        x_scale: float32: FP8_TENSOR [1], FP8_TOKEN [T], FP8_BLOCK [T, ⌈K/128⌉].
        w_scale: float32: FP8_TENSOR [1] or [E], FP8_TOKEN [E, N], FP8_BLOCK [E, ⌈N/128⌉, ⌈K/128⌉].
        format: of the FP8 operands; None for none.
        gather: [R] int32, the row of x for each row of the result; x as it is by default.
        out_dtype: x.dtype by default, bfloat16 for FP8; float64 for float64 operands.
        exact_accumulation: FP8 values are multiplied as float16, whose products add up in float32. Hopper's FP8 accumulator
            keeps some 14 bits; FP8_BLOCK moves it to float32 every 128 of K in any case.
        out: [T or R, N].
        impl: "auto", "triton", "cpu" or "reference".
    Returns: [T, N], with gather [R, N], in out_dtype.
    Raises: ContractError when shapes, dtypes or scales disagree; NotSupported when no implementation takes the call.
    Source: Gale et al., arXiv:2211.15841 (MegaBlocks); DeepSeek-AI, arXiv:2412.19437 (block scales, promotion).
    """
    name = name_of(format)
    launch = grouped_gemm.pick(impl, x, w, group_offsets, x_scale, w_scale, gather, name, exact_accumulation, out)
    if out is None:
        rows = x if gather is None else gather
        out = x.new_empty(rows.shape[0], w.shape[1], dtype=result_dtype(x, out_dtype))
    launch(out, x, w, group_offsets, x_scale, w_scale, gather, name, exact_accumulation)
    return out


def result_dtype(x: Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    """What a product returns: float64 for the oracle, otherwise what is asked for, or by default a dtype that x could have."""
    if x.dtype is torch.float64:
        return torch.float64
    return out_dtype or (torch.bfloat16 if x.element_size() == 1 else x.dtype)


@grouped_gemm.relation
def _relation(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    gather: Tensor | None,
    format: str | None,
    out: Tensor | None,
    **others: object,
) -> tuple[str, str] | None:
    if w.shape[0] > MAX_EXPERTS or w.shape[0] == 0:
        return "w", f"must have 1 to {MAX_EXPERTS} experts, got {w.shape[0]}"
    if x.dtype is torch.float8_e4m3fn and format is None:
        return "format", "must be given for float8 operands"
    if format is not None and x.dtype not in (torch.float8_e4m3fn, torch.float64):
        return "x", f"must be float8_e4m3fn with format={format}, got {str(x.dtype).removeprefix('torch.')}"
    rows = (x if gather is None else gather).shape[0]
    if out is not None and tuple(out.shape) != (rows, w.shape[1]):
        return "out", f"must be [{rows}, {w.shape[1]}], got {list(out.shape)}"
    shapes = [] if format is None else [FORMATS[format].scale_shape(x.shape)]
    fault = scale_fault(format, "x_scale", x_scale, shapes)
    return fault or scale_fault(format, "w_scale", w_scale, weight_shapes(format, tuple(w.shape)) if format else [])


@grouped_gemm.check_values
def _check_values(group_offsets: Tensor, x: Tensor, gather: Tensor | None, **others: object) -> None:
    ends = group_offsets.tolist()
    rows = (x if gather is None else gather).shape[0]
    if ends[0] != 0 or ends[-1] > rows or any(b < a for a, b in pairwise(ends)):
        named = {"x": x, "group_offsets": group_offsets}
        raise grouped_gemm.contract.error("group_offsets", f"must begin with 0, not fall and end at most at {rows}", named)


def _rows(x: Tensor, gather: Tensor | None, start: int, stop: int) -> Tensor:
    """The rows that a run of the result is computed from; zeros where the index lies outside x."""
    if gather is None:
        return x[start:stop]
    index = gather[start:stop]
    if x.shape[0] == 0:
        return x.new_zeros(stop - start, x.shape[1])
    inside = (index >= 0) & (index < x.shape[0])
    return torch.where(inside[:, None], x.index_select(0, torch.where(inside, index, 0)), 0)


def _plain(x: Tensor, w: Tensor) -> Tensor:
    return x @ w.t()


@grouped_gemm.reference
def _reference(
    x: Tensor,
    w: Tensor,
    group_offsets: Tensor,
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    gather: Tensor | None,
    format: str | None,
    exact_accumulation: bool,
    product: Product = _plain,
) -> Tensor:
    wide = dequantised(x, x_scale, format)
    out = wide.new_zeros((wide if gather is None else gather).shape[0], w.shape[1])
    for expert, (start, stop) in enumerate(pairwise(group_offsets.tolist())):
        if stop > start:
            scale = None if w_scale is None or format is None else expert_scale(w_scale, expert, len(w), format)
            out[start:stop] = product(_rows(wide, gather, start, stop), dequantised(w[expert], scale, format, weight=True))
    return out


@grouped_gemm.baseline
def _baseline(*arguments: Any) -> Tensor:
    *_, format, exact_accumulation = arguments
    restart = BLOCK if format == "FP8_BLOCK" else None
    exact = format is None or exact_accumulation
    return _reference(*arguments, _plain if exact else partial(accumulated, restart=restart))


def _fits(x: Tensor, w: Tensor, x_scale: Tensor | None, w_scale: Tensor | None, **others: object) -> str | None:
    if x.dtype is torch.float32:
        return "float32 operands: tensor cores would round them to TF32"
    for name, value in (("x", x), ("w", w)):
        if value.stride(-1) != 1 and value.shape[-1] > 1:
            return f"`{name}` has stride {value.stride(-1)} along K, the kernel reads stride 1"
    for name, scale in (("x_scale", x_scale), ("w_scale", w_scale)):
        if scale is not None and not scale.is_contiguous():
            return f"`{name}` has strides {list(scale.stride())}, the kernel wants it contiguous"
    return None


@grouped_gemm.impl("triton", needs=("triton",), supports=_fits, instructions=("HGMMA", "QGMMA"), spill_bytes=8)
def _triton(
    out: Tensor,
    x: Tensor,
    w: Tensor,
    group_offsets: Tensor,
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    gather: Tensor | None,
    format: str | None,
    exact_accumulation: bool,
) -> None:
    from penstock.ops.matmul.grouped_gemm_triton import launch

    launch(out, x, w, group_offsets, x_scale, w_scale, gather, format, exact_accumulation)


@grouped_gemm.impl("cpu", needs=("cpu",))
def _cpu(
    out: Tensor,
    x: Tensor,
    w: Tensor,
    group_offsets: Tensor,
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    gather: Tensor | None,
    format: str | None,
    exact_accumulation: bool,
) -> None:
    """torch's product for each group, in the operands' dtype where that is the result's too."""
    coded = x.dtype is torch.float8_e4m3fn
    if x.dtype is torch.float64 or not (coded or out.dtype is x.dtype):
        out.copy_(_reference(x, w, group_offsets, x_scale, w_scale, gather, format, exact_accumulation))
        return
    from penstock.ops.matmul.fp8_cpu import gemm

    ends = group_offsets.tolist()
    out[ends[-1] :] = 0
    rough = out.dtype is torch.bfloat16 and not exact_accumulation
    for expert, (start, stop) in enumerate(pairwise(ends)):
        if stop == start:
            continue
        if format is None or x_scale is None or w_scale is None:
            out[start:stop] = _rows(x, gather, start, stop) @ w[expert].t()
        else:
            codes = _rows(x.view(torch.int8), gather, start, stop).view(x.dtype)
            scale = x_scale
            if format != "FP8_TENSOR":
                table = x_scale if x_scale.dim() == 2 else x_scale[:, None]
                scale = _rows(table, gather, start, stop).view(stop - start, *x_scale.shape[1:])
            out[start:stop] = gemm(codes, w[expert], scale, expert_scale(w_scale, expert, len(w), format), format, rough)


@grouped_gemm.cost
def _cost(
    x: Tensor,
    w: Tensor,
    group_offsets: Tensor,
    gather: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    **options: Any,
) -> Cost:
    counts = group_offsets.diff()
    rows, computed = (x if gather is None else gather).shape[0], int(counts.sum())
    N, K = w.shape[1:]
    read = (int((counts > 0).sum()) * N + min(computed, x.shape[0])) * K * x.element_size()
    rate = "fp8" if x.element_size() == 1 else "bf16"
    return Cost(bytes=read + rows * N * result_dtype(x, out_dtype).itemsize, flops=2 * computed * N * K, rate=rate)


@grouped_gemm.cases
def cases() -> Iterable[Case]:
    """Groups of every awkward size in every format, then those of a server."""
    return _cases.grouped()
