"""Drawing of inputs: lengths, decays and steps as trained models have them."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from penstock.core.cases import Make


def offsets(make: Make, lengths: Sequence[int]) -> Tensor:
    """cu_seqlens of the lengths."""
    return make.tensor([0, *accumulate(lengths)])


def heads(
    make: Make, tokens: int, H: int, P: int, G: int, N: int, dtype: torch.dtype, *, packed: bool = False
) -> dict[str, Any]:
    """x, dt, A, B, C, D and dt_bias of Mamba-2; `packed` makes x, B and C slices of one tensor, as a convolution leaves them."""
    if packed:
        both = make.randn(tokens, H * P + 2 * G * N, dtype=dtype)
        x, B, C = both.split((H * P, G * N, G * N), 1)
        x, B, C = x.view(tokens, H, P), B.view(tokens, G, N), C.view(tokens, G, N)
    else:
        x, B, C = (make.randn(tokens, *shape, dtype=dtype) for shape in ((H, P), (G, N), (G, N)))
    return {
        "x": x,
        "dt": make.randn(tokens, H, dtype=dtype),
        "A": -make.randn(H, dtype=torch.float32).abs() - 0.1,
        "B": B,
        "C": C,
        "D": make.randn(H, dtype=torch.float32),
        # A median step of 0.05: the state remembers some tens of tokens.
        "dt_bias": make.randn(H, dtype=torch.float32) - 3.0,
    }
