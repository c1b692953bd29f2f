"""Two kernels. A program walks one segment of a request, chunk by chunk, for one or two heads whose B and C it reads once.

The first kernel gives the state that every segment but a request's last would leave if it began with zeros, and its decay. The
second adds up what the segments before its own left, and computes. Where no request is longer than a segment the first has
nothing to do. The state stays in registers in float32; sums are made in one order, so results repeat bit for bit.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.core.device import num_sms
from penstock.core.tuning import tuned
from penstock.ops.recurrent._segments_triton import LOG2E, REQUESTS, find_request, locate, silu, softplus

# Programs that clear the rows after the last request.
CLEARING = 8
# The prologue of the second kernel adds the states of all segments before its own.
MOST_SEGMENTS = 16


@dataclass(frozen=True)
class Launch:
    """Tokens of a chunk, heads of a program, warps, stages of the load pipeline, programs that share a multiprocessor."""

    chunk: int
    heads: int
    num_warps: int
    num_stages: int
    resident: int


def candidates(itemsize: int, P: int, N: int, pairs: bool) -> Iterator[Launch]:
    """One or two heads, chunks of 64 or 128."""
    if itemsize == 4:
        return
    for chunk, num_warps, num_stages, resident in ((64, 4, 1, 3), (64, 4, 2, 2), (64, 8, 2, 1), (128, 8, 1, 1), (128, 8, 2, 1)):
        for heads in (1, 2) if pairs and P <= 64 and N <= 128 else (1,):
            yield Launch(chunk, heads, num_warps, num_stages, resident)


@tuned(candidates)
def configure(itemsize: int, P: int, N: int, pairs: bool) -> Launch:
    """The default.

    Args:
        itemsize: bytes of a value.
        P, N: rounded up to powers of two.
        pairs: whether two neighbouring heads always share a group.
    """
    if itemsize == 4:
        # Products run on the CUDA cores, which hold whole operands in registers.
        return Launch(16, 1, 8, 1, 1)
    if P > 64 or N > 128:
        return Launch(64, 1, 8, 1, 1)
    return Launch(64, 2 if pairs else 1, 4, 1, 2)


def segment_length(total: int, requests: int, programs: int, slots: int, chunk: int) -> int:
    """Tokens of a segment: as few segments as fill the device, each of whole chunks.

    Args:
        programs: that one segment needs.
        slots: programs that run at once.
    """
    wanted = max(1, min(slots // programs, MOST_SEGMENTS))
    # Requests that already fill the device are not cut.
    return max(chunk, triton.cdiv(triton.cdiv(total, wanted), chunk) * chunk)


@triton.jit
def _raw(dt_ptr, dt_row, head, rows, end):
    return tl.load(dt_ptr + rows.to(tl.int64) * dt_row + head, rows < end, other=0.0)


@triton.jit
def _steps(raw, bias, rows, end, dt_min, dt_max, SOFTPLUS: tl.constexpr):
    """The steps of a chunk in float32; tokens past the end have none."""
    step = raw.to(tl.float32) + bias
    if SOFTPLUS:
        step = softplus(step)
    step = tl.minimum(tl.maximum(step, dt_min), dt_max)
    return tl.where(rows < end, step, 0.0)


@triton.jit
def _scalar(ptr, head, HAS: tl.constexpr):
    if HAS:
        return tl.load(ptr + head).to(tl.float32)
    else:
        return 0.0


@triton.jit
def _tile(base, rows, row_stride, columns, count, end):
    """Rows × columns of a tensor whose last dimension is dense; zeros outside."""
    at = rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    return tl.load(base + at, (rows < end)[:, None] & (columns < count)[None, :], other=0.0)


@triton.jit
def _take_in(h, x, b, step, total, left, PRECISION: tl.constexpr):
    """The state after a chunk: h · exp2(left) + Σ step · exp2(left - total) · x ⊗ b."""
    weight = step * tl.exp2(left - total)
    taken = (x.to(tl.float32) * weight[:, None]).to(x.dtype)
    return tl.dot(tl.trans(taken), b, h * tl.exp2(left), input_precision=PRECISION)


@triton.jit
def _give_out(h, scores, c, x, step, total, PRECISION: tl.constexpr):
    """y of a chunk: (c · h) · exp2(total) + (scores ∘ decay ∘ step) · x."""
    order = tl.arange(0, scores.shape[0])
    gap = total[:, None] - total[None, :]
    # Above the diagonal the gap is positive; exp2 of minus infinity is zero.
    decay = tl.exp2(tl.where(order[:, None] >= order[None, :], gap, float("-inf")))
    weights = (scores * decay * step[None, :]).to(x.dtype)
    outer = tl.dot(c, tl.trans(h.to(c.dtype)), input_precision=PRECISION) * tl.exp2(total)[:, None]
    return tl.dot(weights, x, outer, input_precision=PRECISION)


@triton.jit
def _segment_states_kernel(
    work_ptr,
    decay_ptr,
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    bias_ptr,
    cu_ptr,
    num_requests,
    H,
    x_row,
    x_head,
    dt_row,
    B_row,
    B_group,
    dt_min,
    dt_max,
    SEGMENT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_B: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(0) * HEADS
    place = tl.program_id(1)
    # The segments that are followed by another are numbered without gaps: request b's begin at cu_seqlens[b] // SEGMENT.
    request = find_request(cu_ptr, num_requests, place, SEGMENT, 0, BLOCK_B)
    begin = tl.load(cu_ptr + request)
    stop = tl.load(cu_ptr + request + 1)
    first = begin + (place - begin // SEGMENT) * SEGMENT
    end = first + SEGMENT
    if end >= stop:
        return
    p = tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    order = tl.arange(0, CHUNK)
    x_base = x_ptr + head * x_head
    b_base = B_ptr + head // PER_GROUP * B_group
    a0 = tl.load(A_ptr + head).to(tl.float32) * LOG2E
    bias0 = _scalar(bias_ptr, head, HAS_BIAS)
    h0 = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    sum0 = 0.0
    raw0 = _raw(dt_ptr, dt_row, head, first + order, end)
    if HEADS == 2:
        a1 = tl.load(A_ptr + head + 1).to(tl.float32) * LOG2E
        bias1 = _scalar(bias_ptr, head + 1, HAS_BIAS)
        h1 = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
        sum1 = 0.0
        raw1 = _raw(dt_ptr, dt_row, head + 1, first + order, end)
    for at in tl.range(first, end, CHUNK, num_stages=STAGES):
        rows = at + order
        b = _tile(b_base, rows, B_row, n, N, end)
        x0 = _tile(x_base, rows, x_row, p, P, end)
        step0 = _steps(raw0, bias0, rows, end, dt_min, dt_max, SOFTPLUS)
        raw0 = _raw(dt_ptr, dt_row, head, rows + CHUNK, end)
        total0 = tl.cumsum(step0 * a0, 0)
        left0 = tl.sum(step0 * a0, 0)
        h0 = _take_in(h0, x0, b, step0, total0, left0, PRECISION)
        sum0 += left0
        if HEADS == 2:
            x1 = _tile(x_base + x_head, rows, x_row, p, P, end)
            step1 = _steps(raw1, bias1, rows, end, dt_min, dt_max, SOFTPLUS)
            raw1 = _raw(dt_ptr, dt_row, head + 1, rows + CHUNK, end)
            total1 = tl.cumsum(step1 * a1, 0)
            left1 = tl.sum(step1 * a1, 0)
            h1 = _take_in(h1, x1, b, step1, total1, left1, PRECISION)
            sum1 += left1
    slot = place.to(tl.int64) * H + head
    inside = (p < P)[:, None] & (n < N)[None, :]
    cell = p[:, None] * N + n[None, :]
    tl.store(work_ptr + slot * (P * N) + cell, h0, inside)
    tl.store(decay_ptr + slot, sum0)
    if HEADS == 2:
        tl.store(work_ptr + (slot + 1) * (P * N) + cell, h1, inside)
        tl.store(decay_ptr + slot + 1, sum1)


@triton.jit
def _entering(initial_ptr, work_ptr, decay_ptr, own, place, segment, H, cell, inside, SIZE: tl.constexpr, HAS_INITIAL: tl.constexpr):
    """The state at the start of a segment of one head: the initial one, decayed, and what each segment before it left.

    Args:
        own: request · H + head.
        place: of the request's first segment in the work space, · H + head.
    """
    if HAS_INITIAL:
        h = tl.load(initial_ptr + own * SIZE + cell, inside, other=0.0).to(tl.float32)
    else:
        h = cell.to(tl.float32) * 0.0
    for earlier in range(0, segment):
        slot = place + earlier * H
        left = tl.load(work_ptr + slot * SIZE + cell, inside, other=0.0)
        h = h * tl.exp2(tl.load(decay_ptr + slot)) + left
    return h


@triton.jit
def _put(out_base, x_base, z_base, y, x, d, rows, out_row, x_row, z_row, columns, count, end, HAS_D: tl.constexpr, HAS_Z: tl.constexpr):
    """Stores y with the skip connection and the gate."""
    if HAS_D:
        y += d * x.to(tl.float32)
    if HAS_Z:
        y *= silu(_tile(z_base, rows, z_row, columns, count, end).to(tl.float32))
    at = rows.to(tl.int64)[:, None] * out_row + columns[None, :]
    tl.store(out_base + at, y.to(x.dtype), (rows < end)[:, None] & (columns < count)[None, :])


@triton.jit
def _ssd_kernel(
    out_ptr,
    final_ptr,
    work_ptr,
    decay_ptr,
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
    num_places,
    H,
    out_row,
    out_head,
    x_row,
    x_head,
    z_row,
    z_head,
    dt_row,
    B_row,
    B_group,
    C_row,
    C_group,
    dt_min,
    dt_max,
    SEGMENT: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    CLEAR: tl.constexpr,
    BLOCK_B: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(0) * HEADS
    place = tl.program_id(1)
    p = tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    order = tl.arange(0, CHUNK)
    out_base = out_ptr + head * out_head
    if place >= num_places:
        owned = tl.load(cu_ptr + num_requests)
        nothing = tl.zeros((CHUNK, BLOCK_P), tl.float32).to(out_ptr.dtype.element_ty)
        for base in range(owned + (place - num_places) * CHUNK, total_rows, CLEAR * CHUNK):
            rows = base + order
            at = rows.to(tl.int64)[:, None] * out_row + p[None, :]
            mask = (rows < total_rows)[:, None] & (p < P)[None, :]
            tl.store(out_base + at, nothing, mask)
            if HEADS == 2:
                tl.store(out_base + out_head + at, nothing, mask)
        return
    request, segment, first, end, stop = locate(cu_ptr, num_requests, place, SEGMENT, BLOCK_B)
    if segment > 0 and first >= stop:
        return
    x_base = x_ptr + head * x_head
    z_base = z_ptr + head * z_head
    b_base = B_ptr + head // PER_GROUP * B_group
    c_base = C_ptr + head // PER_GROUP * C_group
    cell = p[:, None] * N + n[None, :]
    inside = (p < P)[:, None] & (n < N)[None, :]
    own = request.to(tl.int64) * H + head
    work = (tl.load(cu_ptr + request) // SEGMENT).to(tl.int64) * H + head
    a0 = tl.load(A_ptr + head).to(tl.float32) * LOG2E
    bias0, d0 = _scalar(bias_ptr, head, HAS_BIAS), _scalar(D_ptr, head, HAS_D)
    h0 = _entering(initial_ptr, work_ptr, decay_ptr, own, work, segment, H, cell, inside, P * N, HAS_INITIAL)
    raw0 = _raw(dt_ptr, dt_row, head, first + order, end)
    if HEADS == 2:
        a1 = tl.load(A_ptr + head + 1).to(tl.float32) * LOG2E
        bias1, d1 = _scalar(bias_ptr, head + 1, HAS_BIAS), _scalar(D_ptr, head + 1, HAS_D)
        h1 = _entering(initial_ptr, work_ptr, decay_ptr, own + 1, work + 1, segment, H, cell, inside, P * N, HAS_INITIAL)
        raw1 = _raw(dt_ptr, dt_row, head + 1, first + order, end)
    for at in tl.range(first, end, CHUNK, num_stages=STAGES):
        rows = at + order
        b = _tile(b_base, rows, B_row, n, N, end)
        c = _tile(c_base, rows, C_row, n, N, end)
        scores = tl.dot(c, tl.trans(b), input_precision=PRECISION)
        x0 = _tile(x_base, rows, x_row, p, P, end)
        step0 = _steps(raw0, bias0, rows, end, dt_min, dt_max, SOFTPLUS)
        raw0 = _raw(dt_ptr, dt_row, head, rows + CHUNK, end)
        total0 = tl.cumsum(step0 * a0, 0)
        left0 = tl.sum(step0 * a0, 0)
        y0 = _give_out(h0, scores, c, x0, step0, total0, PRECISION)
        h0 = _take_in(h0, x0, b, step0, total0, left0, PRECISION)
        _put(out_base, x_base, z_base, y0, x0, d0, rows, out_row, x_row, z_row, p, P, end, HAS_D, HAS_Z)
        if HEADS == 2:
            x1 = _tile(x_base + x_head, rows, x_row, p, P, end)
            step1 = _steps(raw1, bias1, rows, end, dt_min, dt_max, SOFTPLUS)
            raw1 = _raw(dt_ptr, dt_row, head + 1, rows + CHUNK, end)
            total1 = tl.cumsum(step1 * a1, 0)
            left1 = tl.sum(step1 * a1, 0)
            y1 = _give_out(h1, scores, c, x1, step1, total1, PRECISION)
            h1 = _take_in(h1, x1, b, step1, total1, left1, PRECISION)
            _put(
                out_base + out_head, x_base, z_base + z_head, y1, x1, d1, rows, out_row, x_row, z_row, p, P, end, HAS_D, HAS_Z
            )
    if end == stop:
        dtype = final_ptr.dtype.element_ty
        tl.store(final_ptr + own * (P * N) + cell, h0.to(dtype), inside)
        if HEADS == 2:
            tl.store(final_ptr + (own + 1) * (P * N) + cell, h1.to(dtype), inside)


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
    dt_min: float,
    dt_max: float,
) -> None:
    """Launches both kernels; grids depend on shapes alone, what has nothing to do returns at once."""
    T, H, P = x.shape
    G, N = B.shape[1:]
    requests = len(cu_seqlens) - 1
    if H == 0 or (T == 0 and requests == 0):
        return
    block_p, block_n = max(16, triton.next_power_of_2(P)), max(16, triton.next_power_of_2(N))
    config = configure.on(x.device, x.element_size(), block_p, block_n, H // G % 2 == 0)
    programs = H // config.heads
    segment = segment_length(T, requests, programs, config.resident * num_sms(x.device), config.chunk)
    before = T // segment if requests else 0
    work = torch.empty((before, H, P, N), dtype=torch.float32, device=x.device)
    decay = torch.empty((before, H), dtype=torch.float32, device=x.device)
    shared = {
        "SEGMENT": segment,
        "HAS_BIAS": dt_bias is not None,
        "SOFTPLUS": dt_softplus,
        "PER_GROUP": H // G,
        "HEADS": config.heads,
        "P": P,
        "N": N,
        "BLOCK_P": block_p,
        "BLOCK_N": block_n,
        "CHUNK": config.chunk,
        "BLOCK_B": min(triton.next_power_of_2(max(requests, 1)), REQUESTS),
        "STAGES": config.num_stages,
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
        "num_warps": config.num_warps,
    }
    bias = A if dt_bias is None else dt_bias
    if before:
        _segment_states_kernel[(programs, before)](
            work,
            decay,
            x,
            dt,
            A,
            B,
            bias,
            cu_seqlens,
            requests,
            H,
            x.stride(0),
            x.stride(1),
            dt.stride(0),
            *B.stride()[:2],
            dt_min,
            dt_max,
            **shared,
        )
    places = before + requests
    _ssd_kernel[(programs, places + CLEARING)](
        out,
        out_states,
        work,
        decay,
        x,
        dt,
        A,
        B,
        C,
        A if D is None else D,
        x if z is None else z,
        bias,
        out_states if initial_states is None else initial_states,
        cu_seqlens,
        T,
        requests,
        places,
        H,
        *out.stride()[:2],
        *x.stride()[:2],
        *(x if z is None else z).stride()[:2],
        dt.stride(0),
        *B.stride()[:2],
        *C.stride()[:2],
        dt_min,
        dt_max,
        HAS_D=D is not None,
        HAS_Z=z is not None,
        HAS_INITIAL=initial_states is not None,
        CLEAR=CLEARING,
        **shared,
    )
