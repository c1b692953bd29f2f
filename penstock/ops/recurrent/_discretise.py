"""Step sizes, states at the start, and the end of a mixer, as the references and the CPU path compute them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def wide_of(x: Tensor) -> torch.dtype:
    """Float32 or wider."""
    return torch.promote_types(x.dtype, torch.float32)


def step_sizes(dt: Tensor, bias: Tensor | None, softplus: bool, low: float, high: float, dtype: torch.dtype) -> Tensor:
    """dt + bias, through softplus if asked for, within [low, high]."""
    steps = dt.to(dtype)
    if bias is not None:
        steps = steps + bias.to(dtype)
    if softplus:
        steps = F.softplus(steps)
    return steps.clamp(low, high)


def finish(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """(y + D · x) · silu(z) in the dtype of y; D has the dimensions of x after the first, less those it lacks at the end."""
    if D is not None:
        D = D.to(y.dtype)
        y = y + D.reshape(*D.shape, *[1] * (x.dim() - 1 - D.dim())) * x.to(y.dtype)
    return y if z is None else y * F.silu(z.to(y.dtype))


def limits(value: object) -> str | None:
    """A contract's rule for the two ends of dt_limit."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
    return None if good else "a number >= 0"


def activate(name: str | None) -> Callable[[Tensor], Tensor]:
    """The function of an activation by name."""
    return F.silu if name == "silu" else lambda values: values
