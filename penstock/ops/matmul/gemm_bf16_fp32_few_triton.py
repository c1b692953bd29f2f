"""A router for up to eight tokens on CUDA cores: a program has a channel or a few and all of K, so nothing is left to add.

Tensor cores multiply at least 16 tokens, and parts of K have to meet in memory, which takes as long as reading the weights.

Measured with one token alone, where it is faster than tiles (docs/lab.md); `impl="triton_few"` asks for it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from penstock.core.device import has_dependent_launch
from penstock.core.tuning import tuned


@dataclass(frozen=True)
class FewConfig:
    """Launch configuration.

    Args:
        channels: of a program.
        block_k: values of K in a step.
    """

    channels: int
    block_k: int
    num_warps: int
    num_stages: int
    early: bool


def candidates(rows: int, N: int, K: int) -> Iterator[FewConfig]:
    """Configs worth timing: up to 64 products a thread in a step."""
    for channels in (1, 2, 4):
        for block_k in (512, 1024, 2048, 4096):
            for warps in (4, 8):
                if 2 <= rows * channels * block_k // (32 * warps) <= 64:
                    for stages in (2, 4):
                        yield FewConfig(channels, block_k, warps, stages, True)


@tuned(candidates)
def configure(rows: int, N: int, K: int) -> FewConfig:
    """The default.

    Args:
        rows: tokens, rounded up to a power of two.
    """
    return FewConfig(1, 1024, 4, 4, True)


@triton.jit(do_not_specialize=["M"])
def _few_kernel(
    out_ptr,
    x_ptr,
    hi_ptr,
    lo_ptr,
    M,
    N,
    K,
    out_stride,
    x_stride,
    hi_stride,
    lo_stride,
    EARLY: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    rows = tl.arange(0, BM).to(tl.int64)
    live = rows < M
    channels = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    w_live = channels < N
    acc = tl.zeros([BM, BN, BK], tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        columns = start + tl.arange(0, BK)
        inside = columns < K
        mask = w_live[:, None] & inside[None, :]
        hi = tl.load(hi_ptr + (channels * hi_stride)[:, None] + columns[None, :], mask, other=0.0).to(tl.float32)
        lo = tl.load(lo_ptr + (channels * lo_stride)[:, None] + columns[None, :], mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + (rows * x_stride)[:, None] + columns[None, :], live[:, None] & inside[None, :], other=0.0)
        acc += x.to(tl.float32)[:, None, :] * (hi + lo * 0.00390625)[None, :, :]
    at = out_ptr + (rows * out_stride)[:, None] + channels[None, :]
    tl.store(at, tl.sum(acc, 2).to(out_ptr.dtype.element_ty), live[:, None] & w_live[None, :])


def launch(out: Tensor, x: Tensor, w_hi: Tensor, w_lo: Tensor) -> None:
    """Launches over channels."""
    (M, K), N = x.shape, w_hi.shape[0]
    if out.numel() == 0:
        return
    rows = triton.next_power_of_2(M)
    config = configure.on(x.device, rows, N, K)
    early = config.early and has_dependent_launch(x.device)
    options: dict[str, Any] = {"launch_pdl": True} if early else {}
    _few_kernel[(triton.cdiv(N, config.channels),)](
        out,
        x,
        w_hi,
        w_lo,
        M,
        N,
        K,
        out.stride(0),
        x.stride(0),
        w_hi.stride(0),
        w_lo.stride(0),
        EARLY=early,
        BM=rows,
        BN=config.channels,
        BK=config.block_k,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        **options,
    )
