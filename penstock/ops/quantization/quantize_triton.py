"""A program takes units: runs of a row that share a scale, or parts of one when the scale is known.

One pass, except: a row wider than 16,384 is walked twice, the second time out of L2; and a whole tensor's scale is found by
two small kernels first.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.core.formats import BLOCK, Format
from penstock.core.formats_triton import encode, magnitude, scale_of
from penstock.core.rows import walk_rows

PARTIALS = 1024


@dataclass(frozen=True)
class Launch:
    """A program takes `units` units of a row, `block` columns of each at a time, with num_warps warps."""

    units: int
    block: int
    num_warps: int


def configure(width: int) -> Launch:
    """Sixteen values a thread: two 16-byte loads in bfloat16, one 16-byte store of codes."""
    block = triton.next_power_of_2(max(width, 1))
    if block > 16384:
        return Launch(1, 8192, 16)
    units = max(1, min(64, 2048 // block))
    return Launch(units, block, max(4, units * block // 512))


@triton.jit
def place_units(units, num_units, per_row, width, inner):
    """(live, outer, step, start) of units: rows as `walk_rows` has them, and the first column."""
    rows = units // per_row
    return (
        (units < num_units)[:, None],
        (rows // inner).to(tl.int64)[:, None],
        (rows % inner).to(tl.int64)[:, None],
        (units % per_row * width)[:, None],
    )


@triton.jit
def scale_index(units, per_row, N, SHARE: tl.constexpr):
    """Which scale serves a unit."""
    if SHARE == "tensor":
        return units * 0
    elif SHARE == "row":
        return units // per_row
    elif SHARE == "block":
        return units
    else:
        row = units // per_row
        return (row // N * tl.cdiv(N, 128) + row % N // 128) * per_row + units % per_row


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
            scale = scale_of(tl.max(magnitude(x), axis=1), LARGEST)
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
    scale = scale_of(tl.max(tl.max(magnitude(x), axis=1), axis=0), LARGEST)
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


def units_of(K: int, format: Format, dynamic: bool) -> tuple[str, int, int]:
    """(what shares a scale, units of a row, their width)."""
    if format.granularity == "block":
        return "block", triton.cdiv(K, BLOCK), BLOCK
    share = "tensor" if format.granularity == "tensor" else "row"
    # A scale that is known lets a row be cut anywhere.
    width = K if dynamic and share == "row" else min(K, 2048)
    return share, triton.cdiv(K, width), width


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
