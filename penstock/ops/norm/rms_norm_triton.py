"""One pass over memory: a program holds whole rows in registers; the residual sum, when there is one, is part of the pass."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm_kernel(
    out_ptr,
    sum_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    num_rows,
    N,
    heads,
    out_outer,
    out_inner,
    sum_outer,
    sum_inner,
    x_outer,
    x_inner,
    residual_outer,
    residual_inner,
    eps,
    weight_offset,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    outer = (rows // heads)[:, None]
    inner = (rows % heads)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    mask = (rows < num_rows)[:, None] & (columns < N)
    x = tl.load(x_ptr + outer * x_outer + inner * x_inner + columns, mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + outer * residual_outer + inner * residual_inner + columns, mask, other=0.0)
        rounded = (x + residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + outer * sum_outer + inner * sum_inner + columns, rounded, mask)
        x = rounded.to(tl.float32)
    weight = tl.load(weight_ptr + columns, columns < N, other=0.0).to(tl.float32) + weight_offset
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / N + eps)
    y = x * scale[:, None] * weight
    tl.store(out_ptr + outer * out_outer + inner * out_inner + columns, y.to(out_ptr.dtype.element_ty), mask)


def rows_of(tensor: Tensor) -> tuple[int, int, int, int] | None:
    """(rows, inner size, outer stride, inner stride) of a tensor's leading dimensions, or None when they do not fold."""
    folded: list[list[int]] = []
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if size == 1:
            continue
        if folded and folded[-1][1] == size * stride:
            folded[-1] = [folded[-1][0] * size, stride]
        else:
            folded.append([size, stride])
    if len(folded) > 2:
        return None
    rows = tensor.numel() // max(tensor.shape[-1], 1)
    if len(folded) == 2:
        return rows, folded[1][0], folded[0][1], folded[1][1]
    return rows, 1, folded[0][1] if folded else 0, 0


def launch(
    out: Tensor,
    new_residual: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    offset: float,
) -> None:
    """Launches over rows; a row is one or more of a program's register tiles."""
    N = x.shape[-1]
    if x.numel() == 0:
        return
    has_residual = residual is not None
    tensors = [out, new_residual if has_residual else out, x, residual if has_residual else x]
    folds = [rows_of(tensor) for tensor in tensors]
    inner = max(fold[1] for fold in folds)
    strides = []
    for fold in folds:
        # A tensor that folds to one stride is walked as `inner` steps of it.
        strides += [fold[2], fold[3]] if fold[1] == inner else [fold[2] * inner, fold[2]]
    num_rows = folds[0][0]
    block = triton.next_power_of_2(N)
    rows = max(1, min(16, 2048 // block))
    _rms_norm_kernel[(triton.cdiv(num_rows, rows),)](
        *tensors[:4],
        weight,
        num_rows,
        N,
        inner,
        *strides,
        eps,
        offset,
        HAS_RESIDUAL=has_residual,
        ROWS=rows,
        BLOCK=block,
        num_warps=max(4, min(32, rows * block // 1024)),
    )
