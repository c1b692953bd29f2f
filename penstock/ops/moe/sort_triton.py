"""Slots in the order of their experts: each program finds those of one expert, by counting, so that no two runs differ."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

# Ids that a program looks at in one step.
BLOCK = 4096


@triton.jit
def _expert_of(ids_ptr, slots, S, expert_offset, E):
    """The local expert of slots, E for those of other ranks, and more for those that do not exist."""
    ids = tl.load(ids_ptr + slots, slots < S, other=0) - expert_offset
    return tl.where(slots < S, tl.where((ids >= 0) & (ids < E), ids, E), E + 1)


@triton.jit(do_not_specialize=["S", "E", "expert_offset"])
def _sort_kernel(
    tokens_ptr,
    position_ptr,
    offsets_ptr,
    ids_ptr,
    S,
    E,
    expert_offset,
    TOP_K: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
    expert = tl.program_id(0)
    slots = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int32)
    for first in range(0, S, BLOCK):
        before += (_expert_of(ids_ptr, first + slots, S, expert_offset, E) < expert).to(tl.int32)
    start = tl.sum(before, 0)
    tl.store(offsets_ptr + expert, start)
    for first in range(0, S, BLOCK):
        at = first + slots
        mine = _expert_of(ids_ptr, at, S, expert_offset, E) == expert
        row = start + tl.cumsum(mine.to(tl.int32), 0) - 1
        # Slots of other ranks have no row.
        tl.store(position_ptr + at, tl.where(expert < E, row, -1), mine)
        tl.store(tokens_ptr + row, at // TOP_K, mine & (expert < E))
        start += tl.sum(mine.to(tl.int32), 0)


def sort_slots(topk_ids: Tensor, experts: int, expert_offset: int, early: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts the slots of topk_ids [T, k] by expert; slots of one expert keep their order.

    Returns: all int32: tokens [T · k], the token of each sorted row; position [T · k], the sorted row of each slot, -1 for
        experts outside [expert_offset, expert_offset + experts); offsets [experts + 1], where the rows of each expert begin.
    """
    S = topk_ids.numel()
    tokens, position = torch.empty_like(topk_ids.view(-1)), torch.empty_like(topk_ids.view(-1))
    offsets = topk_ids.new_empty(experts + 1)
    block = min(BLOCK, max(32, triton.next_power_of_2(S)))
    _sort_kernel[(experts + 1,)](
        tokens,
        position,
        offsets,
        topk_ids,
        S,
        experts,
        expert_offset,
        TOP_K=topk_ids.shape[1],
        EARLY=early,
        BLOCK=block,
        num_warps=1 if block <= 256 else 4 if block <= 1024 else 8,
    )
    return tokens, position, offsets
