"""A program holds whole rows in registers: of bfloat16 without a residual up to 65,536 columns, of others up to 16,384.

A wider row is walked twice but for its last chunk.
One such program fills a multiprocessor, so that the rows in work, 17 MB of 132 programs at 65,536 columns, stay in L2 for the
second walk. (Four smaller programs on each had 69 MB in work, more than L2 holds.)

The residual sum, when there is one, is part of the first walk.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.core.rows import walk_rows
from penstock.core.tuning import tuned

# What 1,024 threads hold of a row in float32, sixteen values each; with thirty-two they spill.
WIDEST = 16384


@dataclass(frozen=True)
class Launch:
    """A program takes `rows` rows, `block` columns at a time, with num_warps warps."""

    rows: int
    block: int
    num_warps: int


def candidates(N: int) -> Iterator[Launch]:
    """Whole rows in 8 to 64 values a thread, and chunks of wide rows."""
    width = triton.next_power_of_2(N)
    for block in [width] if width <= 16384 else [4096, 8192, 16384]:
        for rows in [1, 2, 4, 8] if block == width else [1]:
            for num_warps in (2, 4, 8, 16, 32):
                if 8 <= rows * block / (32 * num_warps) <= 64:
                    yield Launch(rows, block, num_warps)


@tuned(candidates)
def configure(N: int) -> Launch:
    """Sixteen values a thread: two 16-byte loads in bfloat16, and no spill with a residual and a float32 weight."""
    width = triton.next_power_of_2(N)
    if width > 16384:
        return Launch(rows=1, block=WIDEST, num_warps=32)
    rows = max(1, min(64, 2048 // width))
    return Launch(rows, width, max(4, rows * width // 512))


def configure_held(N: int, x: Tensor) -> Launch | None:
    """A wide row of bfloat16, held whole: 64 values in 32 registers of a thread. None for others; ragged ones would spill."""
    if x.dtype is torch.bfloat16 and WIDEST < N <= 4 * WIDEST and N % 16 == 0:
        block = triton.next_power_of_2(N)
        return Launch(1, block, block // 2048)
    return None


@triton.jit
def again(x, HELD: tl.constexpr):
    """x in float32 once more. Of a row that is HELD in bfloat16 by a shift: that it is the conversion it has made before the
    compiler does not see, and so does not keep 32 bits of a value for later."""
    if HELD:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def _read(x_ptr, residual_ptr, sum_ptr, columns, mask, HAS_RESIDUAL: tl.constexpr):
    """x in its dtype; with a residual the rounded sum, which is stored."""
    x = tl.load(x_ptr + columns, mask, other=0.0)
    if HAS_RESIDUAL:
        x = (x.to(tl.float32) + tl.load(residual_ptr + columns, mask, other=0.0).to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + columns, x, mask)
    return x


@triton.jit
def _scale_and_write(out_ptr, x, scale, weight_ptr, weight_offset, columns, inside, mask):
    weight = tl.load(weight_ptr + columns, inside, other=0.0).to(tl.float32) + weight_offset
    tl.store(out_ptr + columns, (x * scale[:, None] * weight).to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _rms_norm_kernel(
    out_ptr,
    sum_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    num_rows,
    N,
    inner,
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
    WHOLE: tl.constexpr,
    HELD: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = (rows < num_rows)[:, None]
    outer = (rows // inner).to(tl.int64)[:, None]
    step = (rows % inner).to(tl.int64)[:, None]
    out_rows = out_ptr + outer * out_outer + step * out_inner
    sum_rows = sum_ptr + outer * sum_outer + step * sum_inner
    x_rows = x_ptr + outer * x_outer + step * x_inner
    residual_rows = residual_ptr + outer * residual_outer + step * residual_inner
    columns = tl.arange(0, BLOCK)[None, :]
    if WHOLE:
        mask = live & (columns < N)
        kept = _read(x_rows, residual_rows, sum_rows, columns, mask, HAS_RESIDUAL)
        x = kept.to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / N + eps)
        _scale_and_write(out_rows, again(kept, HELD), scale, weight_ptr, weight_offset, columns, columns < N, mask)
    else:
        last = (N - 1) // BLOCK * BLOCK
        squares = tl.zeros((ROWS,), tl.float32)
        for start in range(0, last, BLOCK):
            x = _read(x_rows, residual_rows, sum_rows, start + columns, live, HAS_RESIDUAL).to(tl.float32)
            squares += tl.sum(x * x, axis=1)
        inside = last + columns < N
        x = _read(x_rows, residual_rows, sum_rows, last + columns, live & inside, HAS_RESIDUAL).to(tl.float32)
        scale = tl.rsqrt((squares + tl.sum(x * x, axis=1)) / N + eps)
        _scale_and_write(out_rows, x, scale, weight_ptr, weight_offset, last + columns, inside, live & inside)
        # Another thread of the program may have written what this one reads back.
        tl.debug_barrier()
        kept_rows = sum_rows if HAS_RESIDUAL else x_rows
        for start in range(0, last, BLOCK):
            x = tl.load(kept_rows + start + columns, live, other=0.0).to(tl.float32)
            _scale_and_write(out_rows, x, scale, weight_ptr, weight_offset, start + columns, columns < N, live)


def launch(
    out: Tensor,
    new_residual: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    offset: float,
) -> None:
    """Launches over the rows of tensors that `unfit_rows` found fit."""
    if x.numel() == 0:
        return
    N = x.shape[-1]
    has_residual = residual is not None
    # Without a residual the kernel takes x and out in its place and does not touch them.
    tensors = [out, out if new_residual is None else new_residual, x, x if residual is None else residual]
    num_rows, inner, strides = walk_rows(*tensors)
    config = None if has_residual else configure_held(N, x)
    config = config or configure.on(out.device, N)
    _rms_norm_kernel[(triton.cdiv(num_rows, config.rows),)](
        *tensors,
        weight,
        num_rows,
        N,
        inner,
        *strides,
        eps,
        offset,
        HAS_RESIDUAL=has_residual,
        ROWS=config.rows,
        BLOCK=config.block,
        WHOLE=config.block >= N,
        HELD=config.block > WIDEST,
        num_warps=config.num_warps,
    )
