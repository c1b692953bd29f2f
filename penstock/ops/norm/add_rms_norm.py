"""new_residual = x + residual rounded to x.dtype; y = rms_norm(new_residual): one pass instead of two."""

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
    "residual": ("* N", "x"),
    "weight": ("N", ("x", torch.float32)),
    "out?": ("* N", "x"),
    "out_residual?": ("* N", "x"),
    "eps": positive,
    "weight_offset": anything,
}


@op(
    "(Tensor(a!) out, Tensor(b!) out_residual, Tensor x, Tensor residual, Tensor weight, float eps, float weight_offset) -> ()",
    SPEC,
)
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    out: tuple[Tensor | None, Tensor | None] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Adds the residual stream and normalises the sum over the last dimension.

    Args:
        x: [..., N] float16, bfloat16 or float32; any strides.
        residual: [..., N] in x.dtype.
        weight: [N], dtype of x or float32.
        eps: added to the mean square.
        weight_offset: added to the weight; 1.0 for Gemma.
        out: (y, new_residual), each [..., N] in x.dtype or None for a new tensor. Either may be x or residual themselves, so
            out=(None, residual) updates the residual in place and out=(x, residual) allocates nothing; they may not share
            memory with each other, nor overlap an input in part.
        impl: "auto", "triton", "cpu" or "reference".
    Returns: (y, new_residual), both [..., N] in x.dtype.
    Raises: ContractError when shapes or dtypes disagree or both results are one tensor; NotSupported when no implementation
        takes the call.
    Source: Zhang & Sennrich, arXiv:1910.07467.
    """
    y, total = out if out is not None else (None, None)
    launch = add_rms_norm.pick(impl, x, residual, weight, y, total, eps, weight_offset)
    if y is not None and y is total:
        raise add_rms_norm.contract.error("out", "must be two tensors, got one tensor twice", {"y": y, "new_residual": total})
    y = torch.empty_like(x) if y is None else y
    total = torch.empty_like(x) if total is None else total
    launch(y, total, x, residual, weight, eps, weight_offset)
    return y, total


@add_rms_norm.reference
def _reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    rounded = (x.to(wide) + residual.to(wide)).to(x.dtype)
    total = rounded.to(wide)
    scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    return (total * scale * (weight.to(wide) + weight_offset)).to(x.dtype), rounded


def _unfit(x: Tensor, residual: Tensor, out: Tensor | None, out_residual: Tensor | None, **others: object) -> str | None:
    return unfit_rows(x=x, residual=residual, out=out, out_residual=out_residual)


# 48 bytes with Triton 3.9, none with 3.6.
@add_rms_norm.impl("triton", needs=("triton",), supports=_unfit, spill_bytes=48)
def _triton(
    out: Tensor, out_residual: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float
) -> None:
    from penstock.ops.norm.rms_norm_triton import launch

    launch(out, out_residual, x, residual, weight, eps, weight_offset)


@add_rms_norm.impl("cpu", needs=("cpu",))
def _cpu(
    out: Tensor, out_residual: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float
) -> None:
    # A 16-bit sum of two 16-bit numbers is computed in float32 and rounded once, as the definition says.
    if out_residual is residual:
        residual.add_(x)
    else:
        torch.add(x, residual, out=out_residual)
    normalise(out, out_residual, weight, eps, weight_offset)


@add_rms_norm.cost
def _cost(x: Tensor, residual: Tensor, weight: Tensor, **options: object) -> Cost:
    return Cost(bytes=2 * nbytes(x, residual) + nbytes(weight))


@add_rms_norm.cases
def cases() -> Iterable[Case]:
    """Rows of model widths, then the awkward ones."""

    def case(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16, bench: bool = False, **options: object) -> Case:
        def build(make):
            return {
                "x": make.randn(*shape, dtype=dtype),
                "residual": make.randn(*shape, dtype=dtype, scale=4.0),
                "weight": make.randn(shape[-1], dtype=dtype),
                **options,
            }

        return Case(name, build, bench)

    yield case("decode_row", 1, 4096)
    yield case("batch_of_sequences", 3, 5, 128)
    yield case("ragged", 7, 300)
    yield case("float16_ragged", 5, 1000, dtype=torch.float16)
    yield case("float32_one_column", 4, 1, dtype=torch.float32)
    yield case("gemma", 6, 640, weight_offset=1.0)
    yield case("empty", 0, 512)
    yield case("wide", 2, 65536)
    yield case("wide_ragged", 2, 20001)
    yield case("decode_64x4096", 64, 4096, bench=True)
    yield case("prefill_8192x4096", 8192, 4096, bench=True)
    yield case("prefill_8192x7168", 8192, 7168, bench=True)
    yield case("prefill_1024x65536", 1024, 65536, bench=True)
