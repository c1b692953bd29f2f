"""What the kernels of this room and of fused_moe share: a tile's walk along K, and the finding of a tile from group offsets.

A tile has `block_m` tokens and `block_n` output channels. Its accumulator is [block_m, block_n], or the transpose when SWAP.
"""

from dataclasses import dataclass, replace
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

# TMA addresses rows in steps of 16 bytes.
TMA_BYTES = 16


@dataclass(frozen=True)
class TileConfig:
    """Launch configuration of a tiled product.

    Args:
        block_m: tokens of a tile.
        block_n: output channels of a tile.
        block_k: values of K in a step.
        swap: the weights are the first operand of the tensor cores.
        tma: weights come through the tensor memory accelerator, where their strides allow it.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    swap: bool
    tma: bool


def fits_tma(w: Tensor) -> bool:
    """The tensor memory accelerator can address the rows of these weights."""
    begins = w.is_meta or w.data_ptr() % TMA_BYTES == 0
    return begins and w.is_contiguous() and w.numel() > 0 and w.shape[-1] * w.element_size() % TMA_BYTES == 0


def roomy(config: Any, w: Tensor, exact: bool = False) -> Any:
    """The config with smaller tiles where masks, addresses or conversions take registers that whole steps leave free."""
    K, tma = w.shape[-1], config.tma and fits_tma(w)
    if not tma and K % TMA_BYTES:
        # Rows that do not begin at 16 bytes are loaded value by value: a thread has an address for each.
        return replace(config, num_warps=8, block_k=32)
    crowded = not tma or exact or K % config.block_k or 4 * config.block_k >= K
    if not crowded or config.block_m * config.block_n < 2048 * config.num_warps:
        return config
    return replace(config, block_n=64) if config.swap else replace(config, num_warps=8)


def descriptor(w: Tensor, config: TileConfig):
    """(what the kernel takes as `w_desc`, whether it is a TMA descriptor) of weights [..., N, K]."""
    if not (config.tma and fits_tma(w)):
        return w, False
    from triton.tools.tensor_descriptor import TensorDescriptor

    rows = w.view(-1, w.shape[-1])
    return TensorDescriptor.from_tensor(rows, [config.block_n, config.block_k]), True


@triton.jit
def over_tokens(values, SWAP: tl.constexpr):
    """One value a token, to broadcast over a tile."""
    if SWAP:
        return values[None, :]
    else:
        return values[:, None]


@triton.jit
def over_channels(values, SWAP: tl.constexpr):
    """One value an output channel, to broadcast over a tile."""
    if SWAP:
        return values[:, None]
    else:
        return values[None, :]


@triton.jit
def _multiply(x, w, acc, SWAP: tl.constexpr, EXACT: tl.constexpr):
    if EXACT:
        # float16 holds every e4m3 value, and its tensor cores add up in float32.
        x = x.to(tl.float16)
        w = w.to(tl.float16)
    if SWAP:
        return tl.dot(w, tl.trans(x), acc, out_dtype=acc.dtype)
    else:
        return tl.dot(x, tl.trans(w), acc, out_dtype=acc.dtype)


@triton.jit
def _load_w(w_rows, w_live, w_desc, w_first, start, k_live, EVEN_K: tl.constexpr, TMA: tl.constexpr, BK: tl.constexpr):
    if TMA:
        return w_desc.load([w_first, start])
    else:
        mask = w_live[:, None]
        if not EVEN_K:
            mask = mask & k_live[None, :]
        return tl.load(w_rows[:, None] + (start + tl.arange(0, BK))[None, :], mask, other=0.0)


@triton.jit
def _block_scale(
    xs_rows,
    x_live,
    ws_rows,
    w_live,
    block,
    X_BLOCK: tl.constexpr,
    W_BLOCK: tl.constexpr,
    W_ONE: tl.constexpr,
    SWAP: tl.constexpr,
):
    """The scales of one block of K, to broadcast over a tile."""
    if W_ONE:
        ws = tl.load(ws_rows + block)
    elif W_BLOCK:
        ws = over_channels(tl.load(ws_rows + block, w_live, other=0.0), SWAP)
    if X_BLOCK:
        xs = tl.load(xs_rows + block, x_live, other=0.0)
        if W_ONE:
            return over_tokens(xs * ws, SWAP)
        elif W_BLOCK:
            return over_tokens(xs, SWAP) * ws
        else:
            return over_tokens(xs, SWAP)
    else:
        return ws


@triton.jit
def accumulate(
    x_rows,
    x_live,
    w_rows,
    w_live,
    w_desc,
    w_first,
    pair_rows,
    pair_desc,
    pair_first,
    xs_rows,
    ws_rows,
    pair_scale_rows,
    first,
    last,
    K,
    PAIR: tl.constexpr,
    X_BLOCK: tl.constexpr,
    W_BLOCK: tl.constexpr,
    W_ONE: tl.constexpr,
    PAIR_ONE: tl.constexpr,
    SWAP: tl.constexpr,
    EXACT: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """x · wᵀ over the steps first … last - 1 of K; with PAIR also that of a second set of weights.

    Scales of blocks are applied here, every 128 of K in float32; the others are the caller's.

    Args:
        x_rows, w_rows, pair_rows: where each row begins.
        w_desc, w_first, pair_desc, pair_first: with TMA the weights' descriptors and the tile's first rows in them.
        xs_rows, ws_rows, pair_scale_rows: where each row's block scales begin; with W_ONE, or PAIR_ONE for the
            pair, all the tile's channels share theirs.
    """
    ACC: tl.constexpr = tl.int32 if x_rows.dtype.element_ty == tl.int8 else tl.float32
    ROWS: tl.constexpr = BN if SWAP else BM
    COLUMNS: tl.constexpr = BM if SWAP else BN
    acc = tl.zeros([ROWS, COLUMNS], ACC)
    # Without a pair this is a loop-carried nothing.
    second = tl.zeros([ROWS, COLUMNS] if PAIR else [1, 1], ACC)
    steps = tl.arange(0, BK)
    if X_BLOCK or W_BLOCK:
        end = tl.maximum((K - 1) // 128, 0)
        block = tl.minimum(first * BK // 128, end)
        scale = _block_scale(xs_rows, x_live, ws_rows, w_live, block, X_BLOCK, W_BLOCK, W_ONE, SWAP)
        if PAIR:
            pair_scale = _block_scale(xs_rows, x_live, pair_scale_rows, w_live, block, X_BLOCK, W_BLOCK, PAIR_ONE, SWAP)
    for step in tl.range(first, last):
        start = step * BK
        k_live = start + steps < K
        mask = x_live[:, None]
        if not EVEN_K:
            mask = mask & k_live[None, :]
        x = tl.load(x_rows[:, None] + (start + steps)[None, :], mask, other=0.0)
        w = _load_w(w_rows, w_live, w_desc, w_first, start, k_live, EVEN_K, TMA, BK)
        if X_BLOCK or W_BLOCK:
            # The next step's scales are asked for here: a step of tensor-core work is no longer than their way.
            block = tl.minimum((start + BK) // 128, end)
            now = scale
            scale = _block_scale(xs_rows, x_live, ws_rows, w_live, block, X_BLOCK, W_BLOCK, W_ONE, SWAP)
            acc += _multiply(x, w, tl.zeros([ROWS, COLUMNS], ACC), SWAP, EXACT) * now
        else:
            acc = _multiply(x, w, acc, SWAP, EXACT)
        if PAIR:
            w = _load_w(pair_rows, w_live, pair_desc, pair_first, start, k_live, EVEN_K, TMA, BK)
            if X_BLOCK or W_BLOCK:
                now = pair_scale
                pair_scale = _block_scale(xs_rows, x_live, pair_scale_rows, w_live, block, X_BLOCK, W_BLOCK, PAIR_ONE, SWAP)
                second += _multiply(x, w, tl.zeros([ROWS, COLUMNS], ACC), SWAP, EXACT) * now
            else:
                second = _multiply(x, w, second, SWAP, EXACT)
    return acc, second


@triton.jit
def scale_rows(ws_ptr, first_row, channels, tile_first, blocks, W_ONE: tl.constexpr):
    """Where the block scales of a tile's channels begin: one pointer when they share them; first_row is the expert's."""
    if W_ONE:
        return ws_ptr + (first_row + tile_first // 128) * blocks
    else:
        return ws_ptr + (first_row + channels // 128) * blocks


@triton.jit
def walk(local, tiles_m, tiles_n, BAND: tl.constexpr):
    """(tile along tokens, tile along channels): tokens first within bands of BAND tiles, so that neighbours share operands."""
    width = BAND * tiles_n
    band = local // width
    height = tl.minimum(tiles_m - band * BAND, BAND)
    inside = local - band * width
    return band * BAND + inside % height, inside // height


@triton.jit
def find_tile(
    offsets_ptr, tile, num_rows, tiles_n, E, SIZE: tl.constexpr, TAIL: tl.constexpr, BM: tl.constexpr, BAND: tl.constexpr
):
    """(group, first row, end of the group's rows, tile along channels) of a tile; group -1 past the last.

    Tiles are counted over all groups; SIZE is a power of two above their number E. With TAIL the rows after the last group are
    one more group, E.
    """
    groups = tl.arange(0, SIZE)
    begin = tl.load(offsets_ptr + groups, groups <= E, other=0)
    end = tl.load(offsets_ptr + groups + 1, groups < E, other=num_rows)
    count = E
    if TAIL:
        count = E + 1
    tiles = tl.where(groups < count, (tl.maximum(end - begin, 0) + BM - 1) // BM, 0)
    until = tl.cumsum(tiles, 0)
    passed = until * tiles_n <= tile
    group = tl.sum(passed.to(tl.int32), 0)
    here = groups == group
    tiles_m = tl.sum(tl.where(here, tiles, 0), 0)
    before = tl.sum(tl.where(here, until - tiles, 0), 0)
    first = tl.sum(tl.where(here, begin, 0), 0)
    stop = tl.sum(tl.where(here, end, 0), 0)
    tile_m, tile_n = walk(tile - before * tiles_n, tl.maximum(tiles_m, 1), tiles_n, BAND)
    return tl.where(group < count, group, -1), first + tile_m * BM, stop, tile_n


@triton.jit
def own_tile(ids_ptr, tile, tiles_n, first_id, E):
    """What find_tile answers when every row is a group of its own, whose expert is ids[row] - first_id."""
    row = tile // tiles_n
    group = tl.load(ids_ptr + row) - first_id
    return tl.where((group >= 0) & (group < E), group, -1), row, row + 1, tile % tiles_n
