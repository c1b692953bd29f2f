"""A program holds whole rows in registers and adds and subtracts neighbours log₂ N times.

Each round puts the sums into the first half of the row and the differences into the second, which turns the bits of the index
by one place: after log₂ N rounds every value has met every other and the order is natural again.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from penstock.core.rows import walk_rows


@dataclass(frozen=True)
class Launch:
    """A program takes `rows` rows with num_warps warps."""

    rows: int
    num_warps: int


def configure(N: int) -> Launch:
    """Sixteen values a thread, in the widest rows thirty-two."""
    rows = max(1, 2048 // N)
    return Launch(rows, min(32, max(4, rows * N // 512)))


@triton.jit
def transform_rows(x, ROWS: tl.constexpr, N: tl.constexpr, ROUNDS: tl.constexpr):
    """H x of rows x [ROWS, N], not scaled; N = 2 ** ROUNDS."""
    for _ in tl.static_range(ROUNDS):
        first, second = tl.split(tl.reshape(x, (ROWS, N // 2, 2)))
        x = tl.reshape(tl.trans(tl.join(first + second, first - second), (0, 2, 1)), (ROWS, N))
    return x


@triton.jit
def _hadamard_kernel(
    out_ptr,
    x_ptr,
    num_rows,
    inner,
    out_outer,
    out_inner,
    x_outer,
    x_inner,
    scale,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    outer = (rows // inner).to(tl.int64)[:, None]
    step = (rows % inner).to(tl.int64)[:, None]
    columns = tl.arange(0, N)[None, :]
    mask = (rows < num_rows)[:, None] & (columns < N)
    x = tl.load(x_ptr + outer * x_outer + step * x_inner + columns, mask, other=0.0).to(tl.float32)
    x = transform_rows(x, ROWS, N, ROUNDS)
    out = out_ptr + outer * out_outer + step * out_inner + columns
    tl.store(out, (x * scale).to(out_ptr.dtype.element_ty), mask)


def launch(out: Tensor, x: Tensor, scale: float) -> None:
    """Launches over the rows of tensors that `unfit_rows` found fit."""
    if x.numel() == 0:
        return
    N = x.shape[-1]
    num_rows, inner, strides = walk_rows(out, x)
    config = configure(N)
    _hadamard_kernel[(triton.cdiv(num_rows, config.rows),)](
        out,
        x,
        num_rows,
        inner,
        *strides,
        scale,
        ROWS=config.rows,
        N=N,
        ROUNDS=N.bit_length() - 1,
        num_warps=config.num_warps,
    )
