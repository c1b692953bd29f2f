"""Split-KV decode on Hopper's tensor cores: keys and head dimension stand where the instruction wants 64 rows.

A product of Hopper has 64 rows, or a multiple, and from 8 columns up. Here S^T = K · Q^T and O^T = V^T · P^T: 64 keys, or 64
dimensions of the values, are the rows; the query heads of one KV head, times q_len, padded to 8 … 64, are the columns. Nothing
of K or V passes through registers: a warp fetches pages through the tensor memory accelerator, a warpgroup multiplies, and P
alone, a few KB, goes through shared memory. Two programs fill a multiprocessor; one's beginning and end hide behind the other.

Work is dealt out as in decode_triton, by the same plan.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from penstock.core.device import H200, has_dependent_launch
from penstock.core.gluon import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    reinterpret,
    thread_barrier,
    tma_load,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from penstock.core.tuning import tuned
from penstock.ops.attention import _load_hopper as load
from penstock.ops.attention import _softmax_hopper as softmax
from penstock.ops.attention import _tiles_hopper as tiles
from penstock.ops.attention import decode_gather_hopper as gather
from penstock.ops.attention import decode_plan
from penstock.ops.attention import decode_work_hopper as work
from penstock.ops.attention._combine_triton import combine, empty_pieces
from penstock.ops.attention._softmax_triton import NO_SCALES, fp8_scales
from penstock.ops.attention._tiles_hopper import Constants

KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8"}
# So that two programs fit on a multiprocessor: half of its 228 KB, less 1 KB that each costs, less barriers and the words that
# reductions exchange.
SHARED = (H200.shared_memory + 1024) // 2 - 1024 - 2048
# Bytes on their way to a program.
FLYING = 32 * 1024
# Of a thread, for 4 + 4 warps twice on a multiprocessor; the fetching warp hands most of its share over.
REGISTERS = 128
# Entries of the page table that the fetching warp holds, one a lane.
LANES = gl.constexpr(32)
UNSPECIALIZED = ["q_scale_token", "q_scale_head", "k_scale_head", "v_scale_head"]
UNSPECIALIZED += ["table_row", "k_pages", "v_pages", "scale_pages", "num_requests", "programs", "left", "right", "cap_scale"]
UNSPECIALIZED += ["score_scale"]


@gluon.jit
def _produce(args, C: gl.constexpr):
    """Fetches keys and values of this program's run of units, and writes the results of requests without keys."""
    (descs, buffers, bars, plan, lengths, table_ptr, table_row, page_steps, num_requests, programs, left, out_ptr, lse_ptr,
     out_token, out_head) = args  # fmt: skip
    k_desc, v_desc, scale_desc = descs
    k_buf, v_buf, scale_buf = buffers
    k_full, k_empty, v_full, v_empty = bars
    k_pages, v_pages, scale_pages = page_steps
    unit_start, first_tile, first_request = plan
    KEY_BYTES: gl.constexpr = C.block_n * C.d * C.itemsize + (C.block_n * 4 if C.token_scales else 0)
    VALUE_BYTES: gl.constexpr = C.block_n * C.dv * C.itemsize
    K_CHUNKS: gl.constexpr = C.d // C.columns
    V_CHUNKS: gl.constexpr = C.dv // C.columns
    layout: gl.constexpr = gl.NVMMASharedLayout(128, C.bits, rank=5)
    k_pieces = reinterpret(k_buf, k_buf.dtype, [C.stages * K_CHUNKS * C.parts, 1, 1, C.span, 1, C.columns], layout)
    if C.kind == "fp8":
        turned: gl.constexpr = gl.NVMMASharedLayout(C.weights_swizzle, 8, rank=3)
        v_pieces = reinterpret(v_buf, v_buf.dtype, [C.stages, 1, C.dv, C.block_n], turned)
    else:
        v_pieces = reinterpret(v_buf, v_buf.dtype, [C.stages * V_CHUNKS * C.parts, 1, 1, C.span, 1, C.columns], layout)
    lane = gl.arange(0, LANES, layout=gl.BlockedLayout([1], [32], [1], [0]))

    head, row_block, program = work.place_of(gl.program_id(0), C)
    request, unit, end = work.share_of(unit_start, first_request, num_requests, program, programs, C)
    kc = gl.to_tensor(0)
    while unit < end:
        unit, _begins, _ends, there, _k_len, first_key, stop_key, low = work.part_of(
            unit_start, first_tile, lengths, request, unit, end, left, C
        )
        if there:
            table = table_ptr + gl.cast(request, gl.int64) * table_row
            pages = lane
            for block in range(work.blocks_of(first_key, stop_key, C)):
                stage = kc % C.stages
                for part in range(C.parts):
                    number = block * C.parts + part
                    if number % LANES == 0:
                        # 32 look-ups at once: the next 31 copies wait for none.
                        ahead = first_key + (number + lane) * C.span
                        pages = gl.load(table + ahead // C.page_size, (ahead < stop_key) & (ahead + C.span > low), other=0)
                    page = gl.sum(gl.where(lane == number % LANES, pages, 0), axis=0)
                    key = first_key + number * C.span
                    inside = tiles.rows_inside(stop_key, key, C.span)
                    if C.has_left:
                        # A server frees the pages that the window has left behind.
                        inside = gl.where(key + C.span <= low, 0, inside)
                    slot = key % C.page_size
                    if part == 0:
                        load.emptied(k_empty, kc, C.stages)
                        mbarrier.expect(k_full.index(stage), KEY_BYTES)
                    for chunk in gl.static_range(K_CHUNKS):
                        piece = k_pieces.index((stage * K_CHUNKS + chunk) * C.parts + part)
                        at = [load.END, slot + inside, load.END - inside, head + page * k_pages, chunk * C.columns]
                        tma_load(k_desc, at, k_full.index(stage), piece)
                    if C.token_scales:
                        at_scale = gl.where(inside > 0, head + page * scale_pages, tiles.ABOVE_ALL)
                        tma_load(scale_desc, [at_scale, slot], k_full.index(stage), scale_buf.index(stage))
                    if part == 0:
                        load.emptied(v_empty, kc, C.stages)
                        mbarrier.expect(v_full.index(stage), VALUE_BYTES)
                    if C.kind == "fp8":
                        at_values = gl.where(inside > 0, head + page * v_pages, tiles.ABOVE_ALL)
                        tma_load(v_desc, [at_values, 0, slot], v_full.index(stage), v_pieces.index(stage))
                    else:
                        for chunk in gl.static_range(V_CHUNKS):
                            piece = v_pieces.index((stage * V_CHUNKS + chunk) * C.parts + part)
                            at = [load.END, slot + inside, load.END - inside, head + page * v_pages, chunk * C.columns]
                            tma_load(v_desc, at, v_full.index(stage), piece)
                kc += 1
        request += 1
    _clear(lengths, num_requests, head, row_block, program, programs, out_ptr, lse_ptr, out_token, out_head, C)


@gluon.jit
def _clear(lengths, num_requests, head, row_block, program, programs, out_ptr, lse_ptr, out_token, out_head,
           C: gl.constexpr):  # fmt: skip
    """Zero and -inf for requests without keys, which are in no run; they are dealt out by number."""
    LINES: gl.constexpr = C.dv // 32
    column = gl.arange(0, C.dv, layout=gl.BlockedLayout([LINES], [32], [1], [0]))
    zero = gl.zeros([C.dv], out_ptr.dtype.element_ty, layout=gl.BlockedLayout([LINES], [32], [1], [0]))
    for request in range(program, num_requests, programs):
        if gl.load(lengths + request) <= 0:
            for row in range(row_block * C.rows, gl.minimum(row_block * C.rows + C.rows, C.group * C.q_len)):
                token = gl.cast(request, gl.int64) * C.q_len + row // C.group
                own_head = head * C.group + row % C.group
                gl.store(out_ptr + token * out_token + own_head * out_head + column, zero, column < C.out_width)
                if C.has_lse:
                    gl.store(lse_ptr + token * (C.kv_heads * C.group) + own_head, float("-inf"))


@gluon.jit
def _clean_values(codes, keys, C: gl.constexpr):
    """Zero for the values of slots that hold no key: they may be NaN, and 0 · NaN is NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [4, 1], [1, 0])
    shared: gl.constexpr = gl.NVMMASharedLayout(C.weights_swizzle, 8, rank=2)
    codes = reinterpret(codes, gl.int8, [C.dv, C.block_n], shared)
    column = gl.arange(0, C.block_n, layout=gl.SliceLayout(0, layout))
    codes.store(gl.where((column < keys)[None, :], codes.load(layout), 0).to(gl.int8))
    fence_async_shared()
    thread_barrier()


@gluon.jit
def _across(factor, C: gl.constexpr):
    """A factor of all scores, which FP8 has for each query row, as one for all keys."""
    if C.kind == "fp8":
        factor = factor[None, :]
    return factor


@gluon.jit
def _block(state, buffers, bars, kc, first_key, limits, scalars, C: gl.constexpr):
    """One block of keys: scores, their softmax, weights times values."""
    o, m, weights = state
    q_buf, k_buf, v_buf, p_buf, scale_buf = buffers
    k_full, k_empty, v_full, v_empty = bars
    stop_key, low, own, left, right = limits
    cap_scale, score_scale = scalars
    stage = kc % C.stages
    zero = gl.zeros([C.block_n, C.rows], gl.float32, layout=C.scores_layout)
    load.filled(k_full, kc, True, C.stages)
    s = warpgroup_mma(k_buf.index(stage), q_buf.permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(num_outstanding=0, deps=(s,))
    if C.token_scales:
        plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        scales = reinterpret(scale_buf.index(stage), gl.float32, [C.block_n], plain)
        s = s * scales.load(gl.SliceLayout(1, C.scores_layout))[:, None]
    if C.has_cap:
        s = softmax.tanh(s * _across(cap_scale, C))
    key = first_key + gl.arange(0, C.block_n, layout=gl.SliceLayout(1, C.scores_layout))
    seen = key < stop_key
    if C.has_left:
        seen = seen & (key >= low)
    seen = seen[:, None]
    if C.q_len > 1:
        if C.has_left:
            seen = seen & (key[:, None] >= (own - left)[None, :])
        if C.has_right:
            seen = seen & (key[:, None] <= (own + right)[None, :])
    s = gl.where(seen, s, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, axis=0))
    # Not before the maximum is exchanged: a barrier alone does not wait for loads of scales that are still on their way, and
    # the next copy overwrote them where the other program of the multiprocessor held these up.
    mbarrier.arrive(k_empty.index(stage), count=1)
    base = softmax.finite(m_new * score_scale)
    alpha = gl.exp2(m * score_scale - base)
    p = gl.exp2(s * _across(score_scale, C) - softmax.lifted(base, C)[None, :])
    weights = weights * alpha[None, :] + p
    # Every warp is past its last product, for the maximum was exchanged since: P may be overwritten.
    p_buf.store(gl.permute(p.to(p_buf.dtype), (1, 0)))
    fence_async_shared()
    thread_barrier()
    load.filled(v_full, kc, True, C.stages)
    if C.kind == "fp8":
        if first_key + C.block_n > stop_key:
            _clean_values(v_buf.index(stage), stop_key - first_key, C)
        v = v_buf.index(stage)
    else:
        v = v_buf.index(stage).permute((1, 0))
    o = warpgroup_mma(v, p_buf.permute((1, 0)), o * alpha[None, :], is_async=True)
    o = warpgroup_mma_wait(num_outstanding=0, deps=(o,))
    mbarrier.arrive(v_empty.index(stage), count=1)
    return o, m_new, weights


@gluon.jit
def _normalised(o, m, weights, score_scale, value_scale, sink, C: gl.constexpr):
    """(results, log2 of the denominator); zero and -inf for rows that saw no key. A row has a sink in base 2, or -inf."""
    l = gl.sum(weights, axis=0)
    top = m * score_scale
    dead = m == float("-inf")
    highest = gl.maximum(top, sink)
    shrink = gl.where(dead, 0.0, gl.exp2(top - highest))
    if C.kind == "fp8":
        l = l * 0.00390625
        value_scale = value_scale * 0.00390625
    l = l * shrink + gl.exp2(sink - highest)
    l = gl.where(dead, 1.0, l)
    lse = gl.where(dead, float("-inf"), highest + gl.log2(l))
    return o * (shrink / l * value_scale)[None, :], lse


@gluon.jit
def _consume(args, C: gl.constexpr):
    """Multiplies what the other warp fetches, request by request."""
    (buffers, bars, plan, lengths, num_requests, programs, left, right, out_ptr, lse_ptr, out_token, out_head, part_ptr,
     part_lse_ptr, tickets, q_ptr, q_token, q_head, sinks_ptr, scales, scale_strides, cap_scale,
     score_scale) = args  # fmt: skip
    q_buf = buffers[0]
    unit_start, first_tile, first_request = plan
    q_scale, k_scale, v_scale = scales
    q_scale_token, q_scale_head, k_scale_head, v_scale_head = scale_strides
    ROWS: gl.constexpr = C.group * C.q_len

    head, row_block, program = work.place_of(gl.program_id(0), C)
    request, unit, end = work.share_of(unit_start, first_request, num_requests, program, programs, C)
    column_layout: gl.constexpr = gl.SliceLayout(0, C.scores_layout)
    row = row_block * C.rows + gl.arange(0, C.rows, layout=column_layout)
    exists = row < ROWS
    own_head = head * C.group + row % C.group
    q_row = row_block * C.rows + gl.arange(0, C.rows, layout=gl.SliceLayout(1, C.query_layout))
    q_column = gl.arange(0, C.d, layout=gl.SliceLayout(0, C.query_layout))
    q_holds = (q_row < ROWS)[:, None] & (q_column < C.width)[None, :]
    no_sink = gl.full([C.rows], float("-inf"), gl.float32, layout=column_layout)
    sink = no_sink
    if C.has_sinks:
        sink = gl.load(sinks_ptr + own_head, exists, other=float("-inf")).to(gl.float32) * softmax.LOG2E
    kc = gl.to_tensor(0)
    while unit < end:
        unit, begins, ends, there, k_len, first_key, stop_key, low = work.part_of(
            unit_start, first_tile, lengths, request, unit, end, left, C
        )
        if there:
            first_token = gl.cast(request, gl.int64) * C.q_len
            late_row = q_row + gl.minimum(kc, 0)
            offset = late_row // C.group * q_token + (head * C.group + late_row % C.group) * q_head
            q = gl.load(q_ptr + first_token * q_token + (offset[:, None] + q_column[None, :]), q_holds, other=0.0)
            # The last request's products are over in every warp.
            thread_barrier()
            q_buf.store(q)
            fence_async_shared()
            thread_barrier()
            step = row // C.group
            own = step + (k_len - C.q_len)
            limits = (stop_key, low, own, left, right)
            row_cap = cap_scale
            row_score = score_scale
            value_scale = 1.0
            if C.kind == "fp8":
                q_scales = q_scale + first_token * q_scale_token
                factor = gl.load(q_scales + (step * q_scale_token + own_head * q_scale_head), exists, other=1.0)
                if not C.token_scales:
                    factor = factor * gl.load(k_scale + head * k_scale_head)
                value_scale = gl.load(v_scale + head * v_scale_head)
                if C.has_cap:
                    row_cap = factor * cap_scale
                    row_score = factor * 0.0 + score_scale
                else:
                    row_score = factor * score_scale
            o = gl.zeros([C.dv, C.rows], gl.float32, layout=C.scores_layout)
            m = no_sink
            weights = gl.zeros([C.block_n, C.rows], gl.float32, layout=C.scores_layout)
            for block in range(work.blocks_of(first_key, stop_key, C)):
                o, m, weights = _block((o, m, weights), buffers, bars, kc, first_key + block * C.block_n, limits,
                                       (row_cap, row_score), C)  # fmt: skip
                kc += 1
            # Offsets made of the row alone would be computed once, and wait in a register each.
            late = row + gl.minimum(kc, 0)
            if begins & ends:
                result, lse = _normalised(o, m, weights, row_score, value_scale, sink, C)
                gather.store_results(out_ptr, lse_ptr, out_token, out_head, result, lse, request, head, late, C)
            else:
                result, lse = _normalised(o, m, weights, row_score, value_scale, no_sink, C)
                scratch = (part_ptr, part_lse_ptr)
                gather.store_piece(
                    scratch, result, lse, gather.first_row(program, gl.where(begins, program, -1), head, C), late, C
                )
                if C.gather:
                    results = (out_ptr, lse_ptr, out_token, out_head)
                    first, last = gather.pieces_of(unit_start, request, num_requests, programs, C)
                    gather.collect(scratch, tickets, results, (program, first, last), request, head, row_block, late, sink, C)
        request += 1


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def _decode_kernel(
    k_desc,
    v_desc,
    scale_desc,
    out_ptr,
    lse_ptr,
    part_ptr,
    part_lse_ptr,
    tickets,
    q_ptr,
    sinks_ptr,
    q_scale,
    k_scale,
    v_scale,
    unit_start,
    first_tile,
    first_request,
    lengths,
    table_ptr,
    table_row,
    out_token,
    out_head,
    q_token,
    q_head,
    k_pages,
    v_pages,
    scale_pages,
    q_scale_token,
    q_scale_head,
    k_scale_head,
    v_scale_head,
    num_requests,
    programs,
    left,
    right,
    cap_scale,
    score_scale,
    C: gl.constexpr,
):
    dtype: gl.constexpr = k_desc.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout(128, C.bits, rank=2)
    narrow: gl.constexpr = gl.NVMMASharedLayout(C.weights_swizzle, C.bits, rank=2)
    q_buf = gl.allocate_shared_memory(dtype, [C.rows, C.d], layout)
    k_buf = gl.allocate_shared_memory(dtype, [C.stages, C.block_n, C.d], layout)
    if C.kind == "fp8":
        v_buf = gl.allocate_shared_memory(dtype, [C.stages, C.dv, C.block_n], narrow)
    else:
        v_buf = gl.allocate_shared_memory(dtype, [C.stages, C.block_n, C.dv], layout)
    p_buf = gl.allocate_shared_memory(dtype, [C.rows, C.block_n], narrow)
    scale_buf = k_buf
    if C.token_scales:
        scale_buf = gl.allocate_shared_memory(gl.float32, [C.stages, 1, C.block_n], gl.NVMMASharedLayout(0, 32, rank=2))
    k_full = gl.allocate_shared_memory(gl.int64, [C.stages, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [C.stages, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [C.stages, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [C.stages, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(C.stages):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=1)
    if C.early:
        gdc_launch_dependents()
        # What follows reads what kernels before this one wrote.
        gdc_wait()
    descs = (k_desc, v_desc, scale_desc)
    buffers = (q_buf, k_buf, v_buf, p_buf, scale_buf)
    bars = (k_full, k_empty, v_full, v_empty)
    plan = (unit_start, first_tile, first_request)
    page_steps = (k_pages, v_pages, scale_pages)
    scales = (q_scale, k_scale, v_scale)
    scale_strides = (q_scale_token, q_scale_head, k_scale_head, v_scale_head)
    fetched = (k_buf, v_buf, scale_buf)
    producing = (descs, fetched, bars, plan, lengths, table_ptr, table_row, page_steps, num_requests, programs,
                 left, out_ptr, lse_ptr, out_token, out_head)  # fmt: skip
    consuming = (buffers, bars, plan, lengths, num_requests, programs, left, right, out_ptr, lse_ptr, out_token, out_head,
                 part_ptr, part_lse_ptr, tickets, q_ptr, q_token, q_head, sinks_ptr, scales, scale_strides, cap_scale,
                 score_scale)  # fmt: skip
    # Tuples that hold constants stay literal here: Triton 3.6 makes run-time values of them where they have a name.
    gl.warp_specialize([(_consume, (consuming, C)), (_produce, (producing, C))], [1], [C.fetch_registers])


@dataclass(frozen=True)
class HopperConfig:
    """Launch configuration: keys of a block, blocks in flight, whether pieces are added without a second kernel."""

    block_n: int
    stages: int
    gather: bool


def candidates(itemsize: int, d: int, dv: int, rows: int) -> Iterator[HopperConfig]:
    """What leaves room for two programs on a multiprocessor."""
    for block_n in (64, 128) if itemsize == 2 else (64,):
        for stages in (2, 3, 4, 6):
            if held_bytes(itemsize, d, dv, rows, block_n, stages) <= SHARED:
                yield from (HopperConfig(block_n, stages, gather) for gather in (True, False))


@tuned(candidates)
def configure(itemsize: int, d: int, dv: int, rows: int) -> HopperConfig:
    """The default for head dimensions that are rounded up to 64, 128 or 256 and query rows to 8 … 64."""
    fitting = [stages for stages in (1, 2, 4, 6) if held_bytes(itemsize, d, dv, rows, 64, stages) <= SHARED]
    # 32 KB on their way to each of two programs keep the memory busy: more were slower on an H200.
    enough = [stages for stages in fitting if stages * 64 * (d + dv) * itemsize >= FLYING and stages > 1]
    # From 32 values a thread on, two pieces at most are on their way at once: the second kernel spreads them.
    return HopperConfig(64, enough[0] if enough else fitting[-1], rows * dv < 4096)


def held_bytes(itemsize: int, d: int, dv: int, rows: int, block_n: int, stages: int) -> int:
    """Shared memory with a scale for each key."""
    return itemsize * (stages * block_n * (d + dv) + rows * (d + block_n)) + stages * block_n * 4


def rounded(width: int, narrowest: int) -> int:
    """A head dimension as products take it."""
    return max(narrowest, triton.next_power_of_2(width))


def launch(
    out: Tensor,
    out_lse: Tensor | None,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seqlens_k: Tensor,
    q_len: int,
    causal: bool,
    scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float | None,
    sinks: Tensor | None,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    plan: tuple[Tensor, ...] | None,
) -> None:
    """Launches over the plan's programs, blocks of rows and KV heads, then the sum of pieces over tokens and heads."""
    T, Hq, D = q.shape
    _, page_size, Hkv, Dv = v_cache.shape
    if T == 0:
        return
    group = Hq // Hkv
    fp8 = q.dtype is torch.float8_e4m3fn
    d, dv = rounded(D, 128 if fp8 else 64), rounded(Dv, 64)
    rows = max(8, triton.next_power_of_2(min(group * q_len, decode_plan.MAX_ROWS if dv < 256 else 32)))
    config = configure.on(q.device, q.element_size(), d, dv, rows)
    scale = D**-0.5 if scale is None else scale
    right = 0 if causal else window_right
    early = has_dependent_launch(q.device)
    shape = work.Shape(
        kind=KINDS[q.dtype],
        block_n=config.block_n,
        stages=config.stages,
        d=d,
        dv=dv,
        width=D,
        out_width=Dv,
        rows=rows,
        kv_heads=Hkv,
        group=group,
        q_len=q_len,
        span=min(page_size, 64),
        page_size=page_size,
        lead=decode_plan.LEAD,
        share=decode_plan.SHARE,
        has_lse=out_lse is not None,
        has_sinks=sinks is not None,
        has_left=window_left >= 0,
        has_right=right >= 0,
        has_cap=bool(softcap),
        token_scales=k_scale is not None and k_scale.dim() == 3,
        early=early,
        gather=config.gather,
    )
    if plan is None:
        heads = {"num_heads_q": Hq, "num_heads_kv": Hkv, "head_dim": D, "page_size": page_size, "q_len": q_len}
        plan = decode_plan.attention_decode_plan(seqlens_k, **heads, window=(window_left, -1), impl="triton")
    programs = plan[2].shape[0]
    part, part_lse = empty_pieces(programs, Hkv, group * q_len, Dv, q.device)
    k_descriptor, k_pages = load.keys_descriptor(k_cache, shape)
    v_descriptor, v_pages = (load.turned_descriptor if fp8 else load.keys_descriptor)(v_cache, shape)
    scale_descriptor, scale_pages = (k_descriptor, 0)
    if k_scale is not None and shape.token_scales:
        scale_descriptor, scale_pages = load.scales_descriptor(k_scale, shape)
    scales, strides = fp8_scales(q, q_scale, k_scale, v_scale) if fp8 else NO_SCALES
    _decode_kernel[(programs * shape.row_blocks * Hkv,)](
        k_descriptor,
        v_descriptor,
        scale_descriptor,
        out,
        out if out_lse is None else out_lse,
        part,
        part_lse,
        plan[3],
        q,
        out if sinks is None else sinks,
        *(seqlens_k if each is None else each for each in scales),
        *plan[:3],
        seqlens_k,
        page_table,
        page_table.stride(0),
        *(load.stride(out, dim) for dim in (0, 1)),
        *(load.stride(q, dim) for dim in (0, 1)),
        k_pages,
        v_pages,
        scale_pages,
        strides[0],
        strides[1],
        strides[4],
        strides[5],
        seqlens_k.shape[0],
        programs,
        window_left,
        right,
        scale / softcap if softcap else 1.0,
        (softcap if softcap else scale) * softmax.LOG2E.value,
        C=Constants(shape),
        num_warps=4,
        maxnreg=REGISTERS,
        **({"launch_pdl": True} if early else {}),
    )
    if not shape.gather:
        combine(out, out_lse, part, part_lse, sinks, plan[0], Hkv, q_len)
