"""One pass: a program reads a tile of gates and the tile of factors beside it, and writes their product."""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from penstock.core.rows import walk_rows


@dataclass(frozen=True)
class Launch:
    """A program takes `rows` rows of `block` columns, with num_warps warps."""

    rows: int
    block: int
    num_warps: int = 4


def configure(C: int) -> Launch:
    """2,048 results a program, 16 a thread: two 16-byte loads of each half in bfloat16."""
    block = min(triton.next_power_of_2(C), 2048)
    return Launch(max(1, min(64, 2048 // block)), block)


@triton.jit
def _normal_cdf(x):
    """(1 + erf(x / √2)) / 2 to 7.5e-8, a thousandth of what 16 bits round away; Abramowitz & Stegun 7.1.26."""
    z = tl.abs(x) * 0.7071067811865476
    t = 1 / (1 + 0.3275911 * z)
    series = 0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    tail = 0.5 * t * series * tl.exp(-z * z)
    return tl.where(x >= 0, 1 - tail, tail)


@triton.jit
def _gated_kernel(
    out_ptr,
    x_ptr,
    num_rows,
    C,
    inner,
    out_outer,
    out_inner,
    x_outer,
    x_inner,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    num_blocks = tl.cdiv(C, BLOCK)
    rows = tl.program_id(0) // num_blocks * ROWS + tl.arange(0, ROWS)
    columns = (tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK))[None, :]
    outer = (rows // inner).to(tl.int64)[:, None]
    step = (rows % inner).to(tl.int64)[:, None]
    mask = (rows < num_rows)[:, None] & (columns < C)
    gates = x_ptr + outer * x_outer + step * x_inner + columns
    gate = tl.load(gates, mask, other=0.0).to(tl.float32)
    up = tl.load(gates + C, mask, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        passed = gate / (1 + tl.exp(-gate))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh z) / 2 = 1 / (1 + exp(-2z)); 2 · √(2/π) = 1.5957691216.
        passed = gate / (1 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))
    elif out_ptr.dtype.element_ty == tl.float32:
        passed = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
    else:
        passed = gate * _normal_cdf(gate)
    tl.store(out_ptr + outer * out_outer + step * out_inner + columns, (passed * up).to(out_ptr.dtype.element_ty), mask)


def launch(out: Tensor, x: Tensor, activation: str) -> None:
    """Launches over the rows of tensors that `unfit_rows` found fit; activation is silu, gelu_tanh or gelu."""
    if out.numel() == 0:
        return
    C = out.shape[-1]
    num_rows, inner, strides = walk_rows(out, x)
    config = configure(C)
    _gated_kernel[(triton.cdiv(num_rows, config.rows) * triton.cdiv(C, config.block),)](
        out,
        x,
        num_rows,
        C,
        inner,
        *strides,
        ACTIVATION=activation,
        ROWS=config.rows,
        BLOCK=config.block,
        num_warps=config.num_warps,
    )
