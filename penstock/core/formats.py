"""What quantised bytes mean: x ≈ values · scale, with the scale's shape and granularity.

The arithmetic, in float32, is the same on every device to the bit (formats_triton.py has it for kernels): a dynamic scale is
max|x| / largest, a stored value is x / scale rounded to nearest even; both divisions are correctly rounded. What the maximum
leaves out: NaN counts as zero and infinity as the largest float32, so that one bad value does not spoil those beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FP8_MAX = 448.0
BLOCK = 128
# Below the smallest normal float32 a scale would lose bits, or be zero.
SMALLEST_SCALE = 2.0**-126


@dataclass(frozen=True)
class Format:
    """A way to store numbers in 8 bits.

    Args:
        name: as users write it.
        dtype: of the stored values.
        granularity: what shares one float32 scale: "tensor", "token" (a row), "block" (128 columns of a row of activations, a
            128×128 square of weights), "channel" (an output row of a weight).
    """

    name: str
    dtype: torch.dtype
    granularity: str

    @property
    def largest(self) -> float:
        """The largest magnitude a stored value can have."""
        return FP8_MAX if self.dtype == torch.float8_e4m3fn else 127.0

    def encode(self, values: Tensor) -> Tensor:
        """Rounds already scaled values to nearest even, saturating; NaN stays NaN in FP8 and is 0 in INT8."""
        limited = values.clamp(-self.largest, self.largest)
        if self.dtype.is_floating_point:
            return limited.to(self.dtype)
        return limited.nan_to_num(nan=0.0).round().to(self.dtype)

    def scale_shape(self, shape: Sequence[int], weight: bool = False) -> tuple[int, ...]:
        """The shape of the scales of a tensor of this shape; `weight` chooses the squares of "block"."""
        if self.granularity == "tensor":
            return (1,)
        if self.granularity != "block":
            return tuple(shape[:-1])
        counts = [-(-size // BLOCK) for size in shape[-1 - weight :]]
        return (*shape[: -1 - weight], *counts)

    def dynamic_scale(self, x: Tensor, weight: bool = False) -> Tensor:
        """max|x| / largest over the values that share a scale, at least 2⁻¹²⁶; 1 where they are all zero."""
        shape = self.scale_shape(x.shape, weight)
        if x.numel() == 0:
            return x.new_ones(shape)
        magnitude = x.abs().nan_to_num(nan=0.0).clamp(max=torch.finfo(torch.float32).max)
        if self.granularity == "tensor":
            most = magnitude.amax().view(1)
        elif self.granularity != "block":
            most = magnitude.amax(-1)
        else:
            most = _in_groups(magnitude).amax(-1)
            if weight:
                most = _in_groups(most.transpose(-1, -2)).amax(-1).transpose(-1, -2)
        # A tensor of its own: torch multiplies by the reciprocal of a number on a GPU.
        scale = (most / torch.full_like(most, self.largest)).clamp(min=SMALLEST_SCALE)
        return torch.where(most == 0, 1.0, scale).contiguous()

    def spread(self, scale: Tensor, shape: Sequence[int], weight: bool = False) -> Tensor:
        """The scale of each value of a tensor of this shape, as far as broadcasting does not do it."""
        if self.granularity == "tensor":
            return scale
        if self.granularity != "block":
            return scale.unsqueeze(-1)
        if weight:
            scale = scale.repeat_interleave(BLOCK, -2)[..., : shape[-2], :]
        return scale.repeat_interleave(BLOCK, -1)[..., : shape[-1]]

    def weight_fault(self, x: Tensor, weight: bool) -> str | None:
        """Why x cannot be scaled in squares, when that is asked for."""
        if weight and (self.granularity != "block" or x.dim() < 2):
            return (
                f"must be False with format={self.name} and {x.dim()} dimensions: it chooses the squares of FP8_BLOCK, got True"
            )
        return None

    def scale_fault(self, scale: object, x: Tensor, weight: bool = False) -> str | None:
        """What the scale of x must be and what it is, or None when it is right."""
        wanted = self.scale_shape(x.shape, weight)
        if not isinstance(scale, Tensor):
            return f"must be a tensor, got {type(scale).__name__}"
        # The float64 oracle comes with float64 scales.
        if scale.dtype not in (torch.float32, torch.float64) or tuple(scale.shape) != wanted:
            got = f"{str(scale.dtype).removeprefix('torch.')}{list(scale.shape)}"
            return f"must be float32{list(wanted)} with format={self.name}, got {got}"
        return None if scale.device == x.device else f"must be on {x.device} like x, got {scale.device}"

    def results_fault(
        self, x: Tensor, out: Tensor | None, out_scale: object, scale: object, weight: bool = False
    ) -> tuple[str, str] | None:
        """(argument, what it must be) for the first of an operator's quantised results and scales that is wrong, or None."""
        if out is not None and out.dtype is not self.dtype:
            return "out", f"must be {self.dtype} with format={self.name}, got {out.dtype}"
        if scale is not None and out_scale is not None:
            return "out_scale", "must be None when `scale` is given"
        for argument, value in (("scale", scale), ("out_scale", out_scale)):
            fault = None if value is None else self.scale_fault(value, x, weight)
            if fault:
                return argument, fault
        return None


def _in_groups(values: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % BLOCK))
    return padded.unflatten(-1, (-1, BLOCK))


FP8_TENSOR = Format("FP8_TENSOR", torch.float8_e4m3fn, "tensor")
FP8_TOKEN = Format("FP8_TOKEN", torch.float8_e4m3fn, "token")
FP8_BLOCK = Format("FP8_BLOCK", torch.float8_e4m3fn, "block")
INT8_TOKEN = Format("INT8_TOKEN", torch.int8, "token")
INT8_CHANNEL = Format("INT8_CHANNEL", torch.int8, "channel")
FORMATS = {format.name: format for format in (FP8_TENSOR, FP8_TOKEN, FP8_BLOCK, INT8_TOKEN, INT8_CHANNEL)}


def is_format(value: object) -> str | None:
    """The name of a format: what a contract checks, because a schema takes strings."""
    return None if value in FORMATS else f"one of {', '.join(FORMATS)} (penstock.core.formats)"


def name_of(format: object) -> object:
    """A format's name; anything else is returned for the contract to refuse."""
    return format.name if isinstance(format, Format) else format


def unfit_for_rows(format: object, scale: Tensor | None) -> str | None:
    """Why an operator that makes rows in one pass cannot quantise them too, or None when it can."""
    if format == INT8_CHANNEL:
        return "format INT8_CHANNEL: its scales belong to the rows of a weight; use INT8_TOKEN"
    if format == FP8_TENSOR and scale is None:
        return "format FP8_TENSOR without `scale`: the scale of all rows is known after the last one; give it, or call quantize"
    return None
