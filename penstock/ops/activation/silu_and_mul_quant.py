"""q, scale = quantize(silu(gate) · up) with [gate | up] = x: one pass, the products are float32 and never stored."""

from collections.abc import Iterable

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost, nbytes
from penstock.core.check import FLOATS, anything
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
from penstock.ops.quantization.quantize import quantize

SPEC = {
    "x": ("* 2*C", FLOATS),
    "scale": anything,
    "out?": ("* C", (torch.float8_e4m3fn, torch.int8)),
    "out_scale": anything,
    "format": is_format,
}


@op("(Tensor(a!) out, Tensor(b!)? out_scale, Tensor x, Tensor? scale, str format) -> ()", SPEC)
def silu_and_mul_quant(
    x: Tensor,
    *,
    format: Format,
    scale: Tensor | None = None,
    out: tuple[Tensor | None, Tensor | None] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """SwiGLU's gate, the first half of the last dimension through silu times the second half, stored in 8 bits.

    The products are float32 and are not rounded to x.dtype before they are quantised as `quantize` does. Another exponential
    may move a value that lies in the middle of two codes to the other one.

    Args:
        x: [..., 2C] float16, bfloat16 or float32: gate, then factor; any strides.
        format: FP8_TOKEN, FP8_BLOCK or INT8_TOKEN; FP8_TENSOR with a static scale.
        scale: static scale, float32: FP8_TENSOR [1], rows [...], FP8_BLOCK [..., ⌈C/128⌉]; None takes it from the products.
        out: (q, scale), either None for a new tensor; the scale must be None when `scale` is given.
        impl: "auto", "triton", "cpu" or "reference".
    Returns: (q, scale): q [..., C] in the format's dtype; scale float32, the given one when it was given.
    Raises: ContractError when shapes or dtypes disagree; NotSupported for FP8_TENSOR without a scale, which one pass cannot
        know, for INT8_CHANNEL, and when no implementation takes the call.
    Sources: Shazeer, arXiv:2002.05202; Micikevicius et al., arXiv:2209.05433.
    """
    reason = unfit_for_rows(format, scale)
    if reason:
        raise NotSupported(f"silu_and_mul_quant: {reason}")
    q, out_scale = out if out is not None else (None, None)
    name = name_of(format)
    launch = silu_and_mul_quant.pick(impl, x, scale, q, out_scale, name)
    shape = (*x.shape[:-1], x.shape[-1] // 2)
    if q is None:
        q = torch.empty(shape, dtype=format.dtype, device=x.device)
    known = scale
    if known is None:
        if out_scale is None:
            wide = torch.promote_types(x.dtype, torch.float32)
            out_scale = torch.empty(format.scale_shape(shape), dtype=wide, device=x.device)
        known = out_scale
    launch(q, out_scale, x, scale, name)
    return q, known


@silu_and_mul_quant.relation
def _relation(
    x: Tensor, scale: Tensor | None, out: Tensor | None, out_scale: Tensor | None, format: str
) -> tuple[str, str] | None:
    return FORMATS[format].results_fault(x[..., : x.shape[-1] // 2], out, out_scale, scale)


@silu_and_mul_quant.reference
def _reference(x: Tensor, scale: Tensor | None, format: str) -> tuple[Tensor, Tensor]:
    kind = FORMATS[format]
    gate, up = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    y = gate * torch.sigmoid(gate) * up
    scale = kind.dynamic_scale(y) if scale is None else scale
    return kind.encode(y / kind.spread(scale, y.shape)), scale


def _unfit(x: Tensor, scale: Tensor | None, out: Tensor | None, out_scale: Tensor | None, **others: object) -> str | None:
    for name, value in (("scale", scale), ("out_scale", out_scale)):
        if value is not None and not value.is_contiguous():
            return f"`{name}` has strides {list(value.stride())}, the kernel wants it contiguous"
    return unfit_rows(x=x, out=out)


@silu_and_mul_quant.impl("triton", needs=("triton",), supports=_unfit)
def _triton(out: Tensor, out_scale: Tensor | None, x: Tensor, scale: Tensor | None, format: str) -> None:
    from penstock.ops.activation.silu_and_mul_quant_triton import launch

    launch(out, out_scale, x, scale, FORMATS[format])


def _wide(x: Tensor, **others: object) -> str | None:
    return "float64 is for the reference" if x.dtype is torch.float64 else None


@silu_and_mul_quant.impl("cpu", needs=("cpu",), supports=_wide)
def _cpu(out: Tensor, out_scale: Tensor | None, x: Tensor, scale: Tensor | None, format: str) -> None:
    gate, up = x.chunk(2, -1)
    y = torch.nn.functional.silu(gate.float()).mul_(up)
    quantize(y, format=FORMATS[format], scale=scale, out=(out, out_scale), impl="cpu")


@silu_and_mul_quant.cost
def _cost(x: Tensor, **options: object) -> Cost:
    return Cost(bytes=nbytes(x) + x.numel() // 2)


@silu_and_mul_quant.cases
def cases() -> Iterable[Case]:
    """Every format; widths of feed-forward layers, then the awkward ones."""

    def case(
        name: str,
        format: Format,
        *shape: int,
        static: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        bench: bool = False,
    ) -> Case:
        def build(make):
            arguments = {"x": make.randn(*shape, dtype=dtype, scale=3.0), "format": format}
            if static:
                scales = make.randn(*format.scale_shape((*shape[:-1], shape[-1] // 2)), dtype=torch.float32)
                arguments["scale"] = scales.abs() * 0.02 + 0.02
            return arguments

        return Case(name, build, bench)

    for format in (FP8_TENSOR, FP8_TOKEN, FP8_BLOCK, INT8_TOKEN):
        name, static = format.name.lower(), format is FP8_TENSOR
        yield case(f"{name}_decode_row", format, 1, 2 * 1408, static=static)
        yield case(f"{name}_batch_of_sequences", format, 3, 5, 2 * 128, static=static)
        yield case(f"{name}_ragged", format, 7, 2 * 300, static=static)
        yield case(f"{name}_ragged_static", format, 5, 2 * 1001, static=True, dtype=torch.float16)
        yield case(f"{name}_float32", format, 4, 2 * 40, static=static, dtype=torch.float32)
        yield case(f"{name}_wide", format, 2, 2 * 20000, static=static)
        yield case(f"{name}_empty", format, 0, 512, static=static)
        yield case(f"{name}_no_columns", format, 3, 0, static=static)
        yield case(f"{name}_64x28672", format, 64, 28672, static=static, bench=True)
        yield case(f"{name}_4096x28672", format, 4096, 28672, static=static, bench=True)
    yield case("fp8_token_9x9000", FP8_TOKEN, 9, 2 * 9000)
