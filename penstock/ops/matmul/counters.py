"""Counters of a product whose K is split among programs: how many parts of each tile are done."""

import torch
from torch import Tensor

COUNTERS = 512


def gemm_counters(device: torch.device | str | None = None) -> Tensor:
    """Counters for the `counters` argument of gemm_fp8, gemm_int8 and gemm_bf16_fp32: what a call finds zero it leaves zero.

    Without the argument a call makes its own, which costs one fill. Calls that may run at the same time need counters of their
    own each.

    Args:
        device: where the products are computed.
    Returns: [512] int32 zeros.
    """
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)


def counters_fault(counters: Tensor | None) -> tuple[str, str] | None:
    """(argument, what it must be) when counters are too few, or None."""
    if counters is not None and (counters.numel() < COUNTERS or not counters.is_contiguous()):
        return "counters", f"must be {COUNTERS} contiguous zeros (gemm_counters), got {list(counters.shape)}"
    return None
