"""The scales of both operands of a product: their shapes, what a kernel calls them, and the dequantised operands."""

import torch
from torch import Tensor

from penstock.core.formats import BLOCK, FORMATS, Format

FP8_FORMATS = ("FP8_TENSOR", "FP8_TOKEN", "FP8_BLOCK")
SCALES = (torch.float32, torch.float64)


def is_fp8_format(value: object) -> str | None:
    """An FP8 format's name, or None."""
    known = value is None or value in FP8_FORMATS
    return None if known else f"None or one of {', '.join(FP8_FORMATS)} (penstock.core.formats)"


def weight_shapes(format: str, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes that the scales of weights [..., N, K] may have: a leading E for experts, which one for all may lack."""
    *experts, N, K = shape
    kind = FORMATS[format].granularity
    if kind == "tensor":
        return [(1,), *([tuple(experts), (*experts, 1)] if experts else [])]
    if kind == "block":
        return [(*experts, -(-N // BLOCK), -(-K // BLOCK))]
    return [(*experts, N)]


def scale_fault(format: str | None, name: str, scale: Tensor | None, shapes: list[tuple[int, ...]]) -> tuple[str, str] | None:
    """(argument, what it must be) when a scale is wrong, or None."""
    if format is None:
        return None if scale is None else (name, "must be None without a format")
    wanted = " or ".join(f"float32{list(shape)}" for shape in dict.fromkeys(shapes))
    if not isinstance(scale, Tensor):
        return name, f"must be {wanted} with format={format}, got {type(scale).__name__}"
    if tuple(scale.shape) not in shapes or scale.dtype not in SCALES:
        got = f"{str(scale.dtype).removeprefix('torch.')}{list(scale.shape)}"
        return name, f"must be {wanted} with format={format}, got {got}"
    return None


def expert_scale(scale: Tensor, expert: int, experts: int, format: str) -> Tensor:
    """The scales of one expert's weights."""
    if FORMATS[format].granularity == "tensor":
        return scale if scale.numel() == 1 else scale.reshape(experts)[expert : expert + 1]
    return scale[expert]


def dequantised(values: Tensor, scale: Tensor | None, format: str | None, weight: bool = False) -> Tensor:
    """values · scale in at least float32; `weight` chooses the squares of FP8_BLOCK."""
    wide = values.to(torch.promote_types(torch.float32 if values.element_size() == 1 else values.dtype, torch.float32))
    if scale is None or format is None:
        return wide
    kind = FORMATS[format]
    return wide * kind.spread(scale, wide.shape, weight and kind.granularity == "block")


def input_format(format: str) -> Format:
    """How activations that come without scales are quantised: by block, or by token, so that no token depends on others."""
    return FORMATS["FP8_BLOCK" if format == "FP8_BLOCK" else "FP8_TOKEN"]


def kinds(format: str | None) -> tuple[str, str]:
    """What kernels call the scales of (activations, weights)."""
    if format is None:
        return "none", "none"
    kind = FORMATS[format].granularity
    return kind, {"token": "channel"}.get(kind, kind)


def unfit(**operands: Tensor | None) -> str | None:
    """Why the kernel cannot read these operands, or None when it can."""
    for name, value in operands.items():
        if value is None:
            continue
        if value.dtype is torch.float32 and value.dim() == 2 and not name.endswith("scale"):
            return f"`{name}` is float32: tensor cores would round it to TF32"
        if name.endswith("scale") and not value.is_contiguous():
            return f"`{name}` has strides {list(value.stride())}, the kernel wants it contiguous"
        if not name.endswith("scale") and value.stride(-1) != 1 and value.shape[-1] > 1:
            return f"`{name}` has stride {value.stride(-1)} along K, the kernel reads stride 1"
    return None
