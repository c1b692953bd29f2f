"""q, scale = quantize(rms_norm(x [+ residual])): one pass, the normalised values are float32 and never stored."""

from collections.abc import Iterable

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost, nbytes
from penstock.core.check import FLOATS, anything, positive
from penstock.core.formats import (
    FORMATS,
    FP8_BLOCK,
    FP8_TENSOR,
    FP8_TOKEN,
    INT8_TOKEN,
    Format,
    is_format,
    name_of,
    unfit_for_rows,
)
from penstock.core.op import NotSupported, op
from penstock.core.rows import unfit_rows
from penstock.ops.norm.rms_norm_cpu import normalise
from penstock.ops.quantization.quantize import quantize

SPEC = {
    "x": ("* N", FLOATS),
    "weight": ("N", ("x", torch.float32)),
    "residual?": ("* N", "x"),
    "scale": anything,
    "out?": ("* N", (torch.float8_e4m3fn, torch.int8)),
    "out_scale": anything,
    "out_residual?": ("* N", "x"),
    "format": is_format,
    "eps": positive,
    "weight_offset": anything,
}


@op(
    "(Tensor(a!) out, Tensor(b!)? out_scale, Tensor(c!)? out_residual, Tensor x, Tensor weight, Tensor? residual, "
    "Tensor? scale, str format, float eps, float weight_offset) -> ()",
    SPEC,
)
def rms_norm_quant(
    x: Tensor,
    weight: Tensor,
    *,
    format: Format,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    out: tuple[Tensor | None, ...] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """Root-mean-square normalisation, of the sum with the residual stream when there is one, stored in 8 bits.

    The normalised values are float32 and are not rounded to x.dtype before they are quantised as `quantize` does; only the sum
    with the residual is rounded, because it is a result. Sums in another order may move a value that lies in the middle of two
    codes to the other one.

    Args:
        x: [..., N] float16, bfloat16 or float32; any strides.
        weight: [N], dtype of x or float32.
        format: FP8_TOKEN, FP8_BLOCK or INT8_TOKEN; FP8_TENSOR with a static scale.
        residual: [..., N] in x.dtype, added to x first; None for none.
        scale: static scale, float32: FP8_TENSOR [1], rows [...], FP8_BLOCK [..., ⌈N/128⌉]; None takes it from the values.
        eps: added to the mean square.
        weight_offset: added to the weight; 1.0 for Gemma.
        out: (q, scale) or (q, scale, new_residual), each None for a new tensor; the scale must be None when `scale` is given.
            new_residual may be x or residual themselves.
        impl: "auto", "triton", "cpu" or "reference".
    Returns: (q, scale), with a residual (q, scale, new_residual): q [..., N] in the format's dtype; scale float32, the given
        one when it was given; new_residual = x + residual in x.dtype.
    Raises: ContractError when shapes or dtypes disagree; NotSupported for FP8_TENSOR without a scale, which one pass cannot
        know, for INT8_CHANNEL, and when no implementation takes the call.
    Source: Zhang & Sennrich, arXiv:1910.07467; Micikevicius et al., arXiv:2209.05433.
    """
    reason = unfit_for_rows(format, scale)
    if reason:
        raise NotSupported(f"rms_norm_quant: {reason}")
    q, out_scale, total = (*(out or ()), None, None, None)[:3]
    name = name_of(format)
    launch = rms_norm_quant.pick(impl, x, weight, residual, scale, q, out_scale, total, name, eps, weight_offset)
    if q is None:
        q = torch.empty(x.shape, dtype=format.dtype, device=x.device)
    known = scale
    if known is None:
        if out_scale is None:
            wide = torch.promote_types(x.dtype, torch.float32)
            out_scale = torch.empty(format.scale_shape(x.shape), dtype=wide, device=x.device)
        known = out_scale
    if residual is None:
        launch(q, out_scale, None, x, weight, None, scale, name, eps, weight_offset)
        return q, known
    total = torch.empty_like(x) if total is None else total
    launch(q, out_scale, total, x, weight, residual, scale, name, eps, weight_offset)
    return q, known, total


@rms_norm_quant.relation
def _relation(
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    out: Tensor | None,
    out_scale: Tensor | None,
    out_residual: Tensor | None,
    format: str,
    **others: object,
) -> tuple[str, str] | None:
    if out_residual is not None and residual is None:
        return "out_residual", "must be None without a residual"
    return FORMATS[format].results_fault(x, out, out_scale, scale)


@rms_norm_quant.reference
def _reference(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    format: str,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    kind = FORMATS[format]
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x if residual is None else (x.to(wide) + residual.to(wide)).to(x.dtype)
    y = total.to(wide)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * (weight.to(wide) + weight_offset)
    scale = kind.dynamic_scale(y) if scale is None else scale
    return kind.encode(y / kind.spread(scale, y.shape)), scale, total


def _unfit(
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    out: Tensor | None,
    out_scale: Tensor | None,
    out_residual: Tensor | None,
    **others: object,
) -> str | None:
    for name, value in (("scale", scale), ("out_scale", out_scale)):
        if value is not None and not value.is_contiguous():
            return f"`{name}` has strides {list(value.stride())}, the kernel wants it contiguous"
    return unfit_rows(x=x, residual=residual, out=out, out_residual=out_residual)


# 96 bytes with Triton 3.9 for rows of more than 16,384 columns that are not aligned, none with 3.6.
@rms_norm_quant.impl("triton", needs=("triton",), supports=_unfit, spill_bytes=96)
def _triton(
    out: Tensor,
    out_scale: Tensor | None,
    out_residual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    format: str,
    eps: float,
    weight_offset: float,
) -> None:
    from penstock.ops.norm.rms_norm_quant_triton import launch

    launch(out, out_scale, out_residual, x, weight, residual, scale, FORMATS[format], eps, weight_offset)


def _wide(x: Tensor, **others: object) -> str | None:
    return "float64 is for the reference" if x.dtype is torch.float64 else None


@rms_norm_quant.impl("cpu", needs=("cpu",), supports=_wide)
def _cpu(
    out: Tensor,
    out_scale: Tensor | None,
    out_residual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    format: str,
    eps: float,
    weight_offset: float,
) -> None:
    if residual is not None and out_residual is not None:
        x = torch.add(x, residual, out=out_residual)
    y = torch.empty(x.shape, dtype=torch.float32)
    normalise(y, x, weight.float(), eps, weight_offset)
    quantize(y, format=FORMATS[format], scale=scale, out=(out, out_scale), impl="cpu")


@rms_norm_quant.cost
def _cost(x: Tensor, weight: Tensor, residual: Tensor | None = None, **options: object) -> Cost:
    return Cost(bytes=nbytes(x, weight) + 2 * nbytes(residual) + x.numel())


@rms_norm_quant.cases
def cases() -> Iterable[Case]:
    """Every format, with and without a residual; then the awkward ones."""

    def case(
        name: str,
        format: Format,
        *shape: int,
        residual: bool = False,
        static: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        bench: bool = False,
        **options: object,
    ) -> Case:
        def build(make):
            arguments = {"x": make.randn(*shape, dtype=dtype), "weight": make.randn(shape[-1], dtype=dtype), "format": format}
            if residual:
                arguments["residual"] = make.randn(*shape, dtype=dtype, scale=4.0)
            if static:
                arguments["scale"] = make.randn(*format.scale_shape(shape), dtype=torch.float32).abs() * 0.005 + 0.005
            return arguments | options

        return Case(name, build, bench)

    for format in (FP8_TENSOR, FP8_TOKEN, FP8_BLOCK, INT8_TOKEN):
        name, static = format.name.lower(), format is FP8_TENSOR
        yield case(f"{name}_decode_row", format, 1, 4096, static=static)
        yield case(f"{name}_residual", format, 3, 5, 256, residual=True, static=static)
        yield case(f"{name}_ragged", format, 7, 300, static=static, weight_offset=1.0)
        yield case(f"{name}_ragged_static", format, 7, 333, static=True, residual=True, dtype=torch.float16)
        yield case(f"{name}_float32", format, 4, 40, static=static, dtype=torch.float32)
        yield case(f"{name}_wide_ragged", format, 2, 20001, static=static, residual=True)
        yield case(f"{name}_wide_static", format, 2, 20480, static=True)
        yield case(f"{name}_empty", format, 0, 512, static=static)
        yield case(f"{name}_64x7168", format, 64, 7168, static=static, residual=True, bench=True)
        yield case(f"{name}_8192x7168", format, 8192, 7168, static=static, residual=True, bench=True)
    yield case("fp8_token_1024x65536", FP8_TOKEN, 1024, 65536, bench=True)
