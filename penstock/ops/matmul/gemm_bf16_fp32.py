"""y = x · (w_hi + w_lo / 256)ᵀ: bfloat16 activations and weights of sixteen bits, by two products in one kernel."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost, nbytes
from penstock.core.check import DENSE
from penstock.core.op import op
from penstock.ops.matmul import _cases
from penstock.ops.matmul.counters import counters_fault
from penstock.ops.matmul.scales import unfit
from penstock.ops.matmul.tensor_core import HALF_BITS, HALF_DEPTH, cut_off

RESULTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPERANDS = (torch.bfloat16, torch.float64)
# Rows that triton_few takes: every program reads all of them.
FEW_ROWS = 8

SPEC = {
    "x": ("M K", OPERANDS),
    "w_hi": ("N K", "x"),
    "w_lo": ("N K", "x"),
    "counters?": ("C", torch.int32),
    "out?": ("M N", RESULTS, DENSE),
}


@op("(Tensor(a!) out, Tensor x, Tensor w_hi, Tensor w_lo, Tensor(b!)? counters) -> ()", SPEC, tile=128)
def gemm_bf16_fp32(
    x: Tensor,
    w_hi: Tensor,
    w_lo: Tensor,
    *,
    out_dtype: torch.dtype = torch.float32,
    counters: Tensor | None = None,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """A router's product: weights nearly as precise as float32 at the rate of bfloat16 tensor cores.

    Args:
        x: [M, K] bfloat16, stride 1 along K.
        w_hi: [N, K] bfloat16, the first result of split_fp32.
        w_lo: [N, K] bfloat16, the second.
        out_dtype: float32, bfloat16 or float16.
        counters: what gemm_counters returned, to save a fill; made on the spot by default.
        out: [M, N].
        impl: "auto", "triton", "triton_few" (up to 8 rows), "cpu" or "reference".
    Returns: [M, N] in out_dtype. Products are exact and add up in float32, which tensor cores truncate.
    Raises: ContractError when shapes or dtypes disagree; NotSupported when no implementation takes the call.
    Source: Markidis et al., arXiv:1803.04014 (splitting for tensor cores); HPC-Ops, github.com/Tencent/hpc-ops.
    """
    launch = gemm_bf16_fp32.pick(impl, x, w_hi, w_lo, counters, out)
    if out is None:
        out = x.new_empty(x.shape[0], w_hi.shape[0], dtype=torch.float64 if x.dtype is torch.float64 else out_dtype)
    launch(out, x, w_hi, w_lo, counters)
    return out


@gemm_bf16_fp32.relation
def _relation(counters: Tensor | None, **others: object) -> tuple[str, str] | None:
    return counters_fault(counters)


def _weights(w_hi: Tensor, w_lo: Tensor) -> Tensor:
    wide = torch.promote_types(w_hi.dtype, torch.float32)
    return w_hi.to(wide) + w_lo.to(wide) / 256


@gemm_bf16_fp32.reference
def _reference(x: Tensor, w_hi: Tensor, w_lo: Tensor, counters: Tensor | None) -> Tensor:
    weights = _weights(w_hi, w_lo)
    return x.to(weights.dtype) @ weights.t()


@gemm_bf16_fp32.baseline
def _baseline(x: Tensor, w_hi: Tensor, w_lo: Tensor, counters: Tensor | None) -> Tensor:
    return cut_off(x, _weights(w_hi, w_lo), HALF_DEPTH, HALF_BITS)


def _fits(x: Tensor, w_hi: Tensor, w_lo: Tensor, **others: object) -> str | None:
    return unfit(x=x, w_hi=w_hi, w_lo=w_lo)


@gemm_bf16_fp32.impl("triton", needs=("triton",), supports=_fits, instructions=("HGMMA",))
def _triton(out: Tensor, x: Tensor, w_hi: Tensor, w_lo: Tensor, counters: Tensor | None) -> None:
    from penstock.ops.matmul.gemm_triton import launch

    launch(out, x, w_hi, None, None, "none", "none", kind="pair", pair=w_lo, counters=counters)


def _few(x: Tensor, **others: Any) -> str | None:
    if x.shape[0] > FEW_ROWS:
        return f"{x.shape[0]} rows are more than {FEW_ROWS}"
    return _fits(x, **others)


@gemm_bf16_fp32.impl("triton_few", needs=("triton",), supports=_few)
def _triton_few(out: Tensor, x: Tensor, w_hi: Tensor, w_lo: Tensor, counters: Tensor | None) -> None:
    from penstock.ops.matmul.gemm_bf16_fp32_few_triton import launch

    launch(out, x, w_hi, w_lo)


@gemm_bf16_fp32.impl("cpu", needs=("cpu",))
def _cpu(out: Tensor, x: Tensor, w_hi: Tensor, w_lo: Tensor, counters: Tensor | None) -> None:
    wide = torch.promote_types(x.dtype, torch.float32)
    # In place, where the sum of _weights would pass over memory three times.
    weights = w_hi.to(wide, copy=True).add_(w_lo, alpha=1 / 256)
    out.copy_(x.to(wide) @ weights.t())


@gemm_bf16_fp32.cost
def _cost(x: Tensor, w_hi: Tensor, w_lo: Tensor, out_dtype: torch.dtype = torch.float32, **options: object) -> Cost:
    (M, K), N = x.shape, w_hi.shape[0]
    return Cost(bytes=nbytes(x, w_hi, w_lo) + M * N * out_dtype.itemsize, flops=4 * M * N * K)


@gemm_bf16_fp32.cases
def cases() -> Iterable[Case]:
    """Few and many tokens, then a router's shapes."""
    return _cases.router()
