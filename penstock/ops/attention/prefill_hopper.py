"""FlashAttention-3 on packed queries; keys packed or in pages.

One program a multiprocessor. A warp fetches queries, keys and values through the tensor memory accelerator; warpgroups of 64
rows compute. Each starts the product of queries and the next block of keys before the product of weights and values of this
block, and takes the exponentials of the one while the tensor cores work on the other; weights never leave registers. Barriers
in shared memory tell what belongs to whom: `full` that a block of keys or values has arrived, `empty` that all have read it.

Rows outside a request, and keys after its last, are never read: the copies are cut there. A descriptor has two dimensions that
both step over rows, so that the first chooses where the second ends (as triton.tools.ragged_tma does). What is cut off is zero
in shared memory, and left alone in global memory.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from penstock.core.device import H200, num_sms
from penstock.core.gluon import (
    TensorDescriptor,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    reinterpret,
    thread_barrier,
    tma_load,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from penstock.core.tuning import tuned
from penstock.ops.attention import _softmax_hopper as softmax
from penstock.ops.attention import _tiles_hopper as tiles
from penstock.ops.attention._tiles_hopper import Constants, Tile

FIRST, SECOND, THIRD = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
# A copy is 128 bytes wide, the widest that shared memory swizzles.
COLUMNS = 64
# Named barriers of the warpgroups' turns; Triton uses those from 0 up, one for each partition and some more.
TURN = gl.constexpr(8)
# Left for tiles by the barriers; registers a thread is launched with, before the warpgroups share them out again.
SHARED = H200.shared_memory - 1024
REGISTERS = {2: 168, 3: 128}
UNSPECIALIZED = [
    "table_row",
    "out_token",
    "out_head",
    "out_width",
    "num_requests",
    "num_rows",
    "heads",
    "kv_group",
    "left",
    "right",
    "cap_scale",
    "score_scale",
]


@gluon.jit
def _take_turn(consumer: gl.constexpr):
    barrier = gl.to_tensor(TURN + consumer)
    gl.inline_asm_elementwise("bar.sync $1, 256; mov.u32 $0, 0;", "=r,r", [barrier], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _give_turn(consumer: gl.constexpr):
    barrier = gl.to_tensor(TURN + consumer)
    gl.inline_asm_elementwise("bar.arrive $1, 256; mov.u32 $0, 0;", "=r,r", [barrier], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _matrix(buffer, index, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """One stage of a buffer as an operand of a product."""
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    return reinterpret(buffer.index(index), buffer.dtype, [ROWS, WIDTH], layout)


@gluon.jit
def _pieces(buffer, COUNT: gl.constexpr, ROWS: gl.constexpr, HEADS: gl.constexpr):
    """A buffer as the pieces of 64 columns that single copies fill."""
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=5)
    return reinterpret(buffer, buffer.dtype, [COUNT, 1, ROWS, 1, HEADS, 64], layout)


@gluon.jit
def _filled(full, turn, there, C: gl.constexpr):
    """Waits until the turn-th block has arrived, if there is one."""
    mbarrier.wait(full.index(turn % C.stages), (turn // C.stages) & 1, pred=there)


@gluon.jit
def _emptied(empty, turn, C: gl.constexpr):
    """Waits until the stage of the turn-th block has been read; that the first blocks find theirs free is the other parity."""
    mbarrier.wait(empty.index(turn % C.stages), ((turn // C.stages) & 1) ^ 1)


@gluon.jit
def _fetch(desc, pieces, bar, stage, table, head, begin, length, low, first, WIDTH: gl.constexpr, FROM: gl.constexpr,
           C: gl.constexpr):  # fmt: skip
    """Copies WIDTH columns of a block of keys or values, starting at column FROM."""
    COUNT: gl.constexpr = WIDTH // 64
    for part in gl.static_range(C.parts):
        key = first + part * C.span
        inside = tiles.rows_inside(length, key, C.span)
        if C.page_size > 0:
            # A server frees the pages that the window has left behind.
            if C.has_left:
                inside = gl.where(key + C.span <= low, 0, inside)
            page = gl.load(table + key // C.page_size, inside > 0, other=0)
            row = key % C.page_size + inside
        else:
            page = 0
            row = begin + key + inside
        for column in gl.static_range(COUNT):
            piece = pieces.index((stage * COUNT + column) * C.parts + part)
            tma_load(desc, [page, row, C.span - inside, head, FROM + column * 64], bar, piece)


@gluon.jit
def _produce(args, C: gl.constexpr):
    (descs, buffers, bars, mail, cu_seqlens_q, lengths, table_ptr, table_row, num_requests, heads, kv_group, left,
     right) = args  # fmt: skip
    q_desc, k_desc, v_desc = descs
    q_buf, q_tail, k_buf, k_tail, v_buf = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    PIECES: gl.constexpr = C.d // 64
    KEY_BYTES: gl.constexpr = C.block_n * (C.d + C.tail) * 2
    VALUE_BYTES: gl.constexpr = C.block_n * C.dv * 2
    QUERY_BYTES: gl.constexpr = C.consumers * C.rows * (C.d + C.tail) * 2
    q_pieces = _pieces(q_buf, C.consumers * C.d // 64, C.part_tokens, C.group)
    k_pieces = _keys_as_pieces(k_buf, C.d, C)
    v_pieces = _keys_as_pieces(v_buf, C.dv, C)
    if C.tail > 0:
        q_tail_pieces = _pieces(q_tail, C.consumers, C.part_tokens, C.group)
        k_tail_pieces = _keys_as_pieces(k_tail, C.tail, C)

    program = gl.program_id(0)
    programs = gl.num_programs(0)
    base = gl.to_tensor(0)
    level, count = tiles.next_level(cu_seqlens_q, lengths, num_requests, tiles.ABOVE_ALL, C)
    step = gl.to_tensor(0)
    kc = gl.to_tensor(0)
    vc = gl.to_tensor(0)
    running = gl.to_tensor(1)
    while running > 0:
        position = tiles.position_of(step, program, programs)
        pair = position // heads
        head = position - pair * heads
        while (level >= 0) & (pair >= base + count):
            base += count
            level, count = tiles.next_level(cu_seqlens_q, lengths, num_requests, level, C)
        mbarrier.wait(q_empty.index(0), (step & 1) ^ 1)
        if level < 0:
            _post(mail, -1, 0, 0, 0, 0)
            thread_barrier()
            mbarrier.arrive(q_full.index(0), count=2)
            running = gl.to_tensor(0)
        else:
            request, lowest = tiles.request_at(cu_seqlens_q, lengths, num_requests, level, pair - base, C)
            q_begin, q_len, k_begin, k_len = tiles.lengths_at(cu_seqlens_q, lengths, request, True, C)
            row = (level - lowest) * C.tokens
            _post(mail, row, q_len, k_len, q_begin + q_len, head)
            thread_barrier()
            mbarrier.arrive(q_full.index(0), count=1)
            mbarrier.expect(q_full.index(0), QUERY_BYTES)
            for c in gl.static_range(C.consumers):
                token = row + c * C.part_tokens
                inside = tiles.rows_inside(q_len, token, C.part_tokens)
                for column in gl.static_range(PIECES):
                    piece = q_pieces.index(c * PIECES + column)
                    at = [q_begin + token + inside, C.part_tokens - inside, head, 0, column * 64]
                    tma_load(q_desc, at, q_full.index(0), piece)
                if C.tail > 0:
                    at = [q_begin + token + inside, C.part_tokens - inside, head, 0, C.d]
                    tma_load(q_desc, at, q_full.index(0), q_tail_pieces.index(c))

            first, _, _, end = tiles.key_range(row, q_len, k_len, left, right, C)
            low = gl.maximum(row + k_len - q_len - left, 0)
            table = table_ptr + request.to(gl.int64) * table_row
            kv_head = head // kv_group
            # Keys run one block ahead of values: their product comes first.
            for block in range(end - first + 1):
                if block < end - first:
                    stage = kc % C.stages
                    _emptied(k_empty, kc, C)
                    mbarrier.expect(k_full.index(stage), KEY_BYTES)
                    key = (end - 1 - block) * C.block_n
                    _fetch(k_desc, k_pieces, k_full.index(stage), stage, table, kv_head, k_begin, k_len, low, key, C.d, 0, C)
                    if C.tail > 0:
                        _fetch(k_desc, k_tail_pieces, k_full.index(stage), stage, table, kv_head, k_begin, k_len, low, key,
                               C.tail, C.d, C)  # fmt: skip
                    kc += 1
                if block > 0:
                    stage = vc % C.stages
                    _emptied(v_empty, vc, C)
                    mbarrier.expect(v_full.index(stage), VALUE_BYTES)
                    key = (end - block) * C.block_n
                    _fetch(v_desc, v_pieces, v_full.index(stage), stage, table, kv_head, k_begin, k_len, low, key, C.dv, 0, C)
                    vc += 1
        step += 1


@gluon.jit
def _keys_as_pieces(buffer, WIDTH: gl.constexpr, C: gl.constexpr):
    """A buffer of keys or values as the pieces that single copies fill."""
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=5)
    COUNT: gl.constexpr = C.stages * C.parts * WIDTH // 64
    return reinterpret(buffer, buffer.dtype, [COUNT, 1, 1, C.span, 1, 64], layout)


@gluon.jit
def _post(mail, row, q_len, k_len, q_end, head):
    """Tells the consumers about a tile; row -1 ends their work."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    index = gl.arange(0, 8, layout=layout)
    note = gl.where(index == 1, q_len, gl.where(index == 0, row, head))
    note = gl.where(index == 2, k_len, gl.where(index == 3, q_end, note))
    mail.store(note)


@gluon.jit
def _read(mail):
    """What _post wrote. Every thread loads all of it, so that taking it apart costs nothing."""
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    note = mail.load(layout)
    index = gl.arange(0, 8, layout=layout)
    row = gl.sum(gl.where(index == 0, note, 0), axis=0)
    q_len = gl.sum(gl.where(index == 1, note, 0), axis=0)
    k_len = gl.sum(gl.where(index == 2, note, 0), axis=0)
    q_end = gl.sum(gl.where(index == 3, note, 0), axis=0)
    head = gl.sum(gl.where(index == 4, note, 0), axis=0)
    return row, q_len, k_len, q_end, head


@gluon.jit
def _multiply_keys(buffers, stage, consumer: gl.constexpr, C: gl.constexpr):
    """Starts queries · keys."""
    q_buf, q_tail, k_buf, k_tail, _ = buffers
    zero = gl.zeros([C.rows, C.block_n], gl.float32, layout=C.scores_layout)
    q = _matrix(q_buf, consumer, C.rows, C.d)
    k = _matrix(k_buf, stage, C.block_n, C.d).permute((1, 0))
    s = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
    if C.tail > 0:
        q = _matrix(q_tail, consumer, C.rows, C.tail)
        k = _matrix(k_tail, stage, C.block_n, C.tail).permute((1, 0))
        s = warpgroup_mma(q, k, s, is_async=True)
    return s


@gluon.jit
def _step(state, buffers, bars, kc, more, own_first, n0, k_len, scalars, consumer: gl.constexpr, MASKED: gl.constexpr,
          C: gl.constexpr):  # fmt: skip
    """Scores of block kc, and the result of block kc - 1 while their softmax is taken. K(kc) has arrived.

    K(kc + 1) is waited for just before the result: without a branch there the assembler moves the exponentials behind the wait
    for the result, and nothing overlaps.
    """
    o, p, m, l = state
    left, right, cap_scale, score_scale = scalars
    _, _, k_full, k_empty, v_full, v_empty = bars
    v_buf = buffers[4]
    vc = kc - 1
    if C.pingpong:
        _take_turn(consumer)
    s_running = _multiply_keys(buffers, kc % C.stages, consumer, C)
    _filled(v_full, vc, True, C)
    o_running = warpgroup_mma(p, _matrix(v_buf, vc % C.stages, C.block_n, C.dv), o, is_async=True)
    if C.pingpong:
        _give_turn((consumer + 1) % C.consumers)
    s = warpgroup_mma_wait(num_outstanding=1, deps=(s_running,))
    mbarrier.arrive(k_empty.index(kc % C.stages), count=1)
    if C.has_cap:
        s = softmax.tanh(s * cap_scale)
    if MASKED:
        s = softmax.masked(s, own_first, n0, k_len, left, right, C)
    weights, m, l, alpha = softmax.advance(s, m, l, score_scale, MASKED, C)
    _filled(k_full, kc + 1, more, C)
    o, p = warpgroup_mma_wait(num_outstanding=0, deps=(o_running, p))
    mbarrier.arrive(v_empty.index(vc % C.stages), count=1)
    return softmax.scaled(o, alpha), softmax.as_operand(weights, C), m, l


@gluon.jit
def _consume(args, consumer: gl.constexpr, C: gl.constexpr):
    (o_desc, lse_ptr, sinks_ptr, out_ptr, cu_seqlens_q, buffers, o_buf, bars, mail, num_requests, num_rows, heads, packed,
     out_token, out_head, out_width, scalars) = args  # fmt: skip
    left, right, cap_scale, score_scale = scalars
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    v_buf = buffers[4]
    PIECES: gl.constexpr = C.dv // 64
    if C.pingpong and consumer == 0:
        _give_turn(consumer)
    kc = gl.to_tensor(0)
    step = gl.to_tensor(0)
    mbarrier.wait(q_full.index(0), 0)
    row, q_len, k_len, q_end, head = _read(mail)
    while row >= 0:
        part_row = row + consumer * C.part_tokens
        own_first = part_row + k_len - q_len
        first, full_first, full_end, end = tiles.key_range(row, q_len, k_len, left, right, C)
        cut_right, whole, cut_left = tiles.steps_of(first, full_first, full_end, end)

        _filled(k_full, kc, True, C)
        s_running = _multiply_keys(buffers, kc % C.stages, consumer, C)
        s = warpgroup_mma_wait(num_outstanding=0, deps=(s_running,))
        mbarrier.arrive(k_empty.index(kc % C.stages), count=1)
        if C.has_cap:
            s = softmax.tanh(s * cap_scale)
        s = softmax.masked(s, own_first, (end - 1) * C.block_n, k_len, left, right, C)
        weights, m, l = softmax.begin(s, score_scale, C)
        p = softmax.as_operand(weights, C)
        o = gl.zeros([C.rows, C.dv], gl.float32, layout=C.result_layout)
        kc += 1
        block = end - 2
        _filled(k_full, kc, block >= first, C)
        for _ in range(cut_right):
            o, p, m, l = _step((o, p, m, l), buffers, bars, kc, block > first, own_first, block * C.block_n, k_len, scalars,
                               consumer, True, C)  # fmt: skip
            kc += 1
            block -= 1
        for _ in range(whole):
            o, p, m, l = _step((o, p, m, l), buffers, bars, kc, block > first, own_first, block * C.block_n, k_len, scalars,
                               consumer, False, C)  # fmt: skip
            kc += 1
            block -= 1
        if C.has_left:
            for _ in range(cut_left):
                o, p, m, l = _step((o, p, m, l), buffers, bars, kc, block > first, own_first, block * C.block_n, k_len,
                                   scalars, consumer, True, C)  # fmt: skip
                kc += 1
                block -= 1
        if not C.reuse:
            mbarrier.arrive(q_empty.index(0), count=1)

        vc = kc - 1
        _filled(v_full, vc, True, C)
        o_running = warpgroup_mma(p, _matrix(v_buf, vc % C.stages, C.block_n, C.dv), o, is_async=True)
        rows = gl.arange(0, C.rows, layout=gl.SliceLayout(1, C.scores_layout))
        token = part_row + rows // C.group
        own_head = rows % C.group
        inside = (token < q_len) & (own_head < packed)
        sink = gl.zeros([C.rows], gl.float32, layout=gl.SliceLayout(1, C.scores_layout))
        if C.has_sinks:
            sink = gl.load(sinks_ptr + head * packed + own_head, inside, other=0.0).to(gl.float32) * softmax.LOG2E
        factor, lse = softmax.finish(m, l, score_scale, sink, C)
        o, p = warpgroup_mma_wait(num_outstanding=0, deps=(o_running, p))
        mbarrier.arrive(v_empty.index(vc % C.stages), count=1)
        o = softmax.scaled(o, factor)

        tma_store_wait(0)
        _matrix(o_buf, consumer, C.rows, C.dv).store(o.to(o_buf.dtype))
        fence_async_shared()
        rows_left = tiles.rows_inside(q_len, part_row, C.part_tokens)
        o_pieces = _pieces(o_buf, C.consumers * C.out_width // 64, C.part_tokens, C.group)
        for column in gl.static_range(PIECES):
            at = [q_end - q_len + part_row + rows_left, C.part_tokens - rows_left, head, 0, column * 64]
            tma_store(o_desc, at, o_pieces.index(consumer * (C.out_width // 64) + column))
        if C.has_lse:
            lse_at = (q_end - q_len + token).to(gl.int64) * (heads * packed) + head * packed + own_head
            gl.store(lse_ptr + lse_at, lse, inside)
        if C.reuse:
            tma_store_wait(0)
            mbarrier.arrive(q_empty.index(0), count=1)
        step += 1
        mbarrier.wait(q_full.index(0), step & 1)
        row, q_len, k_len, q_end, head = _read(mail)
    if consumer == 0:
        _clear(out_ptr, lse_ptr, cu_seqlens_q, num_requests, num_rows, heads * packed, out_token, out_head, out_width, C)
    tma_store_wait(0)


@gluon.jit
def _clear(out_ptr, lse_ptr, cu_seqlens_q, num_requests, num_rows, heads, out_token, out_head, out_width, C: gl.constexpr):
    """Zero and -inf for the rows after the last request."""
    column = gl.arange(0, C.dv, layout=gl.BlockedLayout([1], [32], [4], [0]))
    zero = gl.zeros([C.dv], out_ptr.dtype.element_ty, layout=gl.BlockedLayout([1], [32], [4], [0]))
    begin = gl.load(cu_seqlens_q + num_requests)
    for row in range(begin + gl.program_id(0), num_rows, gl.num_programs(0)):
        for head in range(heads):
            at = out_ptr + gl.cast(row, gl.int64) * out_token + head * out_head
            gl.store(at + column, zero, column < out_width)
            if C.has_lse:
                gl.store(lse_ptr + gl.cast(row, gl.int64) * heads + head, float("-inf"))


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def _prefill_kernel(
    q_desc,
    k_desc,
    v_desc,
    o_desc,
    out_ptr,
    lse_ptr,
    sinks_ptr,
    cu_seqlens_q,
    lengths,
    table_ptr,
    table_row,
    out_token,
    out_head,
    out_width,
    num_requests,
    num_rows,
    heads,
    packed,
    kv_group,
    left,
    right,
    cap_scale,
    score_scale,
    C: gl.constexpr,
):
    dtype: gl.constexpr = q_desc.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    q_buf = gl.allocate_shared_memory(dtype, [C.consumers, C.rows, C.d], layout)
    k_buf = gl.allocate_shared_memory(dtype, [C.stages, C.block_n, C.d], layout)
    v_buf = gl.allocate_shared_memory(dtype, [C.stages, C.block_n, C.dv], layout)
    q_tail = q_buf
    k_tail = k_buf
    if C.tail > 0:
        q_tail = gl.allocate_shared_memory(dtype, [C.consumers, C.rows, C.tail], layout)
        k_tail = gl.allocate_shared_memory(dtype, [C.stages, C.block_n, C.tail], layout)
    o_buf = q_buf
    if not C.reuse:
        o_buf = gl.allocate_shared_memory(dtype, [C.consumers, C.rows, C.dv], layout)
    mail = gl.allocate_shared_memory(gl.int32, [8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [C.stages, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [C.stages, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [C.stages, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [C.stages, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full.index(0), count=2)
    mbarrier.init(q_empty.index(0), count=C.consumers)
    for stage in gl.static_range(C.stages):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=C.consumers)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=C.consumers)

    descs = (q_desc, k_desc, v_desc)
    buffers = (q_buf, q_tail, k_buf, k_tail, v_buf)
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    scalars = (left, right, cap_scale, score_scale)
    producing = (descs, buffers, bars, mail, cu_seqlens_q, lengths, table_ptr, table_row, num_requests, heads, kv_group, left,
                 right)  # fmt: skip
    consuming = (o_desc, lse_ptr, sinks_ptr, out_ptr, cu_seqlens_q, buffers, o_buf, bars, mail, num_requests, num_rows, heads,
                 packed, out_token, out_head, out_width, scalars)  # fmt: skip
    # Tuples that hold constants stay literal here: Triton 3.6 makes run-time values of them where they have a name.
    if C.consumers == 2:
        gl.warp_specialize(
            [(_consume, (consuming, FIRST, C)), (_consume, (consuming, SECOND, C)), (_produce, (producing, C))],
            [4, 1],
            [232, 40],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (consuming, FIRST, C)),
                (_consume, (consuming, SECOND, C)),
                (_consume, (consuming, THIRD, C)),
                (_produce, (producing, C)),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )


class _Before:
    """What stands in for a tensor whose data begins some bytes earlier."""

    def __init__(self, tensor: Tensor, elements: int):
        self.dtype = tensor.dtype
        self.address = tensor.data_ptr() - elements * tensor.element_size()

    def data_ptr(self) -> int:
        return self.address


def _stride(tensor: Tensor, dim: int) -> int:
    """The stride, or one that a descriptor takes where there is nothing to step over."""
    return tensor.stride(dim) if tensor.shape[dim] > 1 else 8


def _rows_descriptor(rows: Tensor, packed: int, tile: Tile) -> TensorDescriptor:
    """[end of the rows, row before it, head or KV head, head of the group, column] of queries or results [T, Hq, D]."""
    T, Hq, D = rows.shape
    token, head = _stride(rows, 0), _stride(rows, 1)
    span = tile.part_tokens
    return TensorDescriptor(
        _Before(rows, span * token),
        [T + 1, span, Hq // packed, packed, D],
        [token, token, packed * head, head, 1],
        [1, span, 1, tile.group, COLUMNS],
        gl.NVMMASharedLayout(128, 16, rank=5),
    )


def _keys_descriptor(keys: Tensor, tile: Tile) -> TensorDescriptor:
    """[page, end of the rows, row before it, head, column] of keys or values [P, S, Hkv, D] or [T, Hkv, D]."""
    if keys.dim() == 3:
        keys = keys[None]
    P, S, Hkv, D = keys.shape
    row = _stride(keys, 1)
    return TensorDescriptor(
        _Before(keys, tile.span * row),
        [max(P, 1), S + 1, tile.span, Hkv, D],
        [_stride(keys, 0), row, row, _stride(keys, 2), 1],
        [1, 1, tile.span, 1, COLUMNS],
        gl.NVMMASharedLayout(128, 16, rank=5),
    )


@dataclass(frozen=True)
class HopperConfig:
    """Launch configuration: warpgroups of 64 rows, keys of a block, blocks in flight, whether warpgroups take turns."""

    consumers: int
    block_n: int
    stages: int
    pingpong: bool


def candidates(d: int, dv: int, causal: bool, window: bool) -> Iterator[HopperConfig]:
    """What fits in shared memory: two or three warpgroups, with and without turns."""
    for consumers in (2, 3):
        for block_n in (128, 64):
            if block_n == 128 and (consumers == 3 or max(d, dv) > 128) and d > 64:
                continue
            for pingpong in (True, False):
                for stages in (2, 3, 4):
                    config = HopperConfig(consumers, block_n, stages, pingpong)
                    if shape_of(d, dv, config).shared <= SHARED:
                        yield config


@tuned(candidates)
def configure(d: int, dv: int, causal: bool, window: bool) -> HopperConfig:
    """The default for head dimensions that are rounded up to 64, 128, 192 or 256."""
    config = HopperConfig(2, 128 if max(d, dv) <= 128 or (d == 192 and dv == 128) else 64, 2, True)
    more = replace(config, stages=4)
    # Results of their own shared memory leave while the next tile's queries arrive; that is worth more than a stage.
    return more if shape_of(d, dv, more).shared <= SHARED and not shape_of(d, dv, more).reuse else config


def shape_of(d: int, dv: int, config: HopperConfig, **others: Any) -> Tile:
    """The kernel's shape; results leave through the queries' memory where they need it."""
    tail = 64 if d == 192 else 0
    plain: dict[str, Any] = {"kind": "bf16", "group": 1, "span": config.block_n, "page_size": 0}
    plain.update(dict.fromkeys(("has_left", "has_right", "has_cap", "has_sinks", "has_lse"), False))
    tile = Tile(**asdict(config), d=d - tail, tail=tail, dv=dv, reuse=False, **{**plain, **others})
    return replace(tile, reuse=True) if tile.shared > SHARED and dv <= d - tail else tile


def rounded(width: int) -> int:
    """A head dimension as tiles hold it."""
    return next(size for size in (64, 128, 192, 256) if width <= size)


def packed_heads(group: int, max_seqlen_q: int, rows: int) -> int:
    """How many heads of a KV head a tile holds: all, where requests are so short that one would leave it half empty."""
    padded = triton.next_power_of_2(group)
    alone = triton.cdiv(max_seqlen_q, rows) * rows * group
    together = triton.cdiv(max_seqlen_q, max(1, rows // padded)) * max(rows, padded)
    return group if padded <= 64 and together * 1.1 < alone else 1


def launch(
    out: Tensor,
    out_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    page_table: Tensor | None,
    cu_seqlens_q: Tensor,
    lengths: Tensor,
    max_seqlen_q: int,
    causal: bool,
    scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    """Launches one program a multiprocessor; `lengths` is cu_seqlens_k, or seqlens_k where there is a page table."""
    num_rows, Hq, D = q.shape
    Dv, Hkv = v.shape[-1], v.shape[-2]
    if num_rows == 0 or Hq == 0:
        return
    right = 0 if causal else window_right
    d, dv = rounded(D), 256 if rounded(Dv) == 192 else rounded(Dv)
    config = configure.on(q.device, d, dv, right >= 0, window_left >= 0)
    packed = packed_heads(Hq // Hkv, max_seqlen_q, config.consumers * 64)
    page_size = 0 if page_table is None else k.shape[1]
    tile = shape_of(
        d,
        dv,
        config,
        kind="bf16" if q.dtype == torch.bfloat16 else "fp16",
        group=triton.next_power_of_2(packed),
        span=min(page_size, config.block_n) if page_size else config.block_n,
        page_size=page_size,
        has_left=window_left >= 0,
        has_right=right >= 0,
        has_cap=bool(softcap),
        has_sinks=sinks is not None,
        has_lse=out_lse is not None,
    )
    num_requests = cu_seqlens_q.shape[0] - 1
    heads = Hq // packed
    most_tiles = (num_rows // tile.tokens + num_requests) * heads
    scale = D**-0.5 if scale is None else scale
    _prefill_kernel[(max(1, min(num_sms(q.device), most_tiles)),)](
        _rows_descriptor(q, packed, tile),
        _keys_descriptor(k, tile),
        _keys_descriptor(v, tile),
        _rows_descriptor(out, packed, tile),
        out,
        out if out_lse is None else out_lse,
        q if sinks is None else sinks,
        cu_seqlens_q,
        lengths,
        lengths if page_table is None else page_table,
        0 if page_table is None else page_table.stride(0),
        *out.stride()[:2],
        Dv,
        num_requests,
        num_rows,
        heads,
        packed,
        Hq // Hkv // packed,
        window_left,
        right,
        scale / softcap if softcap else 1.0,
        (softcap if softcap else scale) * softmax.LOG2E.value,
        C=Constants(tile),
        num_warps=4,
        maxnreg=REGISTERS[tile.consumers],
    )
