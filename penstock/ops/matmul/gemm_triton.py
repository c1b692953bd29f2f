"""Dense products by tiles; with few tiles K is split, and the last program of a tile adds the parts in the order of K.

The parts of one tile are counted in an integer that the last program sets back to zero, so that a caller may keep the counters.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from penstock.core.device import has_dependent_launch, num_sms
from penstock.core.tuning import tuned
from penstock.ops.matmul.counters import COUNTERS
from penstock.ops.matmul.tile_triton import (
    TileConfig,
    accumulate,
    descriptor,
    over_channels,
    over_tokens,
    roomy,
    scale_rows,
    walk,
)

BAND = 16
# Programs that a split may make on a multiprocessor.
PROGRAMS_PER_SM = 2
# Shared memory that stages may take: 227 KB less what a kernel has besides.
SHARED_BYTES = 224_000


@dataclass(frozen=True)
class GemmConfig(TileConfig):
    """A tile, and how many parts K may be divided into so that every multiprocessor has work.

    Args:
        early: on Hopper the kernel is brought to the device while the one before it still runs, and lets the next one come.
    """

    max_splits: int = 1
    early: bool = False


def candidates(kind: str, rows: int, N: int, K: int) -> Iterator[GemmConfig]:
    """Configs worth timing."""
    pair = kind == "pair"
    step = 64 if pair else 128
    if rows <= 128:
        tiles = [(max(16, rows), 64, step), (max(16, rows), 128, step)]
        if kind != "fp8_block":
            tiles.append((max(16, rows), 64, 2 * step))
        for max_splits in (8, 16, 32) if kind == "pair" else (2, 4, 8):
            for block_m, block_n, block_k in tiles:
                for stages in (4, 6):
                    if (block_m + (1 + pair) * block_n) * block_k * (1 + pair) * stages <= SHARED_BYTES:
                        yield GemmConfig(block_m, block_n, block_k, 4, stages, True, True, max_splits)
            if kind == "pair":
                yield GemmConfig(64, 16, step, 4, 4, False, True, max_splits)
                yield GemmConfig(64, 32, step, 4, 4, False, True, max_splits)
        yield from _early_candidates(kind, rows, N, K)
        return
    for block_m, block_n, warps, stages in ((128, 128, 8, 4), (128, 128, 8, 3), (64, 128, 4, 4), (64, 128, 4, 3)):
        yield GemmConfig(block_m, block_n, step, warps, stages, False, True)
        if rows <= 2048 and kind != "fp8_block":
            yield GemmConfig(block_m, block_n, step, warps, stages, False, True, 4)
    if kind in ("fp8", "int8"):
        yield GemmConfig(128, 256, step, 8, 3, False, True)


def _early_candidates(kind: str, rows: int, N: int, K: int) -> Iterator[GemmConfig]:
    """The default, not launched early; then tiles so narrow that every multiprocessor has one and no parts are left to add."""
    default = configure.default(kind, rows, N, K)
    yield replace(default, early=False)
    if kind == "pair":
        for max_splits in (4, 8, 11, 16):
            for block_k in (64, 128):
                yield GemmConfig(64, 16, block_k, 4, 4, False, True, max_splits, early=True)
        return
    if rows <= 64:
        for block_k in (128,) if kind == "fp8_block" else (128, 256):
            for stages in (4, 6):
                for early in (False, True):
                    yield GemmConfig(64, 32, block_k, 4, stages, False, True, 1, early)


@tuned(candidates)
def configure(kind: str, rows: int, N: int, K: int) -> GemmConfig:
    """The default for a kind of call.

    Args:
        kind: "fp8", "fp8_block", "int8", or "pair" for two sets of bfloat16 weights.
        rows: tokens, rounded up to a power of two.
    """
    step = 64 if kind == "pair" else 128
    parts = max(2, min(16, 128 // triton.cdiv(max(N, 1), 64)))
    if rows <= 64:
        if kind == "pair" and rows <= 16:
            return GemmConfig(16, 64, 128, 4, 4, True, True, 8, True)
        if kind == "pair":
            # Narrow tiles give more programs than parts alone, which one program has to add up.
            return GemmConfig(64, 16, 128, 4, 4, False, True, 8, True)
        if kind == "fp8_block":
            return GemmConfig(max(16, rows), 64, step, 4, 4, True, True, max(4, parts), True)
        return GemmConfig(max(16, rows), 64, 2 * step, 4, 4, True, True, parts, True)
    if kind == "pair":
        return GemmConfig(64, 64, step, 4, 4, False, True, 8)
    if kind == "fp8_block":
        # Parts of K and block scales together do not fit in the registers of a larger tile.
        return GemmConfig(64, 128, step, 4, 4, False, True, 4 if rows <= 512 else 1)
    if rows <= 128:
        # By count, not measured: of 128 columns a program the parts are twice the bytes, which one program adds up.
        return GemmConfig(128, 64, step, 8, 6, False, True, parts, True)
    if rows <= 512:
        return GemmConfig(128, 128, step, 8, 3, False, True, 4)
    # 128×256 takes 1.2 to 1.3 times as long at 8192³: it leaves room for one program on a multiprocessor.
    return GemmConfig(128, 128, step, 8, 3, False, True)


@triton.jit
def _add_parts(parts_ptr, counter_ptr, acc, tile, split, SPLITS: tl.constexpr):
    """(whether this program is the tile's last, the sum of all parts); what it has itself is read back, in its place."""
    ROWS: tl.constexpr = acc.shape[0]
    COLUMNS: tl.constexpr = acc.shape[1]
    inside = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    first = parts_ptr + tile.to(tl.int64) * (SPLITS * ROWS * COLUMNS)
    tl.store(first + split * (ROWS * COLUMNS) + inside, acc)
    # Every thread's part must be written before one thread counts it.
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel")
    last = arrived == SPLITS - 1
    total = tl.zeros([ROWS, COLUMNS], acc.dtype)
    if last:
        for part in tl.static_range(SPLITS):
            total += tl.load(first + part * (ROWS * COLUMNS) + inside, cache_modifier=".cg")
        tl.store(counter_ptr + tile, 0)
    return last, total


@triton.jit(do_not_specialize=["M", "tiles_m", "tiles_n", "steps_a_split"])
def _gemm_kernel(
    out_ptr,
    x_ptr,
    w_ptr,
    w_desc,
    pair_ptr,
    pair_desc,
    xs_ptr,
    ws_ptr,
    bias_ptr,
    parts_ptr,
    counter_ptr,
    M,
    N,
    K,
    tiles_m,
    tiles_n,
    steps_a_split,
    out_stride,
    x_stride,
    w_stride,
    pair_stride,
    XS: tl.constexpr,
    WS: tl.constexpr,
    PAIR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    SWAP: tl.constexpr,
    EXACT: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BAND: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    tile = tl.program_id(0)
    split = tl.program_id(1)
    tile_m, tile_n = walk(tile, tiles_m, tiles_n, BAND)
    rows = (tile_m * BM + tl.arange(0, BM)).to(tl.int64)
    live = rows < M
    channels = tile_n * BN + tl.arange(0, BN)
    w_live = channels < N
    x_rows = x_ptr + rows * x_stride
    w_rows = w_ptr + channels.to(tl.int64) * w_stride
    pair_rows = pair_ptr + channels.to(tl.int64) * pair_stride
    blocks = tl.cdiv(K, 128)
    xs_rows = xs_ptr + rows * blocks
    W_ONE: tl.constexpr = WS == "block" and 128 % BN == 0
    ws_rows = scale_rows(ws_ptr, 0, channels, tile_n * BN, blocks, W_ONE)
    w_first = tile_n * BN
    first = split * steps_a_split
    last = tl.minimum(first + steps_a_split, tl.cdiv(K, BK))
    acc, low = accumulate(x_rows, live, w_rows, w_live, w_desc, w_first, pair_rows, pair_desc, w_first, xs_rows, ws_rows,
                          ws_rows, first, last, K, PAIR, XS == "block", WS == "block", W_ONE, W_ONE, SWAP, EXACT, TMA, EVEN_K,
                          BM, BN, BK)  # fmt: skip
    if PAIR:
        acc += low * 0.00390625
    done = True
    if SPLITS > 1:
        done, acc = _add_parts(parts_ptr, counter_ptr, acc, tile, split, SPLITS)
    if done:
        result = acc.to(tl.float32)
        if XS == "tensor":
            result *= tl.load(xs_ptr)
        elif XS == "token":
            result *= over_tokens(tl.load(xs_ptr + rows, live, other=0.0), SWAP)
        if WS == "tensor":
            result *= tl.load(ws_ptr)
        elif WS == "channel":
            result *= over_channels(tl.load(ws_ptr + channels, w_live, other=0.0), SWAP)
        if HAS_BIAS:
            result += over_channels(tl.load(bias_ptr + channels, w_live, other=0.0).to(tl.float32), SWAP)
        at = out_ptr + over_tokens(rows * out_stride, SWAP) + over_channels(channels, SWAP)
        tl.store(at, result.to(out_ptr.dtype.element_ty), over_tokens(live, SWAP) & over_channels(w_live, SWAP))


def splits_of(tiles: int, steps: int, device: torch.device, config: GemmConfig) -> tuple[int, int]:
    """(parts that K is divided into, steps of each): enough that every multiprocessor has work, and no part empty."""
    wanted = 1
    if tiles <= COUNTERS:
        wanted = max(1, min(PROGRAMS_PER_SM * num_sms(device) // tiles, config.max_splits, steps))
    each = max(1, triton.cdiv(steps, wanted))
    return max(1, triton.cdiv(steps, each)), each


def launch(
    out: Tensor,
    x: Tensor,
    w: Tensor,
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    x_scales: str,
    w_scales: str,
    *,
    kind: str,
    pair: Tensor | None = None,
    bias: Tensor | None = None,
    counters: Tensor | None = None,
    exact: bool = False,
) -> None:
    """Launches over tiles and parts of K.

    Args:
        kind: as `configure` has it.
        pair: weights of a second product, of which a 256th is added.
        counters: zeros, and zeros afterwards; made here by default.
    """
    (M, K), N = x.shape, w.shape[0]
    if out.numel() == 0:
        return
    if K == 0:
        # There are no blocks whose scales could be read.
        x_scales = w_scales = "none"
    config = configure.on(x.device, kind, triton.next_power_of_2(M), N, K)
    config = roomy(config, w, exact)
    w_desc, tma = descriptor(w, config)
    pair_desc, pair_tma = (w_desc, tma) if pair is None else descriptor(pair, config)
    if not (tma and pair_tma):
        tma, w_desc, pair_desc = False, w, w if pair is None else pair
    tiles_m, tiles_n = triton.cdiv(M, config.block_m), triton.cdiv(N, config.block_n)
    splits, each = splits_of(tiles_m * tiles_n, triton.cdiv(K, config.block_k), x.device, config)
    parts = out
    if splits > 1:
        size = tiles_m * tiles_n * splits * config.block_m * config.block_n
        parts = torch.empty(size, dtype=torch.int32 if x.dtype is torch.int8 else torch.float32, device=x.device)
        counters = torch.zeros(COUNTERS, dtype=torch.int32, device=x.device) if counters is None else counters
    early = config.early and has_dependent_launch(x.device)
    options: dict[str, Any] = {"launch_pdl": True} if early else {}
    _gemm_kernel[(tiles_m * tiles_n, splits)](
        out,
        x,
        w,
        w_desc,
        w if pair is None else pair,
        pair_desc,
        x if x_scale is None else x_scale,
        x if w_scale is None else w_scale,
        out if bias is None else bias,
        parts,
        out if counters is None else counters,
        M,
        N,
        K,
        tiles_m,
        tiles_n,
        each,
        out.stride(0),
        x.stride(0),
        w.stride(0),
        (w if pair is None else pair).stride(0),
        XS=x_scales,
        WS=w_scales,
        PAIR=pair is not None,
        HAS_BIAS=bias is not None,
        SPLITS=splits,
        SWAP=config.swap,
        EXACT=exact and x.dtype is torch.float8_e4m3fn,
        TMA=tma,
        EVEN_K=K % config.block_k == 0,
        BM=config.block_m,
        BN=config.block_n,
        BK=config.block_k,
        BAND=BAND,
        EARLY=early,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **options,
    )
