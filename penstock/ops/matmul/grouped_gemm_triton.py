"""One program for each tile, at most as many as the shapes allow; the offsets say which group a tile belongs to.

Tiles are counted group by group, tokens first, so that the tiles that read the same weights run together; the hardware deals
them to multiprocessors as they become free, which evens out groups of different size.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from penstock.core.tuning import tuned
from penstock.ops.matmul.scales import kinds
from penstock.ops.matmul.tile_triton import (
    TileConfig,
    accumulate,
    descriptor,
    find_tile,
    over_channels,
    over_tokens,
    own_tile,
    roomy,
    scale_rows,
)

BAND = 16


def candidates(kind: str, rows: int, N: int, K: int) -> Iterator[TileConfig]:
    """Configs worth timing."""
    step = 64 if kind == "bf16" else 128
    if rows <= 64:
        for block_m in sorted({max(16, rows), max(16, 2 * rows)} - {128}):
            for block_n, block_k, warps in ((128, step, 4), (64, step, 4), (128, step, 8), (128, 2 * step, 4)):
                for stages in (2, 3, 4, 6):
                    size = (block_m + block_n) * block_k * (2 if kind == "bf16" else 1) * stages
                    if (size >= 40_000 or 4 * step >= K) and size <= 200_000 and (block_k == step or kind != "fp8_block"):
                        yield TileConfig(block_m, block_n, block_k, warps, stages, True, True)
        return
    for block_m, block_n, warps, stages in (
        (128, 256, 8, 3),
        (128, 128, 8, 3),
        (128, 128, 8, 4),
        (64, 128, 4, 4),
        (64, 128, 4, 3),
    ):
        for tma in (True, False):
            yield TileConfig(block_m, block_n, step, warps, stages, False, tma)


@tuned(candidates)
def configure(kind: str, rows: int, N: int, K: int) -> TileConfig:
    """The default for a kind of call.

    Args:
        kind: "bf16", "fp8", or "fp8_block" for products that are moved to float32 every 128 of K.
        rows: of a group on average, rounded up to a power of two.
    """
    step = 64 if kind == "bf16" else 128
    if rows <= 64:
        # With a short K more programs on a multiprocessor hide each other's beginning.
        stages = 4 if 4 * step < K else 3
        return TileConfig(max(16, rows), 128, step, 4, stages, True, True)
    if kind == "fp8_block":
        return TileConfig(64, 128, step, 4, 4, False, True)
    return TileConfig(128, 256 if N >= 256 else 128, step, 8, 3, False, True)


@triton.jit
def rows_of(gather_ptr, first, stop, count, GATHER: tl.constexpr, BM: tl.constexpr):
    """(rows of the result, which exist, rows of x, which can be read)."""
    rows = first + tl.arange(0, BM)
    live = rows < stop
    if GATHER:
        source = tl.load(gather_ptr + rows, live, other=-1)
        return rows, live, source.to(tl.int64), live & (source >= 0) & (source < count)
    else:
        return rows, live, rows.to(tl.int64), live


@triton.jit(do_not_specialize=["num_rows", "x_count", "first_id", "E"])
def grouped_kernel(
    out_ptr,
    x_ptr,
    w_ptr,
    w_desc,
    xs_ptr,
    ws_ptr,
    offsets_ptr,
    gather_ptr,
    num_rows,
    x_count,
    N,
    K,
    tiles_n,
    out_stride,
    x_stride,
    w_expert,
    w_row,
    ws_expert,
    first_id,
    E,
    SIZE: tl.constexpr,
    OWN: tl.constexpr,
    GATHER: tl.constexpr,
    TAIL: tl.constexpr,
    XS: tl.constexpr,
    WS: tl.constexpr,
    SWAP: tl.constexpr,
    EXACT: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    EARLY: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BAND: tl.constexpr,
):
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    if OWN:
        group, first, stop, tile_n = own_tile(offsets_ptr, tl.program_id(0), tiles_n, first_id, E)
    else:
        group, first, stop, tile_n = find_tile(offsets_ptr, tl.program_id(0), num_rows, tiles_n, E, SIZE, TAIL, BM, BAND)
    if group < 0:
        return
    rows, live, source, x_live = rows_of(gather_ptr, first, stop, x_count, GATHER, BM)
    channels = tile_n * BN + tl.arange(0, BN)
    w_live = channels < N
    # Rows after the last group are zeros: no steps, and no weights to read.
    last = tl.where(group < E, (K + BK - 1) // BK, 0)
    x_live = x_live & (group < E)
    expert = tl.minimum(group, E - 1).to(tl.int64)
    x_rows = x_ptr + source * x_stride
    w_rows = w_ptr + expert * w_expert + channels.to(tl.int64) * w_row
    w_first = (expert * N).to(tl.int32) + tile_n * BN
    blocks = tl.cdiv(K, 128)
    xs_rows = xs_ptr + source * blocks
    W_ONE: tl.constexpr = WS == "block" and 128 % BN == 0
    ws_rows = scale_rows(ws_ptr, expert * tl.cdiv(N, 128), channels, tile_n * BN, blocks, W_ONE)
    acc, _ = accumulate(x_rows, x_live, w_rows, w_live, w_desc, w_first, w_rows, w_desc, w_first, xs_rows, ws_rows, ws_rows,
                        0, last, K, False, XS == "block", WS == "block", W_ONE, W_ONE, SWAP, EXACT, TMA, EVEN_K, BM, BN,
                        BK)  # fmt: skip
    if XS == "tensor":
        acc *= tl.load(xs_ptr)
    elif XS == "token":
        acc *= over_tokens(tl.load(xs_ptr + source, x_live, other=0.0), SWAP)
    if WS == "tensor":
        acc *= tl.load(ws_ptr + expert * ws_expert)
    elif WS == "channel":
        acc *= over_channels(tl.load(ws_ptr + expert * N + channels, w_live, other=0.0), SWAP)
    at = out_ptr + over_tokens(rows.to(tl.int64) * out_stride, SWAP) + over_channels(channels, SWAP)
    tl.store(at, acc.to(out_ptr.dtype.element_ty), over_tokens(live, SWAP) & over_channels(w_live, SWAP))


def kind_of(x: Tensor, x_scales: str, w_scales: str) -> str:
    """The kind of product, as `configure` has it."""
    if x.element_size() > 1:
        return "bf16"
    return "fp8_block" if "block" in (x_scales, w_scales) else "fp8"


def average(rows: int, groups: int) -> int:
    """Rows of a group that has any, on average, rounded up to a power of two."""
    return triton.next_power_of_2(triton.cdiv(max(rows, 1), min(max(rows, 1), groups)))


def tile_bound(rows: int, groups: int, block_m: int) -> int:
    """The most tiles that so many rows can make in so many groups."""
    return (rows + min(groups, rows) * (block_m - 1)) // block_m


def launch_grouped(
    out: Tensor,
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    gather: Tensor | None,
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    x_scales: str,
    w_scales: str,
    *,
    exact: bool = False,
    tail: bool = True,
    early: bool = False,
    own: int | None = None,
) -> None:
    """Launches over tiles.

    Args:
        x_scales: "none", "tensor", "token" or "block".
        w_scales: "none", "tensor", "channel" or "block".
        tail: rows after the last group are written, as zeros.
        own: every row is a group of its own, and `offsets` holds [R] ids of experts, of which this is the first; an id of no
            expert leaves its row unwritten.
        early: this kernel may be brought to the device before the one before it has ended, and lets the next one come.
    """
    R, N = out.shape
    E, _, K = w.shape
    if out.numel() == 0:
        return
    if K == 0:
        # There are no blocks whose scales could be read.
        x_scales = w_scales = "none"
    config = configure.on(x.device, kind_of(x, x_scales, w_scales), average(R, E), N, K)
    config = roomy(config, w, exact)
    w_desc, tma = descriptor(w, config)
    tiles_n = triton.cdiv(N, config.block_n)
    options: dict[str, Any] = {"launch_pdl": True} if early else {}
    tiles_m = tile_bound(R, E + tail, config.block_m) if own is None else R
    grouped_kernel[(tiles_m * tiles_n,)](
        out,
        x,
        w,
        w_desc,
        x if x_scale is None else x_scale,
        x if w_scale is None else w_scale,
        offsets,
        offsets if gather is None else gather,
        R,
        x.shape[0],
        N,
        K,
        tiles_n,
        out.stride(0),
        x.stride(0),
        w.stride(0),
        w.stride(1),
        0 if w_scale is None or w_scale.numel() == 1 else 1,
        own or 0,
        E,
        SIZE=triton.next_power_of_2(E + 1),
        OWN=own is not None,
        GATHER=gather is not None,
        TAIL=tail,
        XS=x_scales,
        WS=w_scales,
        SWAP=config.swap,
        EXACT=exact and x.dtype is torch.float8_e4m3fn,
        TMA=tma,
        EVEN_K=K % config.block_k == 0,
        EARLY=early,
        BM=config.block_m,
        BN=config.block_n,
        BK=config.block_k,
        BAND=BAND,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **options,
    )


def launch(
    out: Tensor,
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    gather: Tensor | None,
    format: str | None,
    exact: bool,
) -> None:
    """Launches one product of groups."""
    launch_grouped(out, x, w, offsets, gather, x_scale, w_scale, *kinds(format), exact=exact)
