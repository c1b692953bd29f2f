"""Split-KV decode on the latent cache with wgmma and TMA: a tile comes to shared memory once and is keys and values.

A program keeps 64 query rows, heads times tokens, and their results: two warpgroups hold 256 of the 512 columns each. Tiles of
64 keys take turns in two places. The warpgroup of a tile's place makes its scores and weights, shares the weights and the new
maximum through shared memory, and both multiply the weights with their own columns of the tile; while one takes exponentials
the tensor cores work for the other. A warp fetches by TMA: half a tile as soon as its warpgroup is done with these columns. The
weights of a tile lie where the rotated part of its keys was. Barriers in shared memory: `full` that columns of a tile, or the
queries, have arrived, `ready` that weights have been written, `empty` that a half has been read.

The schedule of requests and the sum of pieces are those of attention_decode.
Source: two warpgroups that share the columns of the result and exchange weights, DeepSeek-AI, FlashMLA (2025).
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from penstock.core.device import has_dependent_launch
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
from penstock.ops.attention import decode_plan
from penstock.ops.attention._combine_triton import combine, empty_pieces
from penstock.ops.attention._tiles_hopper import Constants, Tile

FIRST, SECOND = gl.constexpr(0), gl.constexpr(1)
LEAD, SHARE = gl.constexpr(decode_plan.LEAD), gl.constexpr(decode_plan.SHARE)
# A named barrier; Triton uses those from 0 up, one for each partition and some more.
MEETING = gl.constexpr(8)
WIDTH, ROPE = 512, 64
KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
UNSPECIALIZED = ["table_row", "pages", "num_requests", "heads", "q_len", "has_lse", "score_scale"]


@dataclass(frozen=True)
class LatentTile(Tile):
    """A tile of one program: `consumers` is 1, since both warpgroups work on the same rows, and `dv` the columns of one.

    Args:
        chunk: columns of keys behind one `full` barrier.
        scores_first: the second warpgroup starts its scores before it multiplies the weights of the first.
        early: the sum of pieces is launched while this kernel runs.
    """

    chunk: int
    scores_first: bool
    early: bool

    @property
    def per_half(self) -> int:
        """Barriers of the columns of one warpgroup."""
        return self.dv // self.chunk

    @property
    def arrivals(self) -> int:
        """Barriers of a tile: its halves' and one for the rotated part."""
        return 2 * self.per_half + 1

    @property
    def shared(self) -> int:
        """Bytes of shared memory, barriers aside: queries, two tiles, maxima and sums."""
        return self.itemsize * (self.d + self.tail) * (self.rows + 2 * self.block_n) + 4 * self.rows * 6


@gluon.jit
def _meet():
    """Waits for the other warpgroup."""
    barrier = gl.to_tensor(MEETING)
    gl.inline_asm_elementwise("bar.sync $1, 256; mov.u32 $0, 0;", "=r,r", [barrier], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _run_of(plan, num_requests):
    """(first unit, unit after the last, first request) of this program."""
    _, unit_start, _, first_request = plan
    program = gl.program_id(1)
    total = gl.load(unit_start + num_requests)
    working = gl.maximum(gl.minimum(gl.num_programs(1), (total + SHARE - 1) // SHARE), 1)
    unit = (gl.cast(program, gl.int64) * total // working).to(gl.int32)
    end = gl.minimum((gl.cast(program + 1, gl.int64) * total // working).to(gl.int32), total)
    return unit, end, gl.load(first_request + program)


@gluon.jit
def _next_piece(plan, unit, end, request):
    """((tiles, the first of them, keys, request, place of the result), next unit, next request); 0 tiles when none is left.

    The result's place is -1 for a whole request, otherwise 0 or 1 in the program's scratch.
    """
    seqlens, unit_start, first_tile, _ = plan
    count = gl.to_tensor(0)
    first = gl.to_tensor(0)
    k_len = gl.to_tensor(0)
    place = gl.to_tensor(-1)
    while (count == 0) & (unit < end):
        begin = gl.load(unit_start + request) + LEAD
        request_end = gl.load(unit_start + request + 1)
        k_len = gl.load(seqlens + request)
        start = gl.maximum(unit, begin)
        stop = gl.minimum(request_end, end)
        first = gl.load(first_tile + request) + start - begin
        count = gl.maximum(stop - start, 0)
        opens = gl.where(start == begin, 1, 0)
        place = gl.where((opens == 1) & (stop == request_end), -1, opens)
        unit = stop
        request += 1
    return (count, first, k_len, request - 1, place), unit, request


@gluon.jit
def _start_scores(buffers, bars, use, me: gl.constexpr, C: gl.constexpr):
    """Starts queries · keys of the tile in this warpgroup's place, column after column as they arrive."""
    q_buf, q_rope, halves, ropes, _, _ = buffers
    full = bars[2]
    layout: gl.constexpr = gl.NVMMASharedLayout(128, C.bits, rank=2)
    COUNT: gl.constexpr = 2 * C.per_half
    q_chunks = reinterpret(q_buf, q_buf.dtype, [COUNT, C.rows, C.chunk], layout)
    k_chunks = reinterpret(halves, halves.dtype, [2 * COUNT, C.block_n, C.chunk], layout)
    s = gl.zeros([C.rows, C.block_n], gl.float32, layout=C.scores_layout)
    for turn in gl.static_range(COUNT):
        mbarrier.wait(full.index(me * C.arrivals + turn), use & 1)
        # The warpgroup's own half comes first.
        q = q_chunks.index((turn + me * C.per_half) % COUNT)
        k = k_chunks.index(me * COUNT + (turn + me * C.per_half) % COUNT).permute((1, 0))
        s = warpgroup_mma(q, k, s, use_acc=turn > 0, is_async=True)
    mbarrier.wait(full.index(me * C.arrivals + COUNT), use & 1)
    return warpgroup_mma(q_rope, ropes.index(me).permute((1, 0)), s, is_async=True)


@gluon.jit
def _weights(s, m, l, buffers, bars, key, sight, score_scale, me: gl.constexpr, C: gl.constexpr):
    """(weights, new maximum, new partial sums, factor of what was summed before) of the own tile, shared with the other."""
    ropes, maxima = buffers[3], buffers[4]
    seen_by_all, own_first, k_len = sight
    if key + C.block_n > seen_by_all:
        s = softmax.masked(s, own_first, key, k_len, -1, 0, C)
    p, m, l, alpha = softmax.advance(s, m, l, score_scale, True, C)
    maxima.index(me).store(m)
    codes = softmax.as_operand(p, C)
    # The other warps' products may still read the rotated keys that the weights replace.
    thread_barrier()
    ropes.index(me).store(codes)
    fence_async_shared()
    thread_barrier()
    mbarrier.arrive(bars[4].index(me), count=1)
    return codes, m, l, alpha


@gluon.jit
def _others_weights(m, l, buffers, bars, use, score_scale, me: gl.constexpr, C: gl.constexpr):
    """(new maximum, new partial sums, factor of what was summed before) with the other warpgroup's tile, when it is ready."""
    other: gl.constexpr = 1 - me
    mbarrier.wait(bars[4].index(other), use & 1)
    # These have arrived, or there were no scores; to wait for them is what makes the columns visible here.
    for turn in gl.static_range(C.per_half):
        mbarrier.wait(bars[2].index(other * C.arrivals + C.per_half + turn), use & 1)
    m_new = buffers[4].index(other).load(gl.SliceLayout(1, C.scores_layout))
    alpha = gl.exp2(m * score_scale - softmax.finite(m_new * score_scale))
    layout: gl.constexpr = l.type.layout
    return m_new, l * gl.convert_layout(alpha, gl.SliceLayout(1, layout))[:, None], alpha


@gluon.jit
def _multiply_values(o, p, alpha, buffers, place: gl.constexpr, me: gl.constexpr):
    """Starts weights · values of this warpgroup's columns of the tile in a place."""
    return warpgroup_mma(p, buffers[2].index(2 * place + me), softmax.scaled(o, alpha), is_async=True)


@gluon.jit
def _finished(o_running, p, bars, place: gl.constexpr, me: gl.constexpr):
    """The result with a tile whose half may now be overwritten; weights in registers live until then.

    The result is renamed: ptxas lets only a product touch what a product wrote while another runs, and would end the scores
    before the result is scaled. No instruction comes of it.
    """
    if place == me:
        o, p = warpgroup_mma_wait(num_outstanding=0, deps=(o_running, p))
    else:
        o = warpgroup_mma_wait(num_outstanding=0, deps=(o_running,))
    mbarrier.arrive(bars[3].index(2 * place + me), count=1)
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [o], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _lead(o, m, l, buffers, bars, uses, has_second, key, sight, score_scale, C: gl.constexpr):
    """One or two more tiles, from `key` on, as the first warpgroup sees them."""
    s_running = _start_scores(buffers, bars, uses[0], 0, C)
    s = warpgroup_mma_wait(num_outstanding=0, deps=(s_running,))
    p, m, l, alpha = _weights(s, m, l, buffers, bars, key, sight, score_scale, 0, C)
    o = _finished(_multiply_values(o, p, alpha, buffers, 0, 0), p, bars, 0, 0)
    if has_second:
        m, l, alpha = _others_weights(m, l, buffers, bars, uses[1], score_scale, 0, C)
        weights = buffers[3].index(1)
        o = _finished(_multiply_values(o, weights, alpha, buffers, 1, 0), weights, bars, 1, 0)
    return o, m, l


@gluon.jit
def _follow(o, m, l, buffers, bars, uses, key, sight, score_scale, C: gl.constexpr):
    """Two more tiles, from `key` on, as the second warpgroup sees them."""
    weights = buffers[3].index(0)
    if C.scores_first:
        s_running = _start_scores(buffers, bars, uses[1], 1, C)
        m, l, alpha = _others_weights(m, l, buffers, bars, uses[0], score_scale, 1, C)
        o_running = _multiply_values(o, weights, alpha, buffers, 0, 1)
        s = warpgroup_mma_wait(num_outstanding=1, deps=(s_running,))
        p, m, l, alpha = _weights(s, m, l, buffers, bars, key + C.block_n, sight, score_scale, 1, C)
        o = _finished(o_running, weights, bars, 0, 1)
    else:
        m, l, alpha = _others_weights(m, l, buffers, bars, uses[0], score_scale, 1, C)
        o = _finished(_multiply_values(o, weights, alpha, buffers, 0, 1), weights, bars, 0, 1)
        s_running = _start_scores(buffers, bars, uses[1], 1, C)
        s = warpgroup_mma_wait(num_outstanding=0, deps=(s_running,))
        p, m, l, alpha = _weights(s, m, l, buffers, bars, key + C.block_n, sight, score_scale, 1, C)
    o = _finished(_multiply_values(o, p, alpha, buffers, 1, 1), p, bars, 1, 1)
    return o, m, l


@gluon.jit
def _follow_last(o, m, l, buffers, bars, use, count, score_scale, C: gl.constexpr):
    """The last tile of an odd number, as the second warpgroup sees it."""
    if count % 2 > 0:
        m, l, alpha = _others_weights(m, l, buffers, bars, use, score_scale, 1, C)
        weights = buffers[3].index(0)
        o = _finished(_multiply_values(o, weights, alpha, buffers, 0, 1), weights, bars, 0, 1)
    return o, m, l


@gluon.jit
def _sum_of_both(l, sums, turn, me: gl.constexpr, C: gl.constexpr):
    """Denominators: the own partial sums and the other warpgroup's, which stand elsewhere in the next turn."""
    mine = gl.convert_layout(gl.sum(l, axis=1), gl.SliceLayout(1, C.scores_layout))
    sums.index(2 * turn + me).store(mine)
    _meet()
    return mine + sums.index(2 * turn + 1 - me).load(gl.SliceLayout(1, C.scores_layout))


@gluon.jit
def _store(o, m, l, results, strides, request, place, score_scale, me: gl.constexpr, C: gl.constexpr):
    """Writes a request's result, or a piece of it, with its log-sum-exp."""
    out_ptr, lse_ptr, part_ptr, part_lse_ptr = results
    out_token, out_head, heads, q_len, has_lse = strides
    row = gl.program_id(0) * C.rows + gl.arange(0, C.rows, layout=gl.SliceLayout(1, C.result_layout))
    token = row // heads
    head = row - token * heads
    exists = token < q_len
    column = me * C.dv + gl.arange(0, C.dv, layout=gl.SliceLayout(0, C.result_layout))
    dead = m == float("-inf")
    l = gl.where(dead, 1.0, l)
    lse = gl.convert_layout(gl.where(dead, float("-inf"), m * score_scale + gl.log2(l)), gl.SliceLayout(1, C.result_layout))
    o = softmax.scaled(o, 1.0 / l)
    if place < 0:
        tokens = (request * q_len + token).to(gl.int64)
        at = out_ptr + (tokens * out_token + head * out_head)[:, None] + column[None, :]
        gl.store(at, o.to(out_ptr.dtype.element_ty), exists[:, None])
        if me == 0:
            gl.store(lse_ptr + tokens * heads + head, lse * softmax.LN2, exists & (has_lse > 0))
    else:
        piece = gl.cast(2 * gl.program_id(1) + place, gl.int64) * (heads * q_len) + row
        gl.store(part_ptr + (piece * (2 * C.dv))[:, None] + column[None, :], o, exists[:, None])
        if me == 0:
            gl.store(part_lse_ptr + piece, lse, exists)


@gluon.jit
def _consume(args, me: gl.constexpr, C: gl.constexpr):
    """Works through this program's pieces of requests."""
    results, plan, buffers, bars, num_requests, strides, score_scale = args
    _, _, heads, q_len, _ = strides
    unit, end, request = _run_of(plan, num_requests)
    piece, unit, request = _next_piece(plan, unit, end, request)
    uses = (gl.to_tensor(0), gl.to_tensor(0))
    step = gl.to_tensor(0)
    while piece[0] > 0:
        count, first, k_len, owner, place = piece
        own_first = k_len - q_len + gl.program_id(0) * C.rows // heads
        sight = (k_len - q_len + 1, own_first, k_len)
        o = gl.zeros([C.rows, C.dv], gl.float32, layout=C.result_layout)
        m = gl.full([C.rows], float("-inf"), gl.float32, layout=gl.SliceLayout(1, C.scores_layout))
        l = softmax.partial_sum(gl.zeros([C.rows, C.block_n], gl.float32, layout=C.scores_layout), C)
        mbarrier.wait(bars[0].index(0), step & 1)
        use, second_use = uses
        key = first * C.block_n
        for _ in range(count // 2 + count % 2 * (1 - me)):
            if me == 0:
                has_second = key + C.block_n < (first + count) * C.block_n
                o, m, l = _lead(o, m, l, buffers, bars, (use, second_use), has_second, key, sight, score_scale, C)
            else:
                o, m, l = _follow(o, m, l, buffers, bars, (use, second_use), key, sight, score_scale, C)
            use += 1
            second_use += 1
            key += 2 * C.block_n
        mbarrier.arrive(bars[1].index(0), count=1)
        if me == 1:
            o, m, l = _follow_last(o, m, l, buffers, bars, use, count, score_scale, C)
        piece, unit, request = _next_piece(plan, unit, end, request)
        l_both = _sum_of_both(l, buffers[5], step % 2, me, C)
        _store(o, m, l_both, results, strides, owner, place, score_scale, me, C)
        uses = (uses[0] + (count + 1) // 2, uses[1] + count // 2)
        step += 1


@gluon.jit
def _pages_of(table, key, k_len, page_step, C: gl.constexpr):
    """Where the parts of a tile stand in the cache's dimension of pages, looked up before there is room for them."""
    first = gl.load(table + key // C.page_size, key < k_len, other=0) * page_step
    second = first
    third = first
    fourth = first
    if C.parts > 1:
        second = gl.load(table + (key + C.span) // C.page_size, key + C.span < k_len, other=0) * page_step
    if C.parts > 2:
        third = gl.load(table + (key + 2 * C.span) // C.page_size, key + 2 * C.span < k_len, other=0) * page_step
        fourth = gl.load(table + (key + 3 * C.span) // C.page_size, key + 3 * C.span < k_len, other=0) * page_step
    return first, second, third, fourth


@gluon.jit
def _fetch_columns(desc, pieces, bar, to, pages, key, k_len, column, COUNT: gl.constexpr, C: gl.constexpr):
    """Copies COUNT times 64 columns of a tile, from `column` on; slots beyond the last key become zero."""
    for at in gl.static_range(COUNT):
        for part in gl.static_range(C.parts):
            inside = tiles.rows_inside(k_len, key + part * C.span, C.span)
            slot = (key + part * C.span) % C.page_size + inside
            where = [load.END, slot, load.END - inside, pages[part], column + at * C.columns]
            tma_load(desc, where, bar, pieces.index((to + at) * C.parts + part))


@gluon.jit
def _fetch_tile(source, pieces, rope_pieces, full, empty, place, use, C: gl.constexpr):
    """Copies a tile: the half of its own warpgroup, which is free first, then the other, then the rotated part."""
    desc, table, key, k_len, page_step = source
    COLUMNS: gl.constexpr = C.chunk // C.columns
    pages = _pages_of(table, key, k_len, page_step, C)
    bar = place * C.arrivals
    for turn in gl.static_range(2):
        half = gl.where(place == turn, 0, 1)
        mbarrier.wait(empty.index(2 * place + half), (use & 1) ^ 1)
        for chunk in gl.static_range(C.per_half):
            column = half * C.dv + chunk * C.chunk
            to = 2 * place * C.dv // C.columns + column // C.columns
            mbarrier.expect(full.index(bar), C.block_n * C.chunk * C.itemsize)
            _fetch_columns(desc, pieces, full.index(bar), to, pages, key, k_len, column, COLUMNS, C)
            bar += 1
    mbarrier.expect(full.index(bar), C.block_n * C.tail * C.itemsize)
    _fetch_columns(desc, rope_pieces, full.index(bar), place, pages, key, k_len, C.d, 1, C)


@gluon.jit
def _produce(args, C: gl.constexpr):
    """Fetches the queries and tiles of this program's pieces of requests."""
    descs, plan, buffers, bars, num_requests, heads, q_len, table_ptr, table_row, page_step = args
    q_desc, rope_desc, cache_desc = descs
    q_buf, q_rope, halves, ropes = buffers
    q_full, q_empty, full, empty = bars
    layout: gl.constexpr = gl.NVMMASharedLayout(128, C.bits, rank=5)
    PER_HALF: gl.constexpr = C.dv // C.columns
    q_pieces = load.rows_as_pieces(q_buf, 2 * PER_HALF, C.bits, C)
    q_rope_piece = load.rows_as_pieces(q_rope, 1, C.bits, C).index(0)
    pieces = reinterpret(halves, halves.dtype, [4 * PER_HALF * C.parts, 1, 1, C.span, 1, C.columns], layout)
    rope_pieces = reinterpret(ropes, ropes.dtype, [2 * C.parts, 1, 1, C.span, 1, C.columns], layout)
    first_row = gl.program_id(0) * C.rows
    first_token = first_row // heads
    first_head = first_row - first_token * heads
    tokens = tiles.rows_inside(q_len, first_token, C.part_tokens)

    unit, end, request = _run_of(plan, num_requests)
    piece, unit, request = _next_piece(plan, unit, end, request)
    uses = (gl.to_tensor(0), gl.to_tensor(0))
    step = gl.to_tensor(0)
    while piece[0] > 0:
        count, first, k_len, owner, _ = piece
        mbarrier.wait(q_empty.index(0), (step & 1) ^ 1)
        mbarrier.expect(q_full.index(0), C.rows * (C.d + C.tail) * C.itemsize)
        row = owner * q_len + first_token + tokens
        for column in gl.static_range(2 * PER_HALF):
            at = [load.END, row, load.END - tokens, first_head, column * C.columns]
            tma_load(q_desc, at, q_full.index(0), q_pieces.index(column))
        tma_load(rope_desc, [load.END, row, load.END - tokens, first_head, 0], q_full.index(0), q_rope_piece)
        table = table_ptr + gl.cast(owner, gl.int64) * table_row
        for tile in range(count):
            use = gl.where(tile % 2 == 0, uses[0], uses[1]) + tile // 2
            source = (cache_desc, table, (first + tile) * C.block_n, k_len, page_step)
            _fetch_tile(source, pieces, rope_pieces, full, empty, tile % 2, use, C)
        piece, unit, request = _next_piece(plan, unit, end, request)
        uses = (uses[0] + (count + 1) // 2, uses[1] + count // 2)
        step += 1


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def _mla_kernel(
    q_desc,
    rope_desc,
    cache_desc,
    out_ptr,
    lse_ptr,
    part_ptr,
    part_lse_ptr,
    seqlens,
    unit_start,
    first_tile,
    first_request,
    table_ptr,
    table_row,
    pages,
    out_token,
    out_head,
    num_requests,
    heads,
    q_len,
    has_lse,
    score_scale,
    C: gl.constexpr,
):
    if C.early:
        gdc_launch_dependents()
    dtype: gl.constexpr = q_desc.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout(128, C.bits, rank=2)
    q_buf = gl.allocate_shared_memory(dtype, [C.rows, C.d], layout)
    q_rope = gl.allocate_shared_memory(dtype, [C.rows, C.tail], layout)
    halves = gl.allocate_shared_memory(dtype, [4, C.block_n, C.dv], layout)
    ropes = gl.allocate_shared_memory(dtype, [2, C.block_n, C.tail], layout)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    maxima = gl.allocate_shared_memory(gl.float32, [2, C.rows], plain)
    sums = gl.allocate_shared_memory(gl.float32, [4, C.rows], plain)
    q_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [2 * C.arrivals, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full.index(0), count=1)
    mbarrier.init(q_empty.index(0), count=2)
    for chunk in gl.static_range(2 * C.arrivals):
        mbarrier.init(full.index(chunk), count=1)
    for half in gl.static_range(4):
        mbarrier.init(empty.index(half), count=1)
    for place in gl.static_range(2):
        mbarrier.init(ready.index(place), count=1)

    plan = (seqlens, unit_start, first_tile, first_request)
    buffers = (q_buf, q_rope, halves, ropes, maxima, sums)
    bars = (q_full, q_empty, full, empty, ready)
    results = (out_ptr, lse_ptr, part_ptr, part_lse_ptr)
    strides = (out_token, out_head, heads, q_len, has_lse)
    consuming = (results, plan, buffers, bars, num_requests, strides, score_scale)
    descs = (q_desc, rope_desc, cache_desc)
    fetched, told = (q_buf, q_rope, halves, ropes), (q_full, q_empty, full, empty)
    producing = (descs, plan, fetched, told, num_requests, heads, q_len, table_ptr, table_row, pages)
    gl.warp_specialize(
        [(_consume, (consuming, FIRST, C)), (_consume, (consuming, SECOND, C)), (_produce, (producing, C))],
        [4, 1],
        [232, 40],
    )


@dataclass(frozen=True)
class LatentConfig:
    """Launch configuration: columns behind a barrier, and whether the second warpgroup starts with its scores.

    That keeps the tensor cores busy; but a tile that is late then holds up the one before it.
    """

    chunk: int
    scores_first: bool


def candidates(blocks: int) -> Iterator[LatentConfig]:
    """All there are."""
    for chunk in (64, 128, 256):
        for scores_first in (True, False):
            yield LatentConfig(chunk, scores_first)


@tuned(candidates)
def configure(blocks: int) -> LatentConfig:
    """The default for a number of blocks of 64 query rows: the fastest on an H200 for one block and for two."""
    return LatentConfig(64, True)


def shape_of(
    config: LatentConfig, heads: int, q_len: int, page_size: int, kind: str = "bf16", early: bool = True
) -> LatentTile:
    """The kernel's shape for a call."""
    # What prefill alone has is off.
    others: dict[str, Any] = {field.name: False for field in fields(Tile)}
    others.update(kind=kind, page_size=page_size, span=min(page_size, decode_plan.TILE), has_right=q_len > 1)
    others.update(consumers=1, block_n=decode_plan.TILE, stages=2, q_stages=1, d=WIDTH, tail=ROPE, dv=WIDTH // 2)
    others.update(group=64 if q_len == 1 else min(heads, 64))
    return LatentTile(**others, **asdict(config), early=early)


def launch(
    out: Tensor,
    out_lse: Tensor | None,
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    page_table: Tensor,
    seqlens_k: Tensor,
    q_len: int,
    scale: float | None,
    plan: tuple[Tensor, ...] | None,
) -> None:
    """Launches over blocks of rows and the plan's programs, then the sum of pieces over tokens and heads."""
    T, Hq, Dc = q_latent.shape
    width, page_size = cache.shape[2], cache.shape[1]
    if T == 0:
        return
    rows = Hq * q_len
    blocks = decode_plan.row_blocks(rows)
    early = has_dependent_launch(out.device)
    tile = shape_of(configure.on(out.device, blocks), Hq, q_len, page_size, KINDS[q_latent.dtype], early)
    if plan is None:
        shape = {"num_heads_q": Hq, "num_heads_kv": 1, "head_dim": width, "page_size": page_size, "q_len": q_len}
        plan = decode_plan.attention_decode_plan(seqlens_k, **shape, impl="triton")
    programs = plan[2].shape[0]
    part, part_lse = empty_pieces(programs, 1, rows, Dc, out.device)
    keys, pages = load.keys_descriptor(cache[:, :, None], tile)
    scale = width**-0.5 if scale is None else scale
    _mla_kernel[(blocks, programs)](
        load.rows_descriptor(q_latent, tile),
        load.rows_descriptor(q_rope, tile),
        keys,
        out,
        out if out_lse is None else out_lse,
        part,
        part_lse,
        seqlens_k,
        *plan[:3],
        page_table,
        page_table.stride(0),
        pages,
        *out.stride()[:2],
        seqlens_k.shape[0],
        Hq,
        q_len,
        int(out_lse is not None),
        scale * softmax.LOG2E.value,
        C=Constants(tile),
        num_warps=4,
        maxnreg=168,
    )
    combine(out, out_lse, part, part_lse, None, plan[0], 1, q_len)
