"""A program holds whole rows in registers; a row of more than 16,384 columns is walked twice in chunks, then out of L2.

The first walk finds the mean square and, for a scale of the row itself, the largest |x · weight|, which the root scales.
"""

import triton
import triton.language as tl
from torch import Tensor

from penstock.core.formats import BLOCK, Format
from penstock.core.formats_triton import encode, encode_groups, largest, magnitude, scale_of
from penstock.core.rows import walk_rows
from penstock.ops.norm.rms_norm_triton import WIDEST, Launch, _read


def configure(N: int, format: Format) -> Launch:
    """Sixteen values a thread, as rms_norm; a row of blocks is at least one block wide."""
    width = triton.next_power_of_2(N)
    if format.granularity == "block":
        width = max(width, BLOCK)
    if width > 16384:
        return Launch(rows=1, block=WIDEST, num_warps=32)
    rows = max(1, min(64, 2048 // width))
    return Launch(rows, width, max(4, rows * width // 512))


@triton.jit
def _normalise(x, root, weight_ptr, weight_offset, columns, N):
    weight = tl.load(weight_ptr + columns, columns < N, other=0.0).to(tl.float32) + weight_offset
    return tl.where(columns < N, x * root[:, None] * weight, 0.0)


@triton.jit
def _write(
    y,
    q_rows,
    scale_ptr,
    scale,
    rows,
    num_rows,
    columns,
    first,
    N,
    LARGEST: tl.constexpr,
    SHARE: tl.constexpr,
    DYNAMIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Codes of columns first … first + BLOCK; `scale` [rows] unless blocks have their own."""
    dtype: tl.constexpr = q_rows.dtype.element_ty
    mask = (rows < num_rows)[:, None] & (columns < N)
    if SHARE == "block":
        groups = first // 128 + tl.arange(0, BLOCK // 128)[None, :]
        count = tl.cdiv(N, 128)
        at = rows.to(tl.int64)[:, None] * count + groups
        live = (rows < num_rows)[:, None] & (groups < count)
        tl.store(q_rows + columns, encode_groups(y, scale_ptr, at, live, LARGEST, DYNAMIC, dtype), mask)
    else:
        tl.store(q_rows + columns, encode(y, scale[:, None], dtype), mask)


@triton.jit
def _rms_norm_quant_kernel(
    q_ptr,
    sum_ptr,
    x_ptr,
    residual_ptr,
    scale_ptr,
    weight_ptr,
    num_rows,
    N,
    inner,
    q_outer,
    q_inner,
    sum_outer,
    sum_inner,
    x_outer,
    x_inner,
    residual_outer,
    residual_inner,
    eps,
    weight_offset,
    HAS_RESIDUAL: tl.constexpr,
    LARGEST: tl.constexpr,
    SHARE: tl.constexpr,
    DYNAMIC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = (rows < num_rows)[:, None]
    outer = (rows // inner).to(tl.int64)[:, None]
    step = (rows % inner).to(tl.int64)[:, None]
    q_rows = q_ptr + outer * q_outer + step * q_inner
    sum_rows = sum_ptr + outer * sum_outer + step * sum_inner
    x_rows = x_ptr + outer * x_outer + step * x_inner
    residual_rows = residual_ptr + outer * residual_outer + step * residual_inner
    offsets = tl.arange(0, BLOCK)[None, :]
    scale = tl.full((ROWS,), 1.0, tl.float32)
    if SHARE == "tensor":
        scale = scale * tl.load(scale_ptr)
    elif SHARE == "row" and not DYNAMIC:
        scale = tl.load(scale_ptr + rows, rows < num_rows, other=1.0)
    if WHOLE:
        x = _read(x_rows, residual_rows, sum_rows, offsets, live & (offsets < N), HAS_RESIDUAL).to(tl.float32)
        root = tl.rsqrt(tl.sum(x * x, axis=1) / N + eps)
        y = _normalise(x, root, weight_ptr, weight_offset, offsets, N)
        if SHARE == "row" and DYNAMIC:
            scale = scale_of(largest(y, 1), LARGEST)
            tl.store(scale_ptr + rows, scale, rows < num_rows)
        _write(y, q_rows, scale_ptr, scale, rows, num_rows, offsets, 0, N, LARGEST, SHARE, DYNAMIC, BLOCK)
    else:
        squares = tl.zeros((ROWS,), tl.float32)
        most = tl.zeros((ROWS,), tl.float32)
        for first in range(0, N, BLOCK):
            columns = first + offsets
            x = _read(x_rows, residual_rows, sum_rows, columns, live & (columns < N), HAS_RESIDUAL).to(tl.float32)
            squares += tl.sum(x * x, axis=1)
            if SHARE == "row" and DYNAMIC:
                weight = tl.load(weight_ptr + columns, columns < N, other=0.0).to(tl.float32) + weight_offset
                most = tl.maximum(most, largest(x * weight, 1))
        root = tl.rsqrt(squares / N + eps)
        # Another thread of the program may have written what this one reads back.
        tl.debug_barrier()
        kept_rows = sum_rows if HAS_RESIDUAL else x_rows
        if SHARE == "row" and DYNAMIC:
            scale = scale_of(magnitude(root * most), LARGEST)
            tl.store(scale_ptr + rows, scale, rows < num_rows)
        for first in range(0, N, BLOCK):
            columns = first + offsets
            x = tl.load(kept_rows + columns, live & (columns < N), other=0.0).to(tl.float32)
            y = _normalise(x, root, weight_ptr, weight_offset, columns, N)
            _write(y, q_rows, scale_ptr, scale, rows, num_rows, columns, first, N, LARGEST, SHARE, DYNAMIC, BLOCK)


def launch(
    out: Tensor,
    out_scale: Tensor | None,
    new_residual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    format: Format,
    eps: float,
    offset: float,
) -> None:
    """Launches over the rows of tensors that `unfit_rows` found fit."""
    if x.numel() == 0:
        if out_scale is not None:
            out_scale.fill_(1.0)
        return
    N = x.shape[-1]
    # Without a residual the kernel takes x in its place and does not touch it.
    tensors = [out, x if new_residual is None else new_residual, x, x if residual is None else residual]
    num_rows, inner, strides = walk_rows(*tensors)
    config = configure(N, format)
    _rms_norm_quant_kernel[(triton.cdiv(num_rows, config.rows),)](
        *tensors,
        out_scale if scale is None else scale,
        weight,
        num_rows,
        N,
        inner,
        *strides,
        eps,
        offset,
        HAS_RESIDUAL=residual is not None,
        LARGEST=format.largest,
        SHARE={"tensor": "tensor", "block": "block"}.get(format.granularity, "row"),
        DYNAMIC=scale is None,
        ROWS=config.rows,
        BLOCK=config.block,
        WHOLE=config.block >= N,
        num_warps=config.num_warps,
    )
