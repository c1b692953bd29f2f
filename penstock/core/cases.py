"""Named shapes of an operator, the drawing of their inputs, and what a call must cost at least."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Make:
    """Draws a case's inputs on a device: random and seeded, never zeros. On the meta device it draws shapes alone."""

    def __init__(self, device: torch.device | str = "cpu", seed: int = 0):
        self.device = torch.device(device)
        source = "cpu" if self.device.type == "meta" else self.device
        self.generator = torch.Generator(source).manual_seed(seed)

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
        """Normal values times scale."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        drawn = torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return drawn.mul_(scale).to(dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """Uniform integers in [low, high)."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        return torch.randint(low, high, shape, generator=self.generator, device=self.device, dtype=dtype)

    def permutation(self, n: int) -> Tensor:
        """The integers below n in random order, int32."""
        if self.device.type == "meta":
            return torch.empty(n, dtype=torch.int32, device="meta")
        return torch.randperm(n, generator=self.generator, device=self.device).to(torch.int32)

    def tensor(self, values: Sequence[Any], dtype: torch.dtype = torch.int32) -> Tensor:
        """These values."""
        return torch.tensor(values, dtype=dtype, device=self.device)


@dataclass(frozen=True)
class Case:
    """A named shape.

    Args:
        name: short words joined by `_`; ragged, empty and padded cases say so.
        build: draws the public function's arguments, by name.
        bench: large enough to be timed; too large for the interpreter.
    """

    name: str
    build: Callable[[Make], dict[str, Any]]
    bench: bool = False


@dataclass(frozen=True)
class Cost:
    """The fewest bytes a call moves through device memory, and the operations it must do.

    Args:
        bytes: each input read once, each output written once.
        flops: tensor-core operations (a multiply-add is two).
        rate: which matmul ceiling the operations run against: "bf16", "fp8" or "int8".
    """

    bytes: int
    flops: int = 0
    rate: str = "bf16"


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes held by the tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
