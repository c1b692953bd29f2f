"""One pass: a program takes units as quantize does, parts of rows that share a scale."""

import triton
import triton.language as tl
from torch import Tensor

from penstock.core.formats import Format
from penstock.core.formats_triton import configure, place_units, scale_index, units_of
from penstock.core.rows import walk_rows


@triton.jit
def _dequantize_kernel(
    out_ptr,
    q_ptr,
    scale_ptr,
    num_units,
    K,
    N,
    per_row,
    width,
    inner,
    out_outer,
    out_inner,
    q_outer,
    q_inner,
    SHARE: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    units = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    live, outer, step, start = place_units(units, num_units, per_row, width, inner)
    offsets = tl.arange(0, BLOCK)[None, :]
    columns = start + offsets
    mask = live & (columns < K) & (offsets < width)
    q = tl.load(q_ptr + outer * q_outer + step * q_inner + columns, mask).to(tl.float32)
    scale = tl.load(scale_ptr + scale_index(units, per_row, N, SHARE), units < num_units, other=1.0)
    out = out_ptr + outer * out_outer + step * out_inner + columns
    tl.store(out, (q * scale[:, None]).to(out_ptr.dtype.element_ty), mask)


def launch(out: Tensor, q: Tensor, scale: Tensor, format: Format, weight: bool) -> None:
    """Launches over the rows of tensors that `unfit_rows` found fit."""
    if q.numel() == 0:
        return
    K, N = q.shape[-1], q.shape[-2] if weight else 1
    num_rows, inner, strides = walk_rows(out, q)
    share, per_row, width = units_of(K, format, dynamic=False)
    config = configure(width)
    num_units = num_rows * per_row
    _dequantize_kernel[(triton.cdiv(num_units, config.units),)](
        out,
        q,
        scale,
        num_units,
        K,
        N,
        per_row,
        width,
        inner,
        *strides,
        SHARE="weight" if weight else share,
        UNITS=config.units,
        BLOCK=config.block,
        num_warps=config.num_warps,
    )
