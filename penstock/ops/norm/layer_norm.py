"""y = (x - mean(x)) / sqrt(mean((x - mean(x))²) + eps) · weight + bias, statistics in float32."""

from collections.abc import Iterable

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost, nbytes
from penstock.core.check import FLOATS, positive
from penstock.core.op import op
from penstock.core.rows import unfit_rows

SPEC = {
    "x": ("* N", FLOATS),
    "weight": ("N", ("x", torch.float32)),
    "bias?": ("N", ("x", torch.float32)),
    "out?": ("* N", "x"),
    "eps": positive,
}


@op("(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, float eps) -> ()", SPEC)
def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Layer normalisation of the last dimension.

    Args:
        x: [..., N] float16, bfloat16 or float32; any strides.
        weight: [N], dtype of x or float32.
        bias: [N], dtype of x or float32; None for none.
        eps: added to the variance.
        out: [..., N] in x.dtype, may be x itself.
        impl: "auto", "triton", "cpu" or "reference".
    Returns: [..., N] in x.dtype.
    Raises: ContractError when shapes or dtypes disagree; NotSupported when no implementation takes the call.
    Source: Ba, Kiros & Hinton, arXiv:1607.06450.
    """
    launch = layer_norm.pick(impl, x, weight, bias, out, eps)
    out = torch.empty_like(x) if out is None else out
    launch(out, x, weight, bias, eps)
    return out


@layer_norm.reference
def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)
    return (y if bias is None else y + bias.to(wide.dtype)).to(x.dtype)


def _unfit(x: Tensor, out: Tensor | None, **others: object) -> str | None:
    return unfit_rows(x=x, out=out)


@layer_norm.impl("triton", needs=("triton",), supports=_unfit, spill_bytes=8)
def _triton(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> None:
    from penstock.ops.norm.layer_norm_triton import launch

    launch(out, x, weight, bias, eps)


@layer_norm.impl("cpu", needs=("cpu",))
def _cpu(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> None:
    if x.numel() == 0:
        return
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    bias = None if bias is None else bias.to(wide.dtype)
    # torch subtracts the mean again: what rounding left of a large one is taken off.
    centred = wide - wide.mean(-1, keepdim=True)
    out.copy_(torch.nn.functional.layer_norm(centred, weight.shape, weight.to(wide.dtype), bias, eps))


@layer_norm.cost
def _cost(x: Tensor, weight: Tensor, bias: Tensor | None, **options: object) -> Cost:
    return Cost(bytes=2 * nbytes(x) + nbytes(weight, bias))


@layer_norm.cases
def cases() -> Iterable[Case]:
    """Rows of model widths, then the awkward ones."""

    def case(
        name: str,
        *shape: int,
        dtype: torch.dtype = torch.bfloat16,
        mean: float = 0.0,
        bias: bool = True,
        bench: bool = False,
    ) -> Case:
        def build(make):
            return {
                "x": make.randn(*shape, dtype=dtype) + mean,
                "weight": make.randn(shape[-1], dtype=dtype),
                "bias": make.randn(shape[-1], dtype=dtype) if bias else None,
            }

        return Case(name, build, bench)

    yield case("decode_row", 1, 4096)
    yield case("batch_of_sequences", 3, 5, 128)
    yield case("without_bias", 4, 256, bias=False)
    yield case("large_mean", 4, 768, mean=50.0, dtype=torch.float32)
    yield case("ragged", 7, 300)
    yield case("float16_ragged", 5, 1000, dtype=torch.float16)
    yield case("float32_one_column", 4, 1, dtype=torch.float32)
    yield case("empty", 0, 512)
    yield case("wide", 2, 65536)
    yield case("wide_ragged", 2, 20001)
    yield case("decode_64x4096", 64, 4096, bench=True)
    yield case("prefill_8192x4096", 8192, 4096, bench=True)
    yield case("prefill_8192x8192", 8192, 8192, bench=True)
    yield case("prefill_1024x65536", 1024, 65536, bench=True)
