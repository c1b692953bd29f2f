"""A block mask as lists: which blocks of keys each block of queries meets, in order."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def list_blocks(block_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(listed, before) of a mask [B, Hq, q_blocks, k_blocks], int32.

    listed [B, Hq, q_blocks, k_blocks] begins with the numbers of a row's set elements in order; before [B, Hq, q_blocks,
    k_blocks + 1] counts those that stand before each element, and all of them.
    """
    *rows, columns = block_mask.shape
    listed = torch.empty(block_mask.shape, dtype=torch.int32, device=block_mask.device)
    before = torch.empty(*rows, columns + 1, dtype=torch.int32, device=block_mask.device)
    if before.numel():
        _list_kernel[(before[..., 0].numel(),)](listed, before, block_mask.contiguous(), columns, BLOCK=256)
    return listed, before


@triton.jit
def _list_kernel(listed_ptr, before_ptr, mask_ptr, blocks, BLOCK: tl.constexpr):
    """Of one row of a block mask: the set elements in order, and how many of them stand before each element."""
    row = tl.program_id(0).to(tl.int64)
    count = 0
    for start in tl.range(0, blocks, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < blocks
        present = (tl.load(mask_ptr + row * blocks + columns, inside, other=0) != 0).to(tl.int32)
        before = count + tl.cumsum(present) - present
        tl.store(listed_ptr + row * blocks + before, columns, present != 0)
        tl.store(before_ptr + row * (blocks + 1) + columns, before, inside)
        count += tl.sum(present)
    tl.store(before_ptr + row * (blocks + 1) + blocks, count)
