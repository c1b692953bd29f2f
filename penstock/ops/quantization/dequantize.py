"""x = q · scale: a float32 product, rounded to the asked dtype."""

from collections.abc import Iterable

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost, nbytes
from penstock.core.check import anything, boolean
from penstock.core.formats import (
    BLOCK,
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

SPEC = {
    "q": ("* K", (torch.float8_e4m3fn, torch.int8)),
    "scale": anything,
    "out": ("* K", (torch.bfloat16, torch.float16, torch.float32)),
    "format": is_format,
    "weight": boolean,
}


@op("(Tensor(a!) out, Tensor q, Tensor scale, str format, bool weight) -> ()", SPEC, exact=True)
def dequantize(
    q: Tensor,
    scale: Tensor,
    *,
    format: Format,
    dtype: torch.dtype = torch.bfloat16,
    weight: bool = False,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Brings stored values back: the inverse of quantize, but for what rounding took.

    Args:
        q: [..., K] in the format's dtype; any strides.
        scale: float32 in the shape that quantize returns: FP8_TENSOR [1]; row formats [...]; FP8_BLOCK [..., ⌈K/128⌉], as a
            weight [..., ⌈N/128⌉, ⌈K/128⌉].
        format: one of penstock.core.formats.
        dtype: bfloat16, float16 or float32; with `out`, the dtype of `out` counts.
        weight: with FP8_BLOCK, q is a weight [..., N, K] with a scale for each 128×128.
        out: [..., K].
        impl: "auto", "triton", "cpu" or "reference".
    Returns: [..., K] in dtype; a product beyond float16's range is infinite there.
    Raises: ContractError when shapes or dtypes disagree; NotSupported when no implementation takes the call.
    Source: Micikevicius et al., arXiv:2209.05433.
    """
    out = torch.empty(q.shape, dtype=dtype, device=q.device) if out is None else out
    name = name_of(format)
    dequantize.pick(impl, q, scale, out, name, weight)(out, q, scale, name, weight)
    return out


@dequantize.relation
def _relation(q: Tensor, scale: Tensor, format: str, weight: bool, **others: object) -> tuple[str, str] | None:
    kind = FORMATS[format]
    if q.dtype is not kind.dtype:
        return "q", f"must be {kind.dtype} with format={format}, got {q.dtype}"
    fault = kind.weight_fault(q, weight)
    if fault:
        return "weight", fault
    fault = kind.scale_fault(scale, q, weight)
    return ("scale", fault) if fault else None


@dequantize.reference
def _reference(q: Tensor, scale: Tensor, format: str, weight: bool) -> Tensor:
    return q.float() * FORMATS[format].spread(scale, q.shape, weight)


def _unfit(q: Tensor, scale: Tensor, out: Tensor, **others: object) -> str | None:
    if not scale.is_contiguous():
        return f"`scale` has strides {list(scale.stride())}, the kernel wants it contiguous"
    return unfit_rows(q=q, out=out)


@dequantize.impl("triton", needs=("triton",), supports=_unfit)
def _triton(out: Tensor, q: Tensor, scale: Tensor, format: str, weight: bool) -> None:
    from penstock.ops.quantization.dequantize_triton import launch

    launch(out, q, scale, FORMATS[format], weight)


@dequantize.impl("cpu", needs=("cpu",))
def _cpu(out: Tensor, q: Tensor, scale: Tensor, format: str, weight: bool) -> None:
    kind = FORMATS[format]
    if kind.granularity == "block" and not weight and q.shape[-1] % BLOCK == 0 and q.numel():
        out.copy_((q.float().unflatten(-1, (-1, BLOCK)) * scale.unsqueeze(-1)).flatten(-2))
    else:
        out.copy_(q.float().mul_(kind.spread(scale, q.shape, weight)))


@dequantize.cost
def _cost(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16, **options: object) -> Cost:
    return Cost(bytes=nbytes(q, scale) + q.numel() * dtype.itemsize)


@dequantize.cases
def cases() -> Iterable[Case]:
    """Every format and result; then the awkward ones."""

    def case(
        name: str, format: Format, *shape: int, dtype: torch.dtype = torch.bfloat16, bench: bool = False, **options: bool
    ) -> Case:
        def build(make):
            q = make.integers(-127, 128, *shape, dtype=torch.int8)
            if format.dtype is not torch.int8:
                # Any byte but NaN's two: all 254 codes, subnormal ones included.
                q = q.view(torch.float8_e4m3fn) if make.device.type != "meta" else q.to(torch.float8_e4m3fn)
                q = torch.where(q.float().isnan(), 1.0, q.float()).to(torch.float8_e4m3fn)
            scale = make.randn(*format.scale_shape(shape, **options), dtype=torch.float32)
            return {"q": q, "scale": scale, "format": format, "dtype": dtype, **options}

        return Case(name, build, bench)

    for format in (FP8_TENSOR, FP8_TOKEN, FP8_BLOCK, INT8_TOKEN, INT8_CHANNEL):
        name = format.name.lower()
        yield case(f"{name}_decode_row", format, 1, 1024)
        yield case(f"{name}_ragged", format, 7, 300, dtype=torch.float16)
        yield case(f"{name}_float32_ragged", format, 3, 5, 133, dtype=torch.float32)
        yield case(f"{name}_wide", format, 2, 20001)
        yield case(f"{name}_empty", format, 0, 512)
        yield case(f"{name}_no_columns", format, 3, 0)
        yield case(f"{name}_8192x7168", format, 8192, 7168, bench=True)
    yield case("weight_ragged", FP8_BLOCK, 200, 300, weight=True)
    yield case("weight_of_experts", FP8_BLOCK, 3, 100, 256, weight=True)
    yield case("weight_7168x4096", FP8_BLOCK, 7168, 4096, weight=True, bench=True)
