"""A program holds whole rows in registers; a row of more than 16,384 columns is walked three times in chunks, twice out of L2.

The variance is that of the centred values, and what rounding left in their mean is taken off again, so that a large mean costs
no digits.
"""

import triton
import triton.language as tl
from torch import Tensor

from penstock.core.rows import walk_rows
from penstock.ops.norm.rms_norm_triton import configure


@triton.jit
def _scale_and_write(out_rows, centred, scale, weight_ptr, bias_ptr, columns, inside, mask, HAS_BIAS: tl.constexpr):
    y = centred * scale[:, None] * tl.load(weight_ptr + columns, inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + columns, inside, other=0.0).to(tl.float32)
    tl.store(out_rows + columns, y.to(out_rows.dtype.element_ty), mask)


@triton.jit
def _layer_norm_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    num_rows,
    N,
    inner,
    out_outer,
    out_inner,
    x_outer,
    x_inner,
    eps,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = (rows < num_rows)[:, None]
    outer = (rows // inner).to(tl.int64)[:, None]
    step = (rows % inner).to(tl.int64)[:, None]
    out_rows = out_ptr + outer * out_outer + step * out_inner
    x_rows = x_ptr + outer * x_outer + step * x_inner
    offsets = tl.arange(0, BLOCK)[None, :]
    if WHOLE:
        inside = offsets < N
        mask = live & inside
        x = tl.load(x_rows + offsets, mask, other=0.0).to(tl.float32)
        centred = tl.where(inside, x - (tl.sum(x, axis=1) / N)[:, None], 0.0)
        centred = tl.where(inside, centred - (tl.sum(centred, axis=1) / N)[:, None], 0.0)
        scale = tl.rsqrt(tl.sum(centred * centred, axis=1) / N + eps)
        _scale_and_write(out_rows, centred, scale, weight_ptr, bias_ptr, offsets, inside, mask, HAS_BIAS)
    else:
        sums = tl.zeros((ROWS,), tl.float32)
        for first in range(0, N, BLOCK):
            x = tl.load(x_rows + first + offsets, live & (first + offsets < N), other=0.0).to(tl.float32)
            sums += tl.sum(x, axis=1)
        mean = (sums / N)[:, None]
        sums = tl.zeros((ROWS,), tl.float32)
        squares = tl.zeros((ROWS,), tl.float32)
        for first in range(0, N, BLOCK):
            inside = first + offsets < N
            x = tl.load(x_rows + first + offsets, live & inside, other=0.0).to(tl.float32)
            centred = tl.where(inside, x - mean, 0.0)
            sums += tl.sum(centred, axis=1)
            squares += tl.sum(centred * centred, axis=1)
        rest = sums / N
        scale = tl.rsqrt(squares / N - rest * rest + eps)
        for first in range(0, N, BLOCK):
            columns = first + offsets
            mask = live & (columns < N)
            centred = tl.load(x_rows + columns, mask, other=0.0).to(tl.float32) - mean - rest[:, None]
            _scale_and_write(out_rows, centred, scale, weight_ptr, bias_ptr, columns, columns < N, mask, HAS_BIAS)


def launch(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> None:
    """Launches over the rows of tensors that `unfit_rows` found fit."""
    if x.numel() == 0:
        return
    N = x.shape[-1]
    num_rows, inner, strides = walk_rows(out, x)
    config = configure(N)
    _layer_norm_kernel[(triton.cdiv(num_rows, config.rows),)](
        out,
        x,
        weight,
        weight if bias is None else bias,
        num_rows,
        N,
        inner,
        *strides,
        eps,
        HAS_BIAS=bias is not None,
        ROWS=config.rows,
        BLOCK=config.block,
        WHOLE=config.block >= N,
        num_warps=config.num_warps,
    )
