"""A program of one warp walks one segment of a request token by token for some channels, their states in registers.

As in ssd_prefill a first kernel gives what each segment but a request's last would leave of zeros, and the steps it sums up. The
exponentials are the limit (one for each state and token, and a second one in requests that are cut), so a few warps on each
quarter of a multiprocessor suffice; the inputs of the next token are loaded while one is computed.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.core.device import num_sms
from penstock.ops.recurrent._segments_triton import LOG2E, find_request, locate, silu, softplus

# Programs that clear the rows after the last request.
CLEARING = 8
MOST_SEGMENTS = 16


@dataclass(frozen=True)
class Launch:
    """Channels of a program, and the programs that should share a multiprocessor before requests are left whole."""

    channels: int
    resident: int = 16


def configure(N: int) -> Launch:
    """512 states a warp, 16 a thread."""
    return Launch(max(1, 512 // triton.next_power_of_2(N)))


@triton.jit
def _row(base, t, end, row_stride, columns, count):
    """Row t of a tensor in float32; zeros past the end."""
    at = (t + tl.zeros((), tl.int64)) * row_stride + columns
    return tl.load(base + at, (columns < count) & (t < end), other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["total_rows", "num_requests", "num_places", "segment_tokens"])
def _scan_kernel(
    out_ptr,
    final_ptr,
    work_ptr,
    steps_ptr,
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    initial_ptr,
    cu_ptr,
    total_rows,
    num_requests,
    segment_tokens,
    num_places,
    channels,
    per_group,
    out_row,
    x_row,
    z_row,
    dt_row,
    A_row,
    B_row,
    B_group,
    C_row,
    C_group,
    SUMMARY: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHANNELS: tl.constexpr,
    CLEAR: tl.constexpr,
):
    """SUMMARY: the first kernel. A block of channels never spans two groups."""
    group = tl.program_id(2)
    local = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    # Channels past the group's end read and write nothing.
    columns = tl.where(local < per_group, group * per_group + local, channels)
    inside = columns < channels
    place = tl.program_id(1)
    n = tl.arange(0, BLOCK_N)
    if SUMMARY:
        request = find_request(cu_ptr, num_requests, place, segment_tokens, 0)
        begin = tl.load(cu_ptr + request)
        stop = tl.load(cu_ptr + request + 1)
        segment = place - begin // segment_tokens
        first = begin + segment * segment_tokens
        end = first + segment_tokens
        if end >= stop:
            return
    else:
        if place >= num_places:
            owned = tl.load(cu_ptr + num_requests)
            nothing = tl.zeros((CHANNELS,), tl.float32).to(out_ptr.dtype.element_ty)
            for row in range(owned + place - num_places, total_rows, CLEAR):
                tl.store(out_ptr + (row + tl.zeros((), tl.int64)) * out_row + columns, nothing, inside)
            return
        request, segment, first, end, stop = locate(cu_ptr, num_requests, place, segment_tokens)
        if segment > 0 and first >= stop:
            return
    cell = columns[:, None] * N + n[None, :]
    live = inside[:, None] & (n < N)[None, :]
    a = tl.load(A_ptr + columns[:, None] * A_row + n[None, :], live, other=0.0).to(tl.float32) * LOG2E
    own = request.to(tl.int64) * channels * N
    h = tl.zeros((CHANNELS, BLOCK_N), tl.float32)
    if not SUMMARY:
        if HAS_INITIAL:
            h = tl.load(initial_ptr + own + cell, live, other=0.0).to(tl.float32)
        work = (tl.load(cu_ptr + request) // segment_tokens).to(tl.int64) * channels
        for earlier in range(0, segment):
            slot = work + earlier * channels
            past = tl.load(steps_ptr + slot + columns, inside, other=0.0)
            h = h * tl.exp2(past[:, None] * a) + tl.load(work_ptr + slot * N + cell, live, other=0.0)
    bias = tl.zeros((CHANNELS,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, inside, other=0.0).to(tl.float32)
    skip = tl.zeros((CHANNELS,), tl.float32)
    if HAS_D:
        skip = tl.load(D_ptr + columns, inside, other=0.0).to(tl.float32)
    steps = tl.zeros((CHANNELS,), tl.float32)
    b_base = B_ptr + group * B_group
    c_base = C_ptr + group * C_group
    x = _row(x_ptr, first, end, x_row, columns, channels)
    dt = _row(dt_ptr, first, end, dt_row, columns, channels)
    b = _row(b_base, first, end, B_row, n, N)
    if not SUMMARY:
        c = _row(c_base, first, end, C_row, n, N)
        if HAS_Z:
            z = _row(z_ptr, first, end, z_row, columns, channels)
    for t in range(first, end):
        step = dt + bias
        if SOFTPLUS:
            step = softplus(step)
        step = tl.maximum(step, 0.0)
        h = h * tl.exp2(step[:, None] * a) + (step * x)[:, None] * b[None, :]
        dt = _row(dt_ptr, t + 1, end, dt_row, columns, channels)
        b = _row(b_base, t + 1, end, B_row, n, N)
        if SUMMARY:
            steps += step
            x = _row(x_ptr, t + 1, end, x_row, columns, channels)
        else:
            y = tl.sum(h * c[None, :], 1) + skip * x
            x = _row(x_ptr, t + 1, end, x_row, columns, channels)
            c = _row(c_base, t + 1, end, C_row, n, N)
            if HAS_Z:
                y *= silu(z)
                z = _row(z_ptr, t + 1, end, z_row, columns, channels)
            tl.store(out_ptr + (t + tl.zeros((), tl.int64)) * out_row + columns, y.to(out_ptr.dtype.element_ty), inside)
    if SUMMARY:
        slot = place.to(tl.int64) * channels
        tl.store(work_ptr + slot * N + cell, h, live)
        tl.store(steps_ptr + slot + columns, steps, inside)
    else:
        if end == stop:
            tl.store(final_ptr + own + cell, h.to(final_ptr.dtype.element_ty), live)


def launch(
    out: Tensor,
    out_states: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    cu_seqlens: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    dt_softplus: bool,
) -> None:
    """Launches both kernels; grids depend on shapes alone, what has nothing to do returns at once."""
    T, channels = x.shape
    N, G = A.shape[1], B.shape[1]
    requests = len(cu_seqlens) - 1
    if channels == 0 or (T == 0 and requests == 0):
        return
    config = configure(N)
    blocks = triton.cdiv(channels // G, config.channels)
    wanted = max(1, min(config.resident * num_sms(x.device) // (blocks * G), MOST_SEGMENTS))
    segment = triton.cdiv(max(T, 1), wanted)
    before = T // segment if requests else 0
    work = torch.empty((before, channels, N), dtype=torch.float32, device=x.device)
    steps = torch.empty((before, channels), dtype=torch.float32, device=x.device)
    places = before + requests
    for summary, grid in ((True, (blocks, before, G)), (False, (blocks, places + CLEARING, G))):
        if 0 in grid:
            continue
        _scan_kernel[grid](
            out,
            out_states,
            work,
            steps,
            x,
            dt,
            A,
            B,
            C,
            A if D is None else D,
            x if z is None else z,
            A if dt_bias is None else dt_bias,
            out_states if initial_states is None else initial_states,
            cu_seqlens,
            T,
            requests,
            segment,
            places,
            channels,
            channels // G,
            out.stride(0),
            x.stride(0),
            (x if z is None else z).stride(0),
            dt.stride(0),
            A.stride(0),
            *B.stride()[:2],
            *C.stride()[:2],
            SUMMARY=summary,
            HAS_D=D is not None,
            HAS_Z=z is not None,
            HAS_BIAS=dt_bias is not None,
            HAS_INITIAL=initial_states is not None,
            SOFTPLUS=dt_softplus,
            N=N,
            BLOCK_N=triton.next_power_of_2(N),
            CHANNELS=config.channels,
            CLEAR=CLEARING,
            num_warps=1,
        )
