"""A program owns some rows of one head's state: it reads them once, writes them once, and sums over N for its rows of y."""

from collections.abc import Iterator
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from penstock.core.device import num_sms
from penstock.core.tuning import tuned
from penstock.ops.recurrent._segments_triton import silu, softplus


@dataclass(frozen=True)
class Launch:
    """Rows of the state in a program; whether the second-level cache is told that the state is not read again soon."""

    rows: int
    num_warps: int
    streams: bool = False


def candidates(P: int, N: int, itemsize: int, heads: int, sms: int) -> Iterator[Launch]:
    """More rows put more bytes in flight, fewer leave a shorter last round; in two bytes a row has half the vectors."""
    for rows in (4, 8, 16, 32, 64):
        for num_warps in (1, 2, 4, 8):
            # From one vector of 16 bytes a lane to eight.
            if rows <= triton.next_power_of_2(P) and 16 <= rows * N * itemsize // (32 * num_warps) <= 128:
                yield Launch(rows, num_warps)
                yield Launch(rows, num_warps, streams=True)


@tuned(candidates)
def configure(P: int, N: int, itemsize: int, heads: int, sms: int) -> Launch:
    """Values of the state in a program: 1,024 of float32, 4,096 of two bytes; fewer where multiprocessors would have no work.

    On an H200 at H 80, P 64, N 128 and 256 requests 8 rows reach 95 % of the copy bandwidth, 64 rows 93 %; in bfloat16 8 rows
    are 2 % slower than 32.
    """
    width = triton.next_power_of_2(N)
    rows = max(1, min(triton.next_power_of_2(P), (1024 if itemsize == 4 else 4096) // width))
    while rows > 8 and heads * triton.cdiv(P, rows) < 4 * sms:
        rows //= 2
    return Launch(rows, 4 if rows * width >= 2048 else 2)


@triton.jit
def _state_update_kernel(
    out_ptr,
    state_ptr,
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    index_ptr,
    state_slot,
    state_head,
    state_row,
    out_row,
    out_head,
    x_row,
    x_head,
    z_row,
    z_head,
    dt_row,
    dt_head,
    B_row,
    B_group,
    C_row,
    C_group,
    dt_min,
    dt_max,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STREAMS: tl.constexpr,
):
    p = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    request = tl.program_id(2).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    slot = request
    if HAS_INDEX:
        slot = tl.load(index_ptr + request).to(tl.int64)
    out_at = out_ptr + request * out_row + head * out_head + p
    if slot < 0:
        tl.store(out_at, tl.zeros((ROWS,), tl.float32).to(out_ptr.dtype.element_ty), p < P)
        return
    cell = state_ptr + slot * state_slot + head * state_head + p[:, None] * state_row + n[None, :]
    inside = (p < P)[:, None] & (n < N)[None, :]
    policy: tl.constexpr = "evict_first" if STREAMS else ""
    h = tl.load(cell, inside, other=0.0, eviction_policy=policy).to(tl.float32)
    step = tl.load(dt_ptr + request * dt_row + head * dt_head).to(tl.float32)
    if HAS_BIAS:
        step += tl.load(bias_ptr + head).to(tl.float32)
    if SOFTPLUS:
        step = softplus(step)
    step = tl.minimum(tl.maximum(step, dt_min), dt_max)
    decay = tl.exp(step * tl.load(A_ptr + head).to(tl.float32))
    x = tl.load(x_ptr + request * x_row + head * x_head + p, p < P, other=0.0).to(tl.float32)
    group = head // PER_GROUP
    b = tl.load(B_ptr + request * B_row + group * B_group + n, n < N, other=0.0).to(tl.float32)
    c = tl.load(C_ptr + request * C_row + group * C_group + n, n < N, other=0.0).to(tl.float32)
    h = h * decay + (x * step)[:, None] * b[None, :]
    tl.store(cell, h.to(state_ptr.dtype.element_ty), inside, eviction_policy=policy)
    y = tl.sum(h * c[None, :], 1)
    if HAS_D:
        y += tl.load(D_ptr + head).to(tl.float32) * x
    if HAS_Z:
        y *= silu(tl.load(z_ptr + request * z_row + head * z_head + p, p < P, other=0.0).to(tl.float32))
    tl.store(out_at, y.to(out_ptr.dtype.element_ty), p < P)


def launch(
    out: Tensor,
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state_indices: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> None:
    """Launches over rows of the state, heads and requests."""
    batch, H, P = x.shape
    G, N = B.shape[1:]
    if x.numel() == 0:
        return
    config = configure.on(x.device, P, N, state.element_size(), batch * H, num_sms(x.device))
    _state_update_kernel[(triton.cdiv(P, config.rows), H, batch)](
        out,
        state,
        x,
        dt,
        A,
        B,
        C,
        A if D is None else D,
        x if z is None else z,
        A if dt_bias is None else dt_bias,
        x if state_indices is None else state_indices,
        *state.stride()[:3],
        *out.stride()[:2],
        *x.stride()[:2],
        *(x if z is None else z).stride()[:2],
        *dt.stride(),
        *B.stride()[:2],
        *C.stride()[:2],
        dt_min,
        dt_max,
        HAS_D=D is not None,
        HAS_Z=z is not None,
        HAS_BIAS=dt_bias is not None,
        HAS_INDEX=state_indices is not None,
        SOFTPLUS=dt_softplus,
        PER_GROUP=H // G,
        P=P,
        N=N,
        ROWS=config.rows,
        BLOCK_N=triton.next_power_of_2(max(N, 1)),
        STREAMS=config.streams,
        num_warps=config.num_warps,
    )
