"""A program takes units of the products, as quantize does: runs that share a scale, or parts of one when it is known.

A row of 8,193 to 16,384 products of 16 bits that needs a scale of its own fills a multiprocessor. One program stays on each and
goes from row to row; while it computes one, the next is copied into shared memory. A wider row is computed twice, the second
time out of L2.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from penstock.core.device import num_sms
from penstock.core.formats import Format
from penstock.core.formats_triton import encode, largest, magnitude, place_units, scale_index, scale_of, units_of
from penstock.core.rows import walk_rows

# What 1,024 threads hold in float32, sixteen products each.
WIDEST = 16384


@dataclass(frozen=True)
class Launch:
    """A program takes `units` units of a row, `block` columns of each at a time, with num_warps warps."""

    units: int
    block: int
    num_warps: int


def configure(width: int, itemsize: int) -> Launch:
    """Eight to sixteen products a thread: gate and factor together are two to four 16-byte loads in bfloat16."""
    block = triton.next_power_of_2(width)
    # Two rows of float32 would not fit into shared memory.
    if block == WIDEST and itemsize == 2:
        return Launch(1, block, 32)
    if block > 8192:
        return Launch(1, 4096, 8)
    units = max(1, min(64, 2048 // block))
    return Launch(units, block, max(4, units * block // 512))


@triton.jit
def _product(gates, C, mask):
    gate = tl.load(gates, mask, other=0.0).to(tl.float32)
    up = tl.load(gates + C, mask, other=0.0).to(tl.float32)
    return gate / (1 + tl.exp(-gate)) * up


@triton.jit
def _silu_and_mul_quant_kernel(
    q_ptr,
    scale_ptr,
    x_ptr,
    num_units,
    C,
    per_row,
    width,
    inner,
    q_outer,
    q_inner,
    x_outer,
    x_inner,
    LARGEST: tl.constexpr,
    SHARE: tl.constexpr,
    DYNAMIC: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    units = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    live, outer, step, start = place_units(units, num_units, per_row, width, inner)
    x_rows = x_ptr + outer * x_outer + step * x_inner
    q_rows = q_ptr + outer * q_outer + step * q_inner
    at = scale_index(units, per_row, 1, SHARE)
    offsets = tl.arange(0, BLOCK)[None, :]
    if WHOLE:
        columns = start + offsets
        mask = live & (columns < C) & (offsets < width)
        y = _product(x_rows + columns, C, mask)
        if DYNAMIC:
            scale = scale_of(largest(y, 1), LARGEST)
            tl.store(scale_ptr + at, scale, units < num_units)
        else:
            scale = tl.load(scale_ptr + at, units < num_units, other=1.0)
        tl.store(q_rows + columns, encode(y, scale[:, None], q_ptr.dtype.element_ty), mask)
    else:
        most = tl.zeros((UNITS, BLOCK), tl.float32)
        for first in range(0, C, BLOCK):
            columns = first + offsets
            most = tl.maximum(most, magnitude(_product(x_rows + columns, C, live & (columns < C))))
        scale = scale_of(tl.max(most, axis=1), LARGEST)
        tl.store(scale_ptr + at, scale, units < num_units)
        for first in range(0, C, BLOCK):
            columns = first + offsets
            mask = live & (columns < C)
            y = _product(x_rows + columns, C, mask)
            tl.store(q_rows + columns, encode(y, scale[:, None], q_ptr.dtype.element_ty), mask)


@triton.jit
def _wide_rows_kernel(
    q_ptr,
    scale_ptr,
    x_ptr,
    num_rows,
    C,
    inner,
    q_outer,
    q_inner,
    x_outer,
    x_inner,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    for row in tl.range(tl.program_id(0), num_rows, tl.num_programs(0), num_stages=3):
        outer, step = (row // inner).to(tl.int64), (row % inner).to(tl.int64)
        y = _product(x_ptr + outer * x_outer + step * x_inner + columns, C, columns < C)
        scale = scale_of(largest(y, 0), LARGEST)
        tl.store(scale_ptr + row, scale)
        codes = encode(y, scale, q_ptr.dtype.element_ty)
        tl.store(q_ptr + outer * q_outer + step * q_inner + columns, codes, columns < C)


def launch(out: Tensor, out_scale: Tensor | None, x: Tensor, scale: Tensor | None, format: Format) -> None:
    """Launches over the rows of tensors that `unfit_rows` found fit."""
    if out.numel() == 0:
        if out_scale is not None:
            out_scale.fill_(1.0)
        return
    C = out.shape[-1]
    num_rows, inner, strides = walk_rows(out, x)
    share, per_row, width = units_of(C, format, scale is None)
    num_units = num_rows * per_row
    config = configure(width, x.element_size())
    if config.block == WIDEST:
        _wide_rows_kernel[(min(num_rows, num_sms(out.device)),)](
            out,
            out_scale,
            x,
            num_rows,
            C,
            inner,
            *strides,
            LARGEST=format.largest,
            BLOCK=config.block,
            num_warps=config.num_warps,
        )
        return
    _silu_and_mul_quant_kernel[(triton.cdiv(num_units, config.units),)](
        out,
        out_scale if scale is None else scale,
        x,
        num_units,
        C,
        per_row,
        width,
        inner,
        *strides,
        LARGEST=format.largest,
        SHARE=share,
        DYNAMIC=scale is None,
        UNITS=config.units,
        BLOCK=config.block,
        WHOLE=config.block >= width,
        num_warps=config.num_warps,
    )
