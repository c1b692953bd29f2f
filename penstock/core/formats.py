"""What quantised bytes mean: x ≈ values · scale, with the scale's shape and granularity."""

from dataclasses import dataclass

import torch
from torch import Tensor

FP8_MAX = 448.0


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
        """Rounds already scaled values to nearest even, saturating."""
        limited = values.clamp(-self.largest, self.largest)
        return limited.to(self.dtype) if self.dtype.is_floating_point else limited.round().to(self.dtype)


FP8_TENSOR = Format("FP8_TENSOR", torch.float8_e4m3fn, "tensor")
FP8_TOKEN = Format("FP8_TOKEN", torch.float8_e4m3fn, "token")
FP8_BLOCK = Format("FP8_BLOCK", torch.float8_e4m3fn, "block")
INT8_TOKEN = Format("INT8_TOKEN", torch.int8, "token")
INT8_CHANNEL = Format("INT8_CHANNEL", torch.int8, "channel")
