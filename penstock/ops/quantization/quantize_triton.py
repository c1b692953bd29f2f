"""A program takes units: runs of a row that share a scale, or parts of one when the scale is known.

One pass, except: a row wider than 16,384 is walked twice, the second time out of L2; and a whole tensor's scale is found by
two small kernels first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.core.formats import BLOCK, Format
from penstock.core.formats_triton import configure, encode, largest, magnitude, place_units, scale_index, scale_of, units_of
from penstock.core.rows import walk_rows

PARTIALS = 1024


@triton.jit
def _quantize_kernel(
    q_ptr,
    scale_ptr,
    x_ptr,
    num_units,
    K,
    N,
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
    at = scale_index(units, per_row, N, SHARE)
    offsets = tl.arange(0, BLOCK)[None, :]
    if WHOLE:
        columns = start + offsets
        mask = live & (columns < K) & (offsets < width)
        x = tl.load(x_rows + columns, mask, other=0.0).to(tl.float32)
        if DYNAMIC:
            scale = scale_of(largest(x, 1), LARGEST)
            tl.store(scale_ptr + at, scale, units < num_units)
        else:
            scale = tl.load(scale_ptr + at, units < num_units, other=1.0)
        tl.store(q_rows + columns, encode(x, scale[:, None], q_ptr.dtype.element_ty), mask)
    else:
        most = tl.zeros((UNITS, BLOCK), tl.float32)
        for first in range(0, K, BLOCK):
            x = tl.load(x_rows + first + offsets, live & (first + offsets < K), other=0.0).to(tl.float32)
            most = tl.maximum(most, magnitude(x))
        scale = scale_of(tl.max(most, axis=1), LARGEST)
        tl.store(scale_ptr + at, scale, units < num_units)
        for first in range(0, K, BLOCK):
            mask = live & (first + offsets < K)
            x = tl.load(x_rows + first + offsets, mask, other=0.0).to(tl.float32)
            tl.store(q_rows + first + offsets, encode(x, scale[:, None], q_ptr.dtype.element_ty), mask)


@triton.jit
def _square_kernel(
    q_ptr,
    scale_ptr,
    x_ptr,
    K,
    N,
    inner,
    q_outer,
    q_inner,
    x_outer,
    x_inner,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    across, down = tl.cdiv(K, BLOCK), tl.cdiv(N, BLOCK)
    square = tl.program_id(0)
    within = square // across % down * BLOCK + tl.arange(0, BLOCK)
    rows = square // across // down * N + within
    outer, step = (rows // inner).to(tl.int64)[:, None], (rows % inner).to(tl.int64)[:, None]
    columns = (square % across * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (within < N)[:, None] & (columns < K)
    x = tl.load(x_ptr + outer * x_outer + step * x_inner + columns, mask, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(largest(x, 1), axis=0), LARGEST)
    tl.store(scale_ptr + square, scale)
    tl.store(q_ptr + outer * q_outer + step * q_inner + columns, encode(x, scale, q_ptr.dtype.element_ty), mask)


@triton.jit
def _most_kernel(
    partial_ptr,
    x_ptr,
    num_units,
    K,
    per_row,
    width,
    inner,
    x_outer,
    x_inner,
    UNITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.arange(0, BLOCK)[None, :]
    most = tl.zeros((UNITS, BLOCK), tl.float32)
    for first in range(tl.program_id(0) * UNITS, num_units, tl.num_programs(0) * UNITS):
        units = first + tl.arange(0, UNITS)
        live, outer, step, start = place_units(units, num_units, per_row, width, inner)
        columns = start + offsets
        x = tl.load(x_ptr + outer * x_outer + step * x_inner + columns, live & (columns < K), other=0.0)
        most = tl.maximum(most, magnitude(x.to(tl.float32)))
    tl.store(partial_ptr + tl.program_id(0), tl.max(tl.max(most, axis=1), axis=0))


@triton.jit
def _tensor_scale_kernel(scale_ptr, partial_ptr, n, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(scale_ptr, scale_of(tl.max(tl.load(partial_ptr + at, at < n, other=0.0), axis=0), LARGEST))


def launch(out: Tensor, out_scale: Tensor | None, x: Tensor, scale: Tensor | None, format: Format, weight: bool) -> None:
    """Launches over the rows of tensors that `unfit_rows` found fit."""
    if x.numel() == 0:
        if out_scale is not None:
            out_scale.fill_(1.0)
        return
    K, N = x.shape[-1], x.shape[-2] if weight else 1
    num_rows, inner, strides = walk_rows(out, x)
    if weight and scale is None:
        squares = num_rows // N * triton.cdiv(N, BLOCK) * triton.cdiv(K, BLOCK)
        _square_kernel[(squares,)](out, out_scale, x, K, N, inner, *strides, LARGEST=format.largest, BLOCK=BLOCK, num_warps=16)
        return
    share, per_row, width = units_of(K, format, scale is None)
    dynamic = scale is None and share != "tensor"
    num_units = num_rows * per_row
    config = configure(width)
    programs = triton.cdiv(num_units, config.units)
    if scale is None and not dynamic:
        partial = x.new_empty(min(PARTIALS, programs), dtype=torch.float32)
        layout = (num_units, K, per_row, width, inner, *strides[2:])
        _most_kernel[(len(partial),)](partial, x, *layout, UNITS=config.units, BLOCK=config.block, num_warps=config.num_warps)
        _tensor_scale_kernel[(1,)](out_scale, partial, len(partial), LARGEST=format.largest, BLOCK=PARTIALS)
    _quantize_kernel[(programs,)](
        out,
        out_scale if scale is None else scale,
        x,
        num_units,
        K,
        N,
        per_row,
        width,
        inner,
        *strides,
        LARGEST=format.largest,
        SHARE="weight" if weight else share,
        DYNAMIC=dynamic,
        UNITS=config.units,
        BLOCK=config.block,
        WHOLE=config.block >= width,
        num_warps=config.num_warps,
    )
