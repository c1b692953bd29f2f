"""y = x / sqrt(mean(x²) + eps) · (weight + weight_offset), statistics in float32."""

from collections.abc import Iterable

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost, nbytes
from penstock.core.check import FLOATS, anything, positive
from penstock.core.op import op
from penstock.core.rows import unfit_rows
from penstock.ops.norm.rms_norm_cpu import normalise

SPEC = {
    "x": ("* N", FLOATS),
    "weight": ("N", ("x", torch.float32)),
    "out?": ("* N", "x"),
    "eps": positive,
    "weight_offset": anything,
}


@op("(Tensor(a!) out, Tensor x, Tensor weight, float eps, float weight_offset) -> ()", SPEC)
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Root-mean-square normalisation of the last dimension.

    Args:
        x: [..., N] float16, bfloat16 or float32; any strides.
        weight: [N], dtype of x or float32.
        eps: added to the mean square.
        weight_offset: added to the weight; 1.0 for Gemma.
        out: [..., N] in x.dtype, may be x itself.
        impl: "auto", "triton", "cpu" or "reference".
    Returns: [..., N] in x.dtype.
    Raises: ContractError when shapes or dtypes disagree; NotSupported when no implementation takes the call.
    Source: Zhang & Sennrich, arXiv:1910.07467.
    """
    launch = rms_norm.pick(impl, x, weight, out, eps, weight_offset)
    out = torch.empty_like(x) if out is None else out
    launch(out, x, weight, eps, weight_offset)
    return out


@rms_norm.reference
def _reference(x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * (weight.to(wide.dtype) + weight_offset)).to(x.dtype)


def _unfit(x: Tensor, out: Tensor | None, **others: object) -> str | None:
    return unfit_rows(x=x, out=out)


@rms_norm.impl("triton", needs=("triton",), supports=_unfit)
def _triton(out: Tensor, x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> None:
    from penstock.ops.norm.rms_norm_triton import launch

    launch(out, None, x, None, weight, eps, weight_offset)


@rms_norm.impl("cpu", needs=("cpu",))
def _cpu(out: Tensor, x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> None:
    normalise(out, x, weight, eps, weight_offset)


@rms_norm.cost
def _cost(x: Tensor, weight: Tensor, **options: object) -> Cost:
    return Cost(bytes=2 * nbytes(x) + nbytes(weight))


@rms_norm.cases
def cases() -> Iterable[Case]:
    """Rows of model widths, then the awkward ones."""

    def case(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16, bench: bool = False, **options: object) -> Case:
        def build(make):
            return {
                "x": make.randn(*shape, dtype=dtype),
                "weight": make.randn(shape[-1], dtype=dtype),
                **options,
            }

        return Case(name, build, bench)

    yield case("decode_row", 1, 4096)
    yield case("head_norm", 3, 5, 128)
    yield case("ragged", 7, 300)
    yield case("float16_ragged", 5, 1000, dtype=torch.float16)
    yield case("float32_one_column", 4, 1, dtype=torch.float32)
    yield case("gemma", 6, 640, weight_offset=1.0)
    yield case("empty", 0, 512)
    yield case("wide", 2, 65536)
    yield case("wide_ragged", 2, 20001)
    yield case("decode_64x4096", 64, 4096, bench=True)
    yield case("prefill_8192x4096", 8192, 4096, bench=True)
    yield case("prefill_8192x8192", 8192, 8192, bench=True)
    yield case("prefill_1024x65536", 1024, 65536, bench=True)
    yield case("head_norm_8192x64x128", 8192, 64, 128, bench=True)
