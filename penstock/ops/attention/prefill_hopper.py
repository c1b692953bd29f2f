"""FlashAttention-3 on packed queries; keys packed or in pages.

One program a multiprocessor. A warp fetches queries, keys and values through the tensor memory accelerator; warpgroups of 64
rows compute. Each starts the product of queries and the next block of keys before the product of weights and values of this
block, and takes the exponentials of the one while the tensor cores work on the other; weights never leave registers. The last
product of a tile and its way out overlap with the first scores of the next. Barriers in shared memory tell what belongs to
whom: `full` that a block of keys or values, or a tile's queries, has arrived, `empty` that all have read it.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from penstock.core.device import H200, num_sms
from penstock.core.gluon import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    reinterpret,
    thread_barrier,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from penstock.core.tuning import tuned
from penstock.ops.attention import _load_hopper as load
from penstock.ops.attention import _softmax_hopper as softmax
from penstock.ops.attention import _tiles_hopper as tiles
from penstock.ops.attention._blocks_triton import list_blocks
from penstock.ops.attention._softmax_triton import NO_SCALES, fp8_scales
from penstock.ops.attention._tiles_hopper import Constants, Tile

FIRST, SECOND, THIRD = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
# Named barriers of the warpgroups' turns; Triton uses those from 0 up, one for each partition and some more.
TURN = gl.constexpr(8)
# Keys and values of one section of heads; the H200's L2 holds 60 MB and also serves queries and results.
SECTION_BYTES = 36 << 20
# Left for tiles by the barriers; registers a thread is launched with, before the warpgroups share them out again.
SHARED = H200.shared_memory - 1024
REGISTERS = {2: 168, 3: 128}
KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8"}
UNSPECIALIZED = ["table_row", "k_pages", "v_pages", "scale_pages", "q_scale_token", "q_scale_head", "k_scale_head"]
UNSPECIALIZED += ["v_scale_head", "out_token", "out_head", "out_width", "num_requests", "num_rows"]
UNSPECIALIZED += ["heads", "num_sinks", "has_lse", "section", "kv_group", "left", "right", "cap_scale", "score_scale"]
UNSPECIALIZED += ["mask_rows", "mask_columns"]


@gluon.jit
def _take_turn(consumer: gl.constexpr):
    barrier = gl.to_tensor(TURN + consumer)
    gl.inline_asm_elementwise("bar.sync $1, 256; mov.u32 $0, 0;", "=r,r", [barrier], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _give_turn(consumer: gl.constexpr):
    barrier = gl.to_tensor(TURN + consumer)
    gl.inline_asm_elementwise("bar.arrive $1, 256; mov.u32 $0, 0;", "=r,r", [barrier], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _matrix(buffer, index, ROWS: gl.constexpr, WIDTH: gl.constexpr, BITS: gl.constexpr):
    """One part of a buffer as an operand of a product."""
    layout: gl.constexpr = gl.NVMMASharedLayout(128, BITS, rank=2)
    return reinterpret(buffer.index(index), buffer.dtype, [ROWS, WIDTH], layout)


@gluon.jit
def _multiply_keys(buffers, kc, part, C: gl.constexpr):
    """Starts queries · keys of block kc; `part` is the warpgroup's place among the queries held."""
    q_buf, q_tail, k_buf, k_tail, _, _, _ = buffers
    zero = gl.zeros([C.rows, C.block_n], gl.float32, layout=C.scores_layout)
    q = _matrix(q_buf, part, C.rows, C.d, C.bits)
    k = _matrix(k_buf, kc % C.stages, C.block_n, C.d, C.bits).permute((1, 0))
    s = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
    if C.tail > 0:
        q = _matrix(q_tail, part, C.rows, C.tail, C.bits)
        k = _matrix(k_tail, kc % C.stages, C.block_n, C.tail, C.bits).permute((1, 0))
        s = warpgroup_mma(q, k, s, is_async=True)
    return s


@gluon.jit
def _values(buffers, vc, C: gl.constexpr):
    """The block of values as the right operand; FP8's lie turned, as its products need them."""
    if C.kind == "fp8":
        layout: gl.constexpr = gl.NVMMASharedLayout(C.values_swizzle, 8, rank=2)
        v = reinterpret(buffers[4].index(vc % C.stages), buffers[4].dtype, [C.dv, C.block_n], layout).permute((1, 0))
    else:
        v = _matrix(buffers[4], vc % C.stages, C.block_n, C.dv, C.bits)
    return v


@gluon.jit
def _multiply_values(p, buffers, vc, o, C: gl.constexpr):
    """Starts weights · values of block vc."""
    if C.codes:
        p = softmax.unpacked(p, C)
    return warpgroup_mma(p, _values(buffers, vc, C), o, is_async=True)


@gluon.jit
def _finished(o_running, p, OUTSTANDING: gl.constexpr, C: gl.constexpr):
    """The result, when at most so many later products run; its weights live until then, which 8-bit registers cannot say."""
    if C.kind == "fp8" and not C.codes:
        o = warpgroup_mma_wait(num_outstanding=OUTSTANDING, deps=(o_running,))
    else:
        o, p = warpgroup_mma_wait(num_outstanding=OUTSTANDING, deps=(o_running, p))
    return o


@gluon.jit
def _scores(s, buffers, kc, cap_scale, C: gl.constexpr):
    """Raw scores with the scales of their keys and the cap."""
    if C.token_scales:
        s = softmax.scale_keys(s, buffers[5].index(kc % C.stages), C)
    if C.has_cap:
        s = softmax.tanh(softmax.times(s, cap_scale, C))
    return s


@gluon.jit
def _clean_values(buffers, vc, keys, C: gl.constexpr):
    """Zero for the values of slots that hold no key: they may be NaN, and 0 · NaN is NaN.

    Every warpgroup cleans for itself; what the others write meanwhile is the same.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    shared: gl.constexpr = gl.NVMMASharedLayout(C.values_swizzle, 8, rank=2)
    codes = reinterpret(buffers[4].index(vc % C.stages), gl.int8, [C.dv, C.block_n], shared)
    column = gl.arange(0, C.block_n, layout=gl.SliceLayout(0, layout))
    codes.store(gl.where((column < keys)[None, :], codes.load(layout), 0).to(gl.int8))
    fence_async_shared()
    thread_barrier()


@gluon.jit
def _step(state, buffers, bars, kc, part, more, own_first, n0, k_len, scalars, consumer: gl.constexpr, MASKED: gl.constexpr,
          C: gl.constexpr):  # fmt: skip
    """Scores of block kc, and the result of block kc - 1 while their softmax is taken. K(kc) has arrived.

    K(kc + 1) is waited for just before the result: without a branch there the assembler moves the exponentials behind the wait
    for the result, and nothing overlaps.
    """
    o, p, m, l = state
    left, right, cap_scale, score_scale = scalars
    _, _, k_full, k_empty, v_full, v_empty = bars
    vc = kc - 1
    if C.pingpong:
        _take_turn(consumer)
    s_running = _multiply_keys(buffers, kc, part, C)
    load.filled(v_full, vc, True, C.stages)
    if not C.codes:
        p = softmax.taken(p, C)
    o_running = _multiply_values(p, buffers, vc, o, C)
    if C.pingpong:
        _give_turn((consumer + 1) % C.consumers)
    s = warpgroup_mma_wait(num_outstanding=1, deps=(s_running,))
    s = _scores(s, buffers, kc, cap_scale, C)
    if C.has_blocks and MASKED:
        n0 = load.block_held(buffers[6].index(kc % C.stages)) * C.block_n
    if not C.token_scales:
        mbarrier.arrive(k_empty.index(kc % C.stages), count=1)
    if MASKED:
        s = softmax.masked(s, own_first, n0, k_len, left, right, C)
    weights, m, l, alpha = softmax.advance(s, m, l, score_scale, MASKED, C)
    if C.token_scales:
        # Their loads are over by now: a barrier alone does not wait for them, and the next copy could overtake them.
        mbarrier.arrive(k_empty.index(kc % C.stages), count=1)
    if C.codes:
        weights = softmax.rounded(weights, C)
    load.filled(k_full, kc + 1, more, C.stages)
    o = _finished(o_running, p, 0, C)
    mbarrier.arrive(v_empty.index(vc % C.stages), count=1)
    return softmax.scaled(o, alpha), softmax.held(weights, C), m, l


@gluon.jit
def _store(o, note, o_desc, o_buf, part, consumer: gl.constexpr, C: gl.constexpr):
    """Sends the results of a warpgroup's part of a tile on their way."""
    row, q_len, _, q_end, head, _, _, _ = note
    tma_store_wait(0)
    _matrix(o_buf, part, C.rows, C.dv, 16).store(o.to(o_buf.dtype))
    fence_async_shared()
    token = row + consumer * C.part_tokens
    inside = tiles.rows_inside(q_len, token, C.part_tokens)
    HELD: gl.constexpr = C.out_width // 64
    pieces = load.rows_as_pieces(o_buf, C.out_parts * HELD, 16, C)
    for column in gl.static_range(C.dv // 64):
        at = [load.END, q_end - q_len + token + inside, load.END - inside, head * C.group, column * 64]
        tma_store(o_desc, at, pieces.index(part * HELD + column))


@gluon.jit
def _consume(args, consumer: gl.constexpr, C: gl.constexpr):
    (o_desc, lse_ptr, sinks_ptr, out_ptr, cu_seqlens_q, buffers, o_buf, bars, mail, num_requests, num_rows, heads, num_sinks,
     has_lse, out_token, out_head, out_width, kv_group, scales, scale_strides, left, right, cap_scale,
     score_scale) = args  # fmt: skip
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    q_scale, k_scale, v_scale = scales
    if C.pingpong and consumer == 0:
        _give_turn(consumer)
    kc = gl.to_tensor(0)
    step = gl.to_tensor(0)
    load.filled(q_full, 0, True, C.q_stages)
    note = load.read(mail.index(0))
    load.filled(k_full, kc, note[0] >= 0, C.stages)
    s_running = _multiply_keys(buffers, kc, consumer, C)
    s = warpgroup_mma_wait(num_outstanding=0, deps=(s_running,))
    while note[0] >= 0:
        row, q_len, k_len, q_end, head, listed_first, listed_full, listed_end = note
        part_row = row + consumer * C.part_tokens
        own_first = part_row + k_len - q_len
        part = step % C.q_stages * C.consumers + consumer
        first, full_first, full_end, end = tiles.key_range(row, q_len, k_len, left, right, C)
        stop = end
        if C.has_blocks:
            # Places in the tile's list, from 0 on.
            first, full_first, full_end, end = gl.to_tensor(0), listed_first, listed_full, listed_end
            stop = load.block_held(buffers[6].index(kc % C.stages)) + 1
        cut_right, whole, cut_left = tiles.steps_of(first, full_first, full_end, end)

        rows = gl.arange(0, C.rows, layout=gl.SliceLayout(1, C.scores_layout))
        token = part_row + rows // C.group
        own_head = head * C.group + rows % C.group
        scalars = (left, right, cap_scale, score_scale)
        value_scale = 1.0
        if C.kind == "fp8":
            kv_head = head // kv_group
            q_token, q_head, k_head, v_head = scale_strides
            q_at = (q_end - q_len + token).to(gl.int64) * q_token + own_head * q_head
            factor = gl.load(q_scale + q_at, token < q_len, other=1.0)
            if not C.token_scales:
                factor = factor * gl.load(k_scale + kv_head * k_head)
            value_scale = gl.load(v_scale + kv_head * v_head)
            if C.has_cap:
                scalars = (left, right, factor * cap_scale, factor * 0.0 + score_scale)
            else:
                scalars = (left, right, cap_scale, factor * score_scale)
        s = _scores(s, buffers, kc, scalars[2], C)
        s = softmax.masked(s, own_first, (stop - 1) * C.block_n, k_len, left, right, C)
        weights, m, l = softmax.begin(s, scalars[3], C)
        mbarrier.arrive(k_empty.index(kc % C.stages), count=1)
        if C.codes:
            weights = softmax.rounded(weights, C)
        p = softmax.held(weights, C)
        o = gl.zeros([C.rows, C.dv], gl.float32, layout=C.result_layout)
        if C.kind == "fp8" and stop * C.block_n > k_len:
            load.filled(v_full, kc, True, C.stages)
            _clean_values(buffers, kc, k_len - (stop - 1) * C.block_n, C)
        kc += 1
        block = end - 2
        load.filled(k_full, kc, block >= first, C.stages)
        for _ in range(cut_right):
            o, p, m, l = _step((o, p, m, l), buffers, bars, kc, part, block > first, own_first, block * C.block_n, k_len,
                               scalars, consumer, True, C)  # fmt: skip
            kc += 1
            block -= 1
        for _ in range(whole):
            o, p, m, l = _step((o, p, m, l), buffers, bars, kc, part, block > first, own_first, block * C.block_n, k_len,
                               scalars, consumer, False, C)  # fmt: skip
            kc += 1
            block -= 1
        if C.has_left:
            for _ in range(cut_left):
                o, p, m, l = _step((o, p, m, l), buffers, bars, kc, part, block > first, own_first, block * C.block_n, k_len,
                                   scalars, consumer, True, C)  # fmt: skip
                kc += 1
                block -= 1
        if not C.reuse:
            mbarrier.arrive(q_empty.index(step % C.q_stages), count=1)

        vc = kc - 1
        load.filled(v_full, vc, True, C.stages)
        if not C.codes:
            p = softmax.taken(p, C)
        o_running = _multiply_values(p, buffers, vc, o, C)
        sink = gl.load(sinks_ptr + own_head, own_head < num_sinks, other=float("-inf")).to(gl.float32) * softmax.LOG2E
        factor, lse = softmax.finish(m, l, scalars[3], sink, C)
        factor *= value_scale
        if C.q_stages == 2:
            # Where queries have two places, the next tile's are there by now.
            load.filled(q_full, step + 1, True, C.q_stages)
            following = load.read(mail.index((step + 1) % C.q_stages))
            load.filled(k_full, kc, following[0] >= 0, C.stages)
            s_running = _multiply_keys(buffers, kc, (step + 1) % C.q_stages * C.consumers + consumer, C)
            o = _finished(o_running, p, 1, C)
        else:
            o = _finished(o_running, p, 0, C)
        mbarrier.arrive(v_empty.index(vc % C.stages), count=1)
        if C.reuse:
            _store(softmax.scaled(o, factor), note, o_desc, o_buf, part, consumer, C)
        else:
            _store(softmax.scaled(o, factor), note, o_desc, o_buf, gl.to_tensor(consumer), consumer, C)
        lse_at = (q_end - q_len + token).to(gl.int64) * heads + own_head
        gl.store(lse_ptr + lse_at, lse, token < q_len * has_lse)
        if C.reuse:
            tma_store_wait(0)
            mbarrier.arrive(q_empty.index(step % C.q_stages), count=1)
        if C.q_stages == 1:
            load.filled(q_full, step + 1, True, C.q_stages)
            following = load.read(mail.index(0))
            load.filled(k_full, kc, following[0] >= 0, C.stages)
            s_running = _multiply_keys(buffers, kc, gl.to_tensor(consumer), C)
        s = warpgroup_mma_wait(num_outstanding=0, deps=(s_running,))
        note = following
        step += 1
    if consumer == 0:
        tiles.clear(out_ptr, lse_ptr, cu_seqlens_q, num_requests, num_rows, heads, has_lse, out_token, out_head, out_width, C)
    tma_store_wait(0)


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def _prefill_kernel(
    q_desc,
    k_desc,
    v_desc,
    o_desc,
    scale_desc,
    out_ptr,
    lse_ptr,
    sinks_ptr,
    q_scale,
    k_scale,
    v_scale,
    cu_seqlens_q,
    lengths,
    table_ptr,
    table_row,
    k_pages,
    v_pages,
    scale_pages,
    q_scale_token,
    q_scale_head,
    k_scale_head,
    v_scale_head,
    out_token,
    out_head,
    out_width,
    num_requests,
    num_rows,
    heads,
    num_sinks,
    has_lse,
    section,
    kv_group,
    left,
    right,
    cap_scale,
    score_scale,
    listed,
    before,
    mask_rows,
    mask_columns,
    C: gl.constexpr,
):
    dtype: gl.constexpr = q_desc.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout(128, C.bits, rank=2)
    q_buf = gl.allocate_shared_memory(dtype, [C.q_stages * C.consumers, C.rows, C.d], layout)
    k_buf = gl.allocate_shared_memory(dtype, [C.stages, C.block_n, C.d], layout)
    v_buf = gl.allocate_shared_memory(dtype, [C.stages, C.block_n, C.dv], layout)
    scale_buf = v_buf
    if C.token_scales:
        scale_layout: gl.constexpr = gl.NVMMASharedLayout(0, 32, rank=2)
        scale_buf = gl.allocate_shared_memory(gl.float32, [C.stages, 1, C.block_n], scale_layout)
    q_tail = q_buf
    k_tail = k_buf
    if C.tail > 0:
        q_tail = gl.allocate_shared_memory(dtype, [C.q_stages * C.consumers, C.rows, C.tail], layout)
        k_tail = gl.allocate_shared_memory(dtype, [C.stages, C.block_n, C.tail], layout)
    o_buf = q_buf
    if not C.reuse:
        o_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
        o_buf = gl.allocate_shared_memory(o_desc.dtype, [C.consumers, C.rows, C.dv], o_layout)
    mail = gl.allocate_shared_memory(gl.int32, [C.q_stages, 8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    walked = mail
    blocks = ()
    if C.has_blocks:
        walked = gl.allocate_shared_memory(gl.int32, [C.stages, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        blocks = (listed, before, mask_rows, mask_columns)  # type: ignore[assignment]
    q_full = gl.allocate_shared_memory(gl.int64, [C.q_stages, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [C.q_stages, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [C.stages, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [C.stages, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [C.stages, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [C.stages, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(C.q_stages):
        mbarrier.init(q_full.index(stage), count=2)
        mbarrier.init(q_empty.index(stage), count=C.consumers)
    for stage in gl.static_range(C.stages):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=C.consumers)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=C.consumers)

    descs = (q_desc, k_desc, v_desc, scale_desc)
    buffers = (q_buf, q_tail, k_buf, k_tail, v_buf, scale_buf, walked)
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    page_steps = (k_pages, v_pages, scale_pages)
    scales = (q_scale, k_scale, v_scale)
    scale_strides = (q_scale_token, q_scale_head, k_scale_head, v_scale_head)
    producing = (descs, buffers, bars, mail, cu_seqlens_q, lengths, table_ptr, table_row, page_steps, num_requests,
                 heads // C.group, section, kv_group, left, right, blocks)  # fmt: skip
    consuming = (o_desc, lse_ptr, sinks_ptr, out_ptr, cu_seqlens_q, buffers, o_buf, bars, mail, num_requests, num_rows, heads,
                 num_sinks, has_lse, out_token, out_head, out_width, kv_group, scales, scale_strides, left, right, cap_scale,
                 score_scale)  # fmt: skip
    # Tuples that hold constants stay literal here: Triton 3.6 makes run-time values of them where they have a name.
    if C.consumers == 2:
        gl.warp_specialize(
            [(_consume, (consuming, FIRST, C)), (_consume, (consuming, SECOND, C)), (load.produce, (producing, C))],
            [4, 1],
            [232, 40],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (consuming, FIRST, C)),
                (_consume, (consuming, SECOND, C)),
                (_consume, (consuming, THIRD, C)),
                (load.produce, (producing, C)),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )


@dataclass(frozen=True)
class HopperConfig:
    """Launch configuration: warpgroups of 64 rows, keys of a block, blocks in flight, whether they take turns; then as Tile."""

    consumers: int
    block_n: int
    stages: int
    pingpong: bool
    codes: bool = False
    chains: bool = False


def candidates(d: int, dv: int, causal: bool, window: bool, blocks: bool, itemsize: int) -> Iterator[HopperConfig]:
    """What fits in shared memory: two warpgroups, or three for 16 bits without a block mask, with and without turns."""
    for consumers in (2,) if blocks or itemsize == 1 else (2, 3):
        for block_n in (128, 64):
            if block_n == 128 and (consumers == 3 or max(d, dv) > 128) and d > 64:
                continue
            for pingpong in (True, False):
                for stages in (2, 3, 4):
                    config = HopperConfig(consumers, block_n, stages, pingpong)
                    if itemsize == 1:
                        config = replace(config, codes=True, chains=True)
                    if shape_of(d, dv, config, kind="fp8" if itemsize == 1 else "bf16").shared <= SHARED:
                        yield config


@tuned(candidates)
def configure(d: int, dv: int, causal: bool, window: bool, blocks: bool, itemsize: int) -> HopperConfig:
    """The default for head dimensions that are rounded up to 64, 128, 192 or 256."""
    if itemsize == 1:
        return HopperConfig(2, 128, 3, False, codes=True, chains=True)
    wide = max(d, dv) <= 128 or (d, dv) == (192, 128)
    return HopperConfig(2, 128 if wide else 64, 4 if max(d, dv) == 64 else 2, True)


def shape_of(d: int, dv: int, config: HopperConfig, **others: Any) -> Tile:
    """The kernel's shape: queries have two places where these fit, and results one of their own unless nothing else fits."""
    tail = 64 if d == 192 else 0
    plain: dict[str, Any] = {"kind": "bf16", "group": 1, "span": config.block_n, "page_size": 0}
    plain.update(dict.fromkeys(("has_left", "has_right", "has_cap", "token_scales", "has_blocks"), False))
    tile = Tile(**asdict(config), d=d - tail, tail=tail, dv=dv, q_stages=2, reuse=False, **{**plain, **others})
    tile = replace(tile, q_stages=1) if tile.shared > SHARED else tile
    return replace(tile, reuse=True) if tile.shared > SHARED and dv <= d - tail else tile


def rounded(width: int) -> int:
    """A head dimension as tiles hold it."""
    return next(size for size in (64, 128, 192, 256) if width <= size)


def packed_heads(group: int, max_seqlen_q: int, rows: int) -> int:
    """How many heads of a KV head a tile holds: more than one where requests are so short that one leaves much of it empty."""
    packed = min(group & -group, 64)
    alone = triton.cdiv(max_seqlen_q, rows) * rows
    together = triton.cdiv(max_seqlen_q * packed, rows) * rows // packed
    return packed if together * 1.1 < alone else 1


def section_of(key_bytes: int, Hkv: int) -> int:
    """How many KV heads are worked on together: as many as the L2 holds the keys of; it divides their number."""
    return max(count for count in range(1, Hkv + 1) if Hkv % count == 0 and (count == 1 or count * key_bytes <= SECTION_BYTES))


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
    max_seqlen_k: int,
    causal: bool,
    scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float | None,
    sinks: Tensor | None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    block_mask: Tensor | None = None,
) -> None:
    """Launches one program a multiprocessor; `lengths` is cu_seqlens_k, or seqlens_k where there is a page table."""
    num_rows, Hq, D = q.shape
    Dv, Hkv = v.shape[-1], v.shape[-2]
    if num_rows == 0 or Hq == 0:
        return
    right = 0 if causal else window_right
    fp8 = q.dtype is torch.float8_e4m3fn
    d, dv = (128, 128) if fp8 else (rounded(D), 256 if rounded(Dv) == 192 else rounded(Dv))
    masked = block_mask is not None
    config = configure.on(q.device, d, dv, right >= 0, window_left >= 0, masked, q.element_size())
    packed = 1 if masked else packed_heads(Hq // Hkv, max_seqlen_q, config.consumers * 64)
    page_size = 0 if page_table is None else k.shape[1]
    tile = shape_of(
        d,
        dv,
        config,
        kind=KINDS[q.dtype],
        group=packed,
        span=min(page_size, config.block_n) if page_size else config.block_n,
        page_size=page_size,
        has_left=window_left >= 0,
        has_right=right >= 0,
        has_cap=bool(softcap),
        token_scales=k_scale is not None and k_scale.dim() == 3,
        has_blocks=masked,
    )
    if config.codes and not fp8:
        raise ValueError(f"codes are of FP8 weights, got {config} for {KINDS[q.dtype]}")
    blocks: tuple[Any, ...] = (None,) * 4
    if block_mask is not None:
        if tile.tokens != tiles.MASK_BLOCK.value:
            raise ValueError(f"a tile of a block mask must hold {tiles.MASK_BLOCK.value} queries, {config} holds {tile.tokens}")
        blocks = (*list_blocks(block_mask), *block_mask.shape[2:])
    num_requests = cu_seqlens_q.shape[0] - 1
    most_tiles = (num_rows // tile.tokens + num_requests) * (Hq // packed)
    k_descriptor, k_pages = (load.dealt_descriptor if fp8 else load.keys_descriptor)(k, tile)
    v_descriptor, v_pages = (load.turned_descriptor if fp8 else load.keys_descriptor)(v, tile)
    scale_descriptor, scale_pages = (k_descriptor, 0)
    if k_scale is not None and tile.token_scales:
        scale_descriptor, scale_pages = load.scales_descriptor(k_scale, tile)
    scales, strides = fp8_scales(q, q_scale, k_scale, v_scale) if fp8 else NO_SCALES
    scale = D**-0.5 if scale is None else scale
    _prefill_kernel[(max(1, min(num_sms(q.device), most_tiles)),)](
        load.rows_descriptor(q, tile),
        k_descriptor,
        v_descriptor,
        load.rows_descriptor(out, tile),
        scale_descriptor,
        out,
        out if out_lse is None else out_lse,
        out if sinks is None else sinks,
        *(lengths if scale is None else scale for scale in scales),
        cu_seqlens_q,
        lengths,
        lengths if page_table is None else page_table,
        0 if page_table is None else page_table.stride(0),
        k_pages,
        v_pages,
        scale_pages,
        strides[0],
        strides[1],
        strides[4],
        strides[5],
        *out.stride()[:2],
        Dv,
        num_requests,
        num_rows,
        Hq,
        0 if sinks is None else Hq,
        int(out_lse is not None),
        section_of(max_seqlen_k * num_requests * (D + Dv) * q.element_size(), Hkv) * (Hq // Hkv) // packed,
        Hq // Hkv // packed,
        window_left,
        right,
        scale / softcap if softcap else 1.0,
        (softcap if softcap else scale) * softmax.LOG2E.value,
        *blocks,
        C=Constants(tile),
        num_warps=4,
        maxnreg=REGISTERS[tile.consumers],
    )
