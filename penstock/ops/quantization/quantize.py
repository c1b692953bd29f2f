"""q = round(x / scale) in 8 bits, saturating, with x ≈ q · scale; without a given scale, scale = max|x| / largest."""

from collections.abc import Iterable

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost, nbytes
from penstock.core.check import anything, boolean
from penstock.core.formats import (
    FORMATS,
    FP8_BLOCK,
    FP8_TENSOR,
    FP8_TOKEN,
    INT8_CHANNEL,
    INT8_TOKEN,
    Format,
    is_format,
    name_of,
)
from penstock.core.op import op
from penstock.core.rows import unfit_rows
from penstock.ops.quantization.quantize_cpu import encode

SPEC = {
    "x": ("* K", (torch.bfloat16, torch.float16, torch.float32)),
    "out?": ("* K", (torch.float8_e4m3fn, torch.int8)),
    "out_scale": anything,
    "scale": anything,
    "format": is_format,
    "weight": boolean,
}


@op("(Tensor(a!) out, Tensor(b!)? out_scale, Tensor x, Tensor? scale, str format, bool weight) -> ()", SPEC, exact=True)
def quantize(
    x: Tensor,
    *,
    format: Format,
    scale: Tensor | None = None,
    weight: bool = False,
    out: tuple[Tensor | None, Tensor | None] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Stores a tensor in 8 bits, with one float32 scale for the tensor, each row, or each block.

    The arithmetic is float32 and the same to the bit in every implementation: both divisions are correctly rounded, and a
    quotient is rounded to nearest even, at most ±448 (FP8) or ±127 (INT8). Values that are all zero have scale 1. NaN does not
    count in a dynamic scale and is stored as NaN in FP8 (of either sign), as 0 in INT8; infinity is stored as the largest value
    and counts as the largest float32.

    Args:
        x: [..., K] bfloat16, float16 or float32; any strides, any K.
        format: FP8_TENSOR, FP8_TOKEN, FP8_BLOCK, INT8_TOKEN or INT8_CHANNEL of penstock.core.formats.
        scale: static scale, float32 in the shape of the returned one, positive and finite; None takes it from x.
        weight: with FP8_BLOCK, x is a weight [..., N, K] and shares a scale in squares of 128×128 instead of 128 of a row.
        out: (q, scale), either None for a new tensor; the scale must be None when `scale` is given.
        impl: "auto", "triton", "cpu" or "reference".
    Returns: (q, scale): q [..., K] in the format's dtype; scale float32: FP8_TENSOR [1]; the three row formats [...];
        FP8_BLOCK [..., ⌈K/128⌉], the last block may be shorter; as a weight [..., ⌈N/128⌉, ⌈K/128⌉]. A given scale is returned.
    Raises: ContractError when shapes or dtypes disagree; NotSupported when no implementation takes the call.
    Sources: Micikevicius et al., arXiv:2209.05433 (FP8); DeepSeek-V3, arXiv:2412.19437 (blocks).
    """
    q, out_scale = out if out is not None else (None, None)
    name = name_of(format)
    launch = quantize.pick(impl, x, q, out_scale, scale, name, weight)
    if q is None:
        q = torch.empty(x.shape, dtype=format.dtype, device=x.device)
    known = scale
    if known is None:
        if out_scale is None:
            out_scale = torch.empty(format.scale_shape(x.shape, weight), dtype=torch.float32, device=x.device)
        known = out_scale
    launch(q, out_scale, x, scale, name, weight)
    return q, known


@quantize.relation
def _relation(
    x: Tensor, out: Tensor | None, out_scale: Tensor | None, scale: Tensor | None, format: str, weight: bool
) -> tuple[str, str] | None:
    kind = FORMATS[format]
    fault = kind.weight_fault(x, weight)
    if fault:
        return "weight", fault
    return kind.results_fault(x, out, out_scale, scale, weight)


@quantize.reference
def _reference(x: Tensor, scale: Tensor | None, format: str, weight: bool) -> tuple[Tensor, Tensor]:
    kind = FORMATS[format]
    wide = x.float()
    scale = kind.dynamic_scale(wide, weight) if scale is None else scale
    return kind.encode(wide / kind.spread(scale, x.shape, weight)), scale


def _unfit(x: Tensor, out: Tensor | None, out_scale: Tensor | None, scale: Tensor | None, **others: object) -> str | None:
    for name, value in (("scale", scale), ("out_scale", out_scale)):
        if value is not None and not value.is_contiguous():
            return f"`{name}` has strides {list(value.stride())}, the kernel wants it contiguous"
    return unfit_rows(x=x, out=out)


# 24 bytes with Triton 3.9 for the squares of a weight, none with 3.6.
@quantize.impl("triton", needs=("triton",), supports=_unfit, spill_bytes=24)
def _triton(out: Tensor, out_scale: Tensor | None, x: Tensor, scale: Tensor | None, format: str, weight: bool) -> None:
    from penstock.ops.quantization.quantize_triton import launch

    launch(out, out_scale, x, scale, FORMATS[format], weight)


@quantize.impl("cpu", needs=("cpu",))
def _cpu(out: Tensor, out_scale: Tensor | None, x: Tensor, scale: Tensor | None, format: str, weight: bool) -> None:
    encode(out, out_scale, x, scale, FORMATS[format], weight)


@quantize.check_values
def _check_values(scale: Tensor | None, **others: object) -> None:
    if scale is not None and not bool((scale.isfinite() & (scale > 0)).all()):
        raise quantize.contract.error("scale", "must be positive and finite", {"scale": scale})


@quantize.cost
def _cost(x: Tensor, format: Format, scale: Tensor | None = None, **options: object) -> Cost:
    # The largest magnitude of a whole tensor is known only after a first reading.
    readings = 2 if format is FP8_TENSOR and scale is None else 1
    return Cost(bytes=readings * nbytes(x) + x.numel())


@quantize.cases
def cases() -> Iterable[Case]:
    """Every format, dynamic and static; then the awkward ones."""

    def case(
        name: str,
        format: Format,
        *shape: int,
        static: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        bench: bool = False,
        **options: bool,
    ) -> Case:
        def build(make):
            arguments = {"x": make.randn(*shape, dtype=dtype, scale=3.0), "format": format, **options}
            if static:
                scales = make.randn(*format.scale_shape(shape, **options), dtype=torch.float32)
                arguments["scale"] = scales.abs() * 0.01 + 0.001
            return arguments

        return Case(name, build, bench)

    for format in (FP8_TENSOR, FP8_TOKEN, FP8_BLOCK, INT8_TOKEN, INT8_CHANNEL):
        name = format.name.lower()
        yield case(f"{name}_decode_row", format, 1, 1024)
        yield case(f"{name}_ragged", format, 7, 300, dtype=torch.float16)
        yield case(f"{name}_ragged_static", format, 3, 5, 133, static=True)
        yield case(f"{name}_float32", format, 4, 256, dtype=torch.float32)
        yield case(f"{name}_wide", format, 2, 20001)
        yield case(f"{name}_empty", format, 0, 512)
        yield case(f"{name}_no_columns", format, 3, 0)
        yield case(f"{name}_64x7168", format, 64, 7168, bench=True)
        yield case(f"{name}_8192x7168", format, 8192, 7168, bench=True)
    yield case("weight_ragged", FP8_BLOCK, 200, 300, weight=True)
    yield case("weight_ragged_static", FP8_BLOCK, 130, 257, weight=True, static=True)
    yield case("weight_of_experts", FP8_BLOCK, 3, 100, 256, weight=True)
    yield case("weight_empty", FP8_BLOCK, 0, 256, weight=True)
    yield case("weight_7168x4096", FP8_BLOCK, 7168, 4096, weight=True, bench=True)
    yield case("fp8_token_8192x65536", FP8_TOKEN, 8192, 65536, bench=True)
    yield case("fp8_tensor_8192x7168_static", FP8_TENSOR, 8192, 7168, static=True, bench=True)
