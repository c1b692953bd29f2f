"""The plan of attention_decode on the device: each program adds up all lengths and finds the requests of 32 entries."""

import triton
import triton.language as tl
from torch import Tensor

from penstock.ops.attention.decode_plan import LEAD, SHARE, TILE


@triton.jit
def _units(seqlens_ptr, requests, B, q_len, left, HAS_LEFT: tl.constexpr, LEAD: tl.constexpr, TILE: tl.constexpr):
    """(units, hidden tiles) of these requests; none past the last."""
    length = tl.load(seqlens_ptr + requests, requests < B, other=0)
    hidden = tl.zeros_like(length)
    if HAS_LEFT:
        hidden = tl.maximum(length - q_len - left, 0) // TILE
    tiles = (length + TILE - 1) // TILE - hidden
    return tl.where(tiles > 0, tiles + LEAD, 0), hidden


@triton.jit(do_not_specialize=["B", "C", "num_tickets", "q_len", "left"])
def _plan_kernel(
    unit_start_ptr,
    first_tile_ptr,
    first_request_ptr,
    tickets_ptr,
    seqlens_ptr,
    B,
    C,
    num_tickets,
    q_len,
    left,
    HAS_LEFT: tl.constexpr,
    LEAD: tl.constexpr,
    SHARE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    steps = tl.arange(0, BLOCK)
    total = 0
    for b in tl.range(0, B, BLOCK):
        units, _ = _units(seqlens_ptr, b + steps, B, q_len, left, HAS_LEFT, LEAD, TILE)
        total += tl.sum(units)
    working = tl.minimum(C, tl.cdiv(total, SHARE))
    entries = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    # 64 bits: entries times units passes 2^31 from about 8 million tiles.
    starts = entries.to(tl.int64) * total // tl.maximum(working, 1)
    before = 0
    passed = tl.zeros([ENTRIES], tl.int32)
    for b in tl.range(0, B, BLOCK):
        requests = b + steps
        units, hidden = _units(seqlens_ptr, requests, B, q_len, left, HAS_LEFT, LEAD, TILE)
        ends = before + tl.cumsum(units)
        before += tl.sum(units)
        ended = (ends[None, :] <= starts[:, None]) & (requests < B)[None, :]
        passed += tl.sum(ended.to(tl.int32), 1)
        if tl.program_id(0) == 0:
            tl.store(unit_start_ptr + 1 + requests, ends, requests < B)
            tl.store(first_tile_ptr + requests, hidden, requests < B)
    if tl.program_id(0) == 0:
        tl.store(unit_start_ptr, 0)
    tl.store(first_request_ptr + entries, tl.where(entries < working, passed, B), entries < C)
    for first in tl.range(tl.program_id(0) * BLOCK, num_tickets, tl.num_programs(0) * BLOCK):
        tl.store(tickets_ptr + first + steps, 0, first + steps < num_tickets)


def launch(
    unit_start: Tensor,
    first_tile: Tensor,
    first_request: Tensor,
    tickets: Tensor,
    seqlens_k: Tensor,
    q_len: int,
    window_left: int,
) -> None:
    """Launches over the plan's programs, 32 to a program."""
    C = first_request.shape[0]
    entries = 32
    _plan_kernel[(triton.cdiv(C, entries),)](
        unit_start,
        first_tile,
        first_request,
        tickets,
        seqlens_k,
        seqlens_k.shape[0],
        C,
        tickets.shape[0],
        q_len,
        window_left,
        HAS_LEFT=window_left >= 0,
        LEAD=LEAD,
        SHARE=SHARE,
        TILE=TILE,
        BLOCK=256,
        ENTRIES=entries,
        num_warps=4,
    )
