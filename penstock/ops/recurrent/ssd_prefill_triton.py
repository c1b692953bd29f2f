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
from penstock.ops.recurrent._segments_triton import LOG2E, find_request, locate, silu, softplus

# A head wider than this is cut in two: its state would not fit in the registers of a program.
WIDEST = 64
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
    """One or two heads; fewer stages let more programs share a multiprocessor."""
    if itemsize == 4:
        return
    if N > 128:
        yield from (Launch(64, 1, 8, stages, 1) for stages in (1, 2))
        return
    for num_stages, resident in ((1, 2), (2, 2), (3, 1)):
        yield Launch(64, 1, 4, num_stages, resident)
    if pairs:
        yield from (Launch(64, 2, 8, stages, 1) for stages in (1, 2))


@tuned(candidates)
def configure(itemsize: int, P: int, N: int, pairs: bool) -> Launch:
    """The default.

    Args:
        itemsize: bytes of a value.
        P, N: of a program, rounded up to powers of two.
        pairs: whether two neighbouring heads always share a group.
    """
    if itemsize == 4:
        # Products run on the CUDA cores, which hold whole operands in registers.
        return Launch(16, 1, 8, 1, 1)
    if N > 128:
        return Launch(64, 1, 8, 2, 1)
    return Launch(64, 1, 4, 2, 2)


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
def _part(ptr, head, stride, P: tl.constexpr, SPLIT: tl.constexpr):
    """Where a head begins, or one of the SPLIT parts that a wide head is cut into."""
    return ptr + (head // SPLIT) * stride + (head % SPLIT) * P


@triton.jit
def _raw(dt_ptr, dt_row, head, rows, end):
    return tl.load(dt_ptr + rows.to(tl.int64) * dt_row + head, rows < end, other=0.0)


@triton.jit
def _steps(raw, a, bias, left, dt_min, dt_max, SOFTPLUS: tl.constexpr):
    """(running decay in powers of two, step, decay of the chunk) of a chunk; tokens past the `left` that are there have no step."""
    step = raw.to(tl.float32) + bias
    if SOFTPLUS:
        step = softplus(step)
    step = tl.minimum(tl.maximum(step, dt_min), dt_max)
    step = tl.where(tl.arange(0, raw.shape[0]) < left, step, 0.0)
    # A sum of one term: the compiler computes what it can again in every layout in which it is needed, all the way from the
    # load, but not through a reduction. Without it the copies took the registers of the state.
    step = tl.sum(step[:, None], 1)
    return tl.cumsum(step * a, 0), step, tl.sum(step * a, 0)


@triton.jit
def _scalar(ptr, head, HAS: tl.constexpr):
    if HAS:
        return tl.load(ptr + head).to(tl.float32)
    else:
        return 0.0


@triton.jit
def _tile(base, at, end, row_stride, order, columns, COUNT: tl.constexpr):
    """Rows at … at + len(order) - 1, below end, of a tensor whose last dimension is dense; zeros outside."""
    # One 64-bit product for the tile: products for each row would take registers that the state needs.
    inner = order[:, None] * row_stride + columns[None, :]
    mask = (order < end - at)[:, None]
    if columns.shape[0] != COUNT:
        mask = mask & (columns < COUNT)[None, :]
    return tl.load(base + (at + tl.zeros((), tl.int64)) * row_stride + inner, mask, other=0.0)


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


@triton.jit(do_not_specialize=["num_requests", "segment_tokens"])
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
    segment_tokens,
    H,
    x_row,
    x_head,
    dt_row,
    B_row,
    B_group,
    dt_min,
    dt_max,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(0) * HEADS
    place = tl.program_id(1)
    # The segments that are followed by another are numbered without gaps: request b's begin at cu_seqlens[b] // segment_tokens.
    request = find_request(cu_ptr, num_requests, place, segment_tokens, 0)
    begin = tl.load(cu_ptr + request)
    stop = tl.load(cu_ptr + request + 1)
    first = begin + (place - begin // segment_tokens) * segment_tokens
    end = first + segment_tokens
    if end >= stop:
        return
    p = tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    order = tl.arange(0, CHUNK)
    x_base = _part(x_ptr, head, x_head, P, SPLIT)
    b_base = B_ptr + head // PER_GROUP * B_group
    own0 = head // SPLIT
    a0 = tl.load(A_ptr + own0).to(tl.float32) * LOG2E
    bias0 = _scalar(bias_ptr, own0, HAS_BIAS)
    h0 = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    sum0 = 0.0
    raw0 = _raw(dt_ptr, dt_row, own0, first + order, end)
    next0 = _tile(x_base, first, end, x_row, order, p, P)
    if HEADS == 2:
        own1 = (head + 1) // SPLIT
        x_next = _part(x_ptr, head + 1, x_head, P, SPLIT)
        a1 = tl.load(A_ptr + own1).to(tl.float32) * LOG2E
        bias1 = _scalar(bias_ptr, own1, HAS_BIAS)
        h1 = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
        sum1 = 0.0
        raw1 = _raw(dt_ptr, dt_row, own1, first + order, end)
        next1 = _tile(x_next, first, end, x_row, order, p, P)
    for at in tl.range(first, end, CHUNK, num_stages=STAGES):
        rows = at + order
        b = _tile(b_base, at, end, B_row, order, n, N)
        x0 = next0
        next0 = _tile(x_base, at + CHUNK, end, x_row, order, p, P)
        total0, step0, left0 = _steps(raw0, a0, bias0, end - at, dt_min, dt_max, SOFTPLUS)
        raw0 = _raw(dt_ptr, dt_row, own0, rows + CHUNK, end)
        h0 = _take_in(h0, x0, b, step0, total0, left0, PRECISION)
        sum0 += left0
        if HEADS == 2:
            x1 = next1
            next1 = _tile(x_next, at + CHUNK, end, x_row, order, p, P)
            total1, step1, left1 = _steps(raw1, a1, bias1, end - at, dt_min, dt_max, SOFTPLUS)
            raw1 = _raw(dt_ptr, dt_row, own1, rows + CHUNK, end)
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
def _entering(
    initial_ptr, work_ptr, decay_ptr, own, place, segment, H, cell, inside, SIZE: tl.constexpr, HAS_INITIAL: tl.constexpr
):
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
def _put(
    out_base, z_base, y, x, d, at, end, out_row, z_row, order, p, P: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr
):
    """Stores y with the skip connection and the gate."""
    if HAS_D:
        y += d * x.to(tl.float32)
    if HAS_Z:
        y *= silu(_tile(z_base, at, end, z_row, order, p, P).to(tl.float32))
    mask = (order < end - at)[:, None]
    if p.shape[0] != P:
        mask = mask & (p < P)[None, :]
    inner = order[:, None] * out_row + p[None, :]
    tl.store(out_base + (at + tl.zeros((), tl.int64)) * out_row + inner, y.to(x.dtype), mask)


@triton.jit(do_not_specialize=["total_rows", "num_requests", "num_places", "segment_tokens"])
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
    segment_tokens,
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
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    CLEAR: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(0) * HEADS
    place = tl.program_id(1)
    p = tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    order = tl.arange(0, CHUNK)
    out_base = _part(out_ptr, head, out_head, P, SPLIT)
    if place >= num_places:
        owned = tl.load(cu_ptr + num_requests)
        nothing = tl.zeros((CHUNK, BLOCK_P), tl.float32).to(out_ptr.dtype.element_ty)
        for base in range(owned + (place - num_places) * CHUNK, total_rows, CLEAR * CHUNK):
            rows = base + order
            at = rows.to(tl.int64)[:, None] * out_row + p[None, :]
            mask = (rows < total_rows)[:, None] & (p < P)[None, :]
            tl.store(out_base + at, nothing, mask)
            if HEADS == 2:
                tl.store(_part(out_ptr, head + 1, out_head, P, SPLIT) + at, nothing, mask)
        return
    request, segment, first, end, stop = locate(cu_ptr, num_requests, place, segment_tokens)
    if segment > 0 and first >= stop:
        return
    x_base, z_base = _part(x_ptr, head, x_head, P, SPLIT), _part(z_ptr, head, z_head, P, SPLIT)
    own0 = head // SPLIT
    b_base = B_ptr + head // PER_GROUP * B_group
    c_base = C_ptr + head // PER_GROUP * C_group
    cell = p[:, None] * N + n[None, :]
    inside = (p < P)[:, None] & (n < N)[None, :]
    own = request.to(tl.int64) * H + head
    work = (tl.load(cu_ptr + request) // segment_tokens).to(tl.int64) * H + head
    a0 = tl.load(A_ptr + own0).to(tl.float32) * LOG2E
    bias0, d0 = _scalar(bias_ptr, own0, HAS_BIAS), _scalar(D_ptr, own0, HAS_D)
    h0 = _entering(initial_ptr, work_ptr, decay_ptr, own, work, segment, H, cell, inside, P * N, HAS_INITIAL)
    raw0 = _raw(dt_ptr, dt_row, own0, first + order, end)
    next0 = _tile(x_base, first, end, x_row, order, p, P)
    if HEADS == 2:
        own1 = (head + 1) // SPLIT
        x_next = _part(x_ptr, head + 1, x_head, P, SPLIT)
        z_next, out_next = _part(z_ptr, head + 1, z_head, P, SPLIT), _part(out_ptr, head + 1, out_head, P, SPLIT)
        a1 = tl.load(A_ptr + own1).to(tl.float32) * LOG2E
        bias1, d1 = _scalar(bias_ptr, own1, HAS_BIAS), _scalar(D_ptr, own1, HAS_D)
        h1 = _entering(initial_ptr, work_ptr, decay_ptr, own + 1, work + 1, segment, H, cell, inside, P * N, HAS_INITIAL)
        raw1 = _raw(dt_ptr, dt_row, own1, first + order, end)
        next1 = _tile(x_next, first, end, x_row, order, p, P)
    for at in tl.range(first, end, CHUNK, num_stages=STAGES):
        rows = at + order
        b = _tile(b_base, at, end, B_row, order, n, N)
        c = _tile(c_base, at, end, C_row, order, n, N)
        scores = tl.dot(c, tl.trans(b), input_precision=PRECISION)
        x0 = next0
        next0 = _tile(x_base, at + CHUNK, end, x_row, order, p, P)
        total0, step0, left0 = _steps(raw0, a0, bias0, end - at, dt_min, dt_max, SOFTPLUS)
        raw0 = _raw(dt_ptr, dt_row, own0, rows + CHUNK, end)
        y0 = _give_out(h0, scores, c, x0, step0, total0, PRECISION)
        h0 = _take_in(h0, x0, b, step0, total0, left0, PRECISION)
        _put(out_base, z_base, y0, x0, d0, at, end, out_row, z_row, order, p, P, HAS_D, HAS_Z)
        if HEADS == 2:
            x1 = next1
            next1 = _tile(x_next, at + CHUNK, end, x_row, order, p, P)
            total1, step1, left1 = _steps(raw1, a1, bias1, end - at, dt_min, dt_max, SOFTPLUS)
            raw1 = _raw(dt_ptr, dt_row, own1, rows + CHUNK, end)
            y1 = _give_out(h1, scores, c, x1, step1, total1, PRECISION)
            h1 = _take_in(h1, x1, b, step1, total1, left1, PRECISION)
            _put(out_next, z_next, y1, x1, d1, at, end, out_row, z_row, order, p, P, HAS_D, HAS_Z)
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
    T = x.shape[0]
    # A head wider than 64 is cut in two, each part a head of its own to the kernels.
    split = 2 if x.shape[2] > WIDEST else 1
    H, P = x.shape[1] * split, x.shape[2] // split
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
        "HAS_BIAS": dt_bias is not None,
        "SOFTPLUS": dt_softplus,
        "PER_GROUP": H // G,
        "SPLIT": split,
        "HEADS": config.heads,
        "P": P,
        "N": N,
        "BLOCK_P": block_p,
        "BLOCK_N": block_n,
        "CHUNK": config.chunk,
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
            segment,
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
        segment,
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
