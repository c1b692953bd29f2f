"""Three kernels: the steps of all chunks; what every segment but a request's last would leave of zeros; the results.

A program of the second and third walks one segment of a request for one head, chunk by chunk, its state [N, P] in registers in
float32. The third adds up what the segments before its own left. Where no request is longer than a segment the second has
nothing to do. Sums are made in one order, so results repeat bit for bit.
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
# The prologue of the third kernel adds the states of all segments before its own.
MOST_SEGMENTS = 16


@dataclass(frozen=True)
class Launch:
    """Tokens of a chunk, warps, stages of the load pipeline, registers of a thread, programs that share a multiprocessor."""

    chunk: int
    num_warps: int
    num_stages: int
    registers: int
    resident: int


def candidates(itemsize: int, N: int) -> Iterator[Launch]:
    """Fewer stages and fewer registers let more programs share a multiprocessor, at the price of spills."""
    if itemsize == 4:
        return
    if N > 128:
        yield from (Launch(64, 8, stages, 255, 1) for stages in (1, 2))
        return
    for num_stages, registers, resident in ((1, 255, 2), (2, 255, 2), (1, 168, 3), (1, 128, 4)):
        yield Launch(64, 4, num_stages, registers, resident)


@tuned(candidates)
def configure(itemsize: int, N: int) -> Launch:
    """The default.

    Args:
        itemsize: bytes of a value.
        N: rounded up to a power of two.
    """
    if itemsize == 4:
        # Products run on the CUDA cores, which hold whole operands in registers.
        return Launch(16, 8, 1, 255, 1)
    if N > 128:
        return Launch(64, 8, 2, 255, 1)
    return Launch(64, 4, 2, 255, 2)


def segment_length(total: int, programs: int, slots: int, chunk: int) -> int:
    """Tokens of a segment: as few segments as fill the device, each of whole chunks.

    Args:
        programs: that one segment needs.
        slots: programs that run at once.
    """
    wanted = max(1, min(slots // programs, MOST_SEGMENTS))
    return max(chunk, triton.cdiv(triton.cdiv(total, wanted), chunk) * chunk)


@triton.jit(do_not_specialize=["num_requests"])
def _steps_kernel(
    step_ptr,
    total_ptr,
    weight_ptr,
    dt_ptr,
    A_ptr,
    bias_ptr,
    cu_ptr,
    num_requests,
    places,
    H,
    dt_row,
    dt_head,
    dt_min,
    dt_max,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Of each token: step; decay from the chunk's start through it, a power of two; step · decay from it to the end."""
    heads = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    place = tl.program_id(1)
    _, _, first, end, stop = locate(cu_ptr, num_requests, place, CHUNK)
    if first >= stop:
        return
    order = tl.arange(0, CHUNK)
    live = heads < H
    at = (first + order).to(tl.int64)[None, :] * dt_row + heads[:, None] * dt_head
    step = tl.load(dt_ptr + at, (first + order < end)[None, :] & live[:, None], other=0.0).to(tl.float32)
    if HAS_BIAS:
        step += tl.load(bias_ptr + heads, live, other=0.0).to(tl.float32)[:, None]
    if SOFTPLUS:
        step = softplus(step)
    step = tl.minimum(tl.maximum(step, dt_min), dt_max)
    # Tokens past the end have no step: they take nothing in and leave the state as it is.
    step = tl.where((first + order < end)[None, :], step, 0.0)
    decay = step * (tl.load(A_ptr + heads, live, other=0.0).to(tl.float32) * LOG2E)[:, None]
    total = tl.cumsum(decay, 1)
    weight = step * tl.exp2(tl.sum(decay, 1)[:, None] - total)
    to = (heads.to(tl.int64) * places + place)[:, None] * CHUNK + order[None, :]
    tl.store(step_ptr + to, step, live[:, None])
    tl.store(total_ptr + to, total, live[:, None])
    tl.store(weight_ptr + to, weight, live[:, None])


@triton.jit
def _part(ptr, head, stride, P: tl.constexpr, SPLIT: tl.constexpr):
    """Where a head begins, or one of the SPLIT parts that a wide head is cut into."""
    return ptr + (head // SPLIT) * stride + (head % SPLIT) * P


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
def _take_in(h, x, b, weight, left, PRECISION: tl.constexpr):
    """The state after a chunk: h · exp2(left) + Σ b ⊗ weight · x."""
    taken = (x.to(tl.float32) * weight[:, None]).to(x.dtype)
    return tl.dot(tl.trans(b), taken, h * tl.exp2(left), input_precision=PRECISION)


@triton.jit(do_not_specialize=["num_requests", "segment_tokens"])
def _segment_states_kernel(
    work_ptr,
    decay_ptr,
    x_ptr,
    B_ptr,
    total_ptr,
    weight_ptr,
    cu_ptr,
    num_requests,
    segment_tokens,
    places,
    H,
    x_row,
    x_head,
    B_row,
    B_group,
    PER_GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(0)
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
    # Which of the chunks of all requests is the first of this segment.
    chunk = begin // CHUNK + request + (first - begin) // CHUNK
    steps = ((head // SPLIT).to(tl.int64) * places + chunk) * CHUNK
    h = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    decay = 0.0
    coming = _tile(x_base, first, end, x_row, order, p, P)
    for at in tl.range(first, end, CHUNK, num_stages=STAGES):
        here = steps + (at - first)
        weight = tl.load(weight_ptr + here + order)
        left = tl.load(total_ptr + here + CHUNK - 1)
        b = _tile(b_base, at, end, B_row, order, n, N)
        x = coming
        coming = _tile(x_base, at + CHUNK, end, x_row, order, p, P)
        h = _take_in(h, x, b, weight, left, PRECISION)
        decay += left
    slot = place.to(tl.int64) * H + head
    tl.store(work_ptr + slot * (P * N) + n[:, None] * P + p[None, :], h, (n < N)[:, None] & (p < P)[None, :])
    tl.store(decay_ptr + slot, decay)


@triton.jit(do_not_specialize=["total_rows", "num_requests", "num_places", "segment_tokens"])
def _ssd_kernel(
    out_ptr,
    final_ptr,
    work_ptr,
    decay_ptr,
    x_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    step_ptr,
    total_ptr,
    weight_ptr,
    initial_ptr,
    cu_ptr,
    total_rows,
    num_requests,
    segment_tokens,
    num_places,
    places,
    H,
    out_row,
    out_head,
    x_row,
    x_head,
    z_row,
    z_head,
    B_row,
    B_group,
    C_row,
    C_group,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    CLEAR: tl.constexpr,
    PER_GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(0)
    place = tl.program_id(1)
    p = tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    order = tl.arange(0, CHUNK)
    dtype = out_ptr.dtype.element_ty
    out_base = _part(out_ptr, head, out_head, P, SPLIT)
    if place >= num_places:
        owned = tl.load(cu_ptr + num_requests)
        nothing = tl.zeros((CHUNK, BLOCK_P), tl.float32).to(dtype)
        for base in range(owned + (place - num_places) * CHUNK, total_rows, CLEAR * CHUNK):
            rows = base + order
            at = rows.to(tl.int64)[:, None] * out_row + p[None, :]
            tl.store(out_base + at, nothing, (rows < total_rows)[:, None] & (p < P)[None, :])
        return
    request, segment, first, end, stop = locate(cu_ptr, num_requests, place, segment_tokens)
    if segment > 0 and first >= stop:
        return
    begin = tl.load(cu_ptr + request)
    x_base, z_base = _part(x_ptr, head, x_head, P, SPLIT), _part(z_ptr, head, z_head, P, SPLIT)
    b_base = B_ptr + head // PER_GROUP * B_group
    c_base = C_ptr + head // PER_GROUP * C_group
    skip = 0.0
    if HAS_D:
        skip = tl.load(D_ptr + head // SPLIT).to(tl.float32)
    chunk = begin // CHUNK + request + (first - begin) // CHUNK
    steps = ((head // SPLIT).to(tl.int64) * places + chunk) * CHUNK

    # The state at the start: the initial one, decayed, and what each segment before this one left.
    inside = (n < N)[:, None] & (p < P)[None, :]
    own = (request.to(tl.int64) * H + head) * (P * N) + p[None, :] * N + n[:, None]
    h = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    if HAS_INITIAL:
        h = tl.load(initial_ptr + own, inside, other=0.0).to(tl.float32)
    work = (begin // segment_tokens).to(tl.int64) * H + head
    for earlier in range(segment):
        slot = work + earlier * H
        past = tl.load(work_ptr + slot * (P * N) + n[:, None] * P + p[None, :], inside, other=0.0)
        h = h * tl.exp2(tl.load(decay_ptr + slot)) + past

    coming = _tile(x_base, first, end, x_row, order, p, P)
    for at in tl.range(first, end, CHUNK, num_stages=STAGES):
        here = steps + (at - first)
        total = tl.load(total_ptr + here + order)
        step = tl.load(step_ptr + here + order)
        weight = tl.load(weight_ptr + here + order)
        left = tl.load(total_ptr + here + CHUNK - 1)
        b = _tile(b_base, at, end, B_row, order, n, N)
        c = _tile(c_base, at, end, C_row, order, n, N)
        x = coming
        coming = _tile(x_base, at + CHUNK, end, x_row, order, p, P)
        scores = tl.dot(c, tl.trans(b), input_precision=PRECISION)
        # Above the diagonal the gap is positive; exp2 of minus infinity is zero.
        gap = tl.where(order[:, None] >= order[None, :], total[:, None] - total[None, :], float("-inf"))
        mixed = (scores * tl.exp2(gap) * step[None, :]).to(dtype)
        y = tl.dot(c, h.to(dtype), input_precision=PRECISION) * tl.exp2(total)[:, None]
        y = tl.dot(mixed, x, y, input_precision=PRECISION)
        h = _take_in(h, x, b, weight, left, PRECISION)
        if HAS_D:
            y += skip * x.to(tl.float32)
        if HAS_Z:
            y *= silu(_tile(z_base, at, end, z_row, order, p, P).to(tl.float32))
        mask = (order < end - at)[:, None]
        if BLOCK_P != P:
            mask = mask & (p < P)[None, :]
        inner = order[:, None] * out_row + p[None, :]
        tl.store(out_base + (at + tl.zeros((), tl.int64)) * out_row + inner, y.to(dtype), mask)
    if end == stop:
        tl.store(final_ptr + own, h.to(final_ptr.dtype.element_ty), inside)


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
    """Launches the kernels; grids depend on shapes alone, what has nothing to do returns at once."""
    T, heads = x.shape[:2]
    # A head wider than 64 is cut in two, each part a head of its own to the kernels.
    split = 2 if x.shape[2] > WIDEST else 1
    H, P = heads * split, x.shape[2] // split
    G, N = B.shape[1:]
    requests = len(cu_seqlens) - 1
    if H == 0 or (T == 0 and requests == 0):
        return
    block_p, block_n = max(16, triton.next_power_of_2(P)), max(16, triton.next_power_of_2(N))
    config = configure.on(x.device, x.element_size(), block_n)
    segment = segment_length(T, H, config.resident * num_sms(x.device), config.chunk)
    before = T // segment if requests else 0
    chunks = T // config.chunk + requests if requests else 0
    work = torch.empty((before, H, N, P), dtype=torch.float32, device=x.device)
    decay = torch.empty((before, H), dtype=torch.float32, device=x.device)
    step, total, weight = torch.empty((3, heads, chunks, config.chunk), dtype=torch.float32, device=x.device).unbind(0)
    if chunks:
        _steps_kernel[(triton.cdiv(heads, 16), chunks)](
            step,
            total,
            weight,
            dt,
            A,
            A if dt_bias is None else dt_bias,
            cu_seqlens,
            requests,
            chunks,
            heads,
            *dt.stride(),
            dt_min,
            dt_max,
            HAS_BIAS=dt_bias is not None,
            SOFTPLUS=dt_softplus,
            HEADS=16,
            CHUNK=config.chunk,
            num_warps=4,
        )
    shared = {
        "PER_GROUP": H // G,
        "SPLIT": split,
        "P": P,
        "N": N,
        "BLOCK_P": block_p,
        "BLOCK_N": block_n,
        "CHUNK": config.chunk,
        "STAGES": config.num_stages,
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
        "num_warps": config.num_warps,
        "maxnreg": config.registers,
    }
    if before:
        _segment_states_kernel[(H, before)](
            work,
            decay,
            x,
            B,
            total,
            weight,
            cu_seqlens,
            requests,
            segment,
            chunks,
            H,
            *x.stride()[:2],
            *B.stride()[:2],
            **shared,
        )
    places = before + requests
    _ssd_kernel[(H, places + CLEARING)](
        out,
        out_states,
        work,
        decay,
        x,
        B,
        C,
        A if D is None else D,
        x if z is None else z,
        step,
        total,
        weight,
        out_states if initial_states is None else initial_states,
        cu_seqlens,
        T,
        requests,
        segment,
        places,
        chunks,
        H,
        *out.stride()[:2],
        *x.stride()[:2],
        *(x if z is None else z).stride()[:2],
        *B.stride()[:2],
        *C.stride()[:2],
        HAS_D=D is not None,
        HAS_Z=z is not None,
        HAS_INITIAL=initial_states is not None,
        CLEAR=CLEARING,
        **shared,
    )
