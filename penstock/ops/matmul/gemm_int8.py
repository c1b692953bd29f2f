"""y = (x · wᵀ) · x_scale · w_scale + bias with INT8 operands; the sums of products are exact."""

from collections.abc import Iterable

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost, nbytes
from penstock.core.check import DENSE, one_of
from penstock.core.formats import INT8_TOKEN, Format, name_of
from penstock.core.op import op
from penstock.ops.matmul import _cases
from penstock.ops.matmul.counters import counters_fault
from penstock.ops.matmul.scales import unfit

RESULTS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# 127² · K stays below 2³¹.
MAX_K = 131072

SPEC = {
    "x": ("M K", torch.int8),
    "w": ("N K", torch.int8),
    "x_scale": ("M", (torch.float32, torch.float64), DENSE),
    "w_scale": ("N", "x_scale", DENSE),
    "bias?": ("N", RESULTS, DENSE),
    "counters?": ("C", torch.int32),
    "format": one_of("INT8_TOKEN"),
    "out?": ("M N", RESULTS, DENSE),
}


@op(
    "(Tensor(a!) out, Tensor x, Tensor w, Tensor x_scale, Tensor w_scale, Tensor? bias, Tensor(b!)? counters, str format)"
    " -> ()",
    SPEC,
    tile=128,
)
def gemm_int8(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    *,
    format: Format = INT8_TOKEN,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    counters: Tensor | None = None,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """The product of activations with a scale a token and weights with a scale a channel; products add up in int32, exactly.

    Args:
        x: [M, K] int8, stride 1 along K; K up to 131,072.
        w: [N, K] int8, stride 1 along K.
        x_scale: [M] float32.
        w_scale: [N] float32.
        format: INT8_TOKEN: what x is; w is INT8_CHANNEL.
        bias: [N], added in float32.
        out_dtype: bfloat16, float16 or float32.
        counters: what gemm_counters returned, to save a fill for small M; made on the spot by default.
        out: [M, N].
        impl: "auto", "triton", "cpu" or "reference".
    Returns: [M, N] in out_dtype.
    Raises: ContractError when shapes or dtypes disagree; NotSupported when no implementation takes the call.
    Source: Jacob et al., arXiv:1712.05877; Xiao et al., arXiv:2211.10438 (SmoothQuant).
    """
    name = name_of(format)
    launch = gemm_int8.pick(impl, x, w, x_scale, w_scale, bias, counters, name, out)
    if out is None:
        wide = x_scale.dtype is torch.float64
        out = torch.empty(x.shape[0], w.shape[0], dtype=torch.float64 if wide else out_dtype, device=x.device)
    launch(out, x, w, x_scale, w_scale, bias, counters, name)
    return out


@gemm_int8.relation
def _relation(x: Tensor, counters: Tensor | None, **others: object) -> tuple[str, str] | None:
    if x.shape[1] > MAX_K:
        return "x", f"must have K of at most {MAX_K}, beyond which int32 may overflow, got {x.shape[1]}"
    return counters_fault(counters)


@gemm_int8.reference
def _reference(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    counters: Tensor | None,
    format: str,
) -> Tensor:
    # float64 holds the sums exactly.
    y = (x.double() @ w.double().t()).to(x_scale.dtype) * x_scale[:, None] * w_scale
    return y if bias is None else y + bias


def _fits(x: Tensor, w: Tensor, **others: object) -> str | None:
    return unfit(x=x, w=w)


@gemm_int8.impl("triton", needs=("triton",), supports=_fits, instructions=("IGMMA",))
def _triton(
    out: Tensor,
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    counters: Tensor | None,
    format: str,
) -> None:
    from penstock.ops.matmul.gemm_triton import launch

    launch(out, x, w, x_scale, w_scale, "token", "channel", kind="int8", bias=bias, counters=counters)


@gemm_int8.impl("cpu", needs=("cpu",))
def _cpu(
    out: Tensor,
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    counters: Tensor | None,
    format: str,
) -> None:
    if not (x.numel() and w.numel()):
        sums = torch.zeros(out.shape, dtype=torch.int32)
    elif x.shape[0] < w.shape[0]:
        # The second operand is packed anew in each call: better the smaller one.
        sums = torch._int_mm(w, x.t()).t()
    else:
        sums = torch._int_mm(x, w.t())
    y = sums.to(x_scale.dtype).mul_(x_scale[:, None]).mul_(w_scale)
    out.copy_(y if bias is None else y.add_(bias))


@gemm_int8.cost
def _cost(x: Tensor, w: Tensor, out_dtype: torch.dtype = torch.bfloat16, **options: object) -> Cost:
    (M, K), N = x.shape, w.shape[0]
    return Cost(bytes=nbytes(x, w) + M * N * out_dtype.itemsize, flops=2 * M * N * K, rate="int8")


@gemm_int8.cases
def cases() -> Iterable[Case]:
    """Few and many rows, then the shapes of a server."""
    return _cases.int8()
