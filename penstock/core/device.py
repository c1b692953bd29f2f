"""What a device can do, asked by feature: has_wgmma(device), has_tma(device), num_sms(device). Never asked at import."""

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Properties:
    """Facts of one device; sizes in bytes, shared_memory per block."""

    name: str
    capability: tuple[int, int]
    num_sms: int
    shared_memory: int
    l2_cache: int


# Meta tensors stand for an H200 while kernels are compiled on a machine with no GPU.
H200 = Properties("NVIDIA H200", (9, 0), 132, 232_448, 60 * 2**20)
# The interpreter runs programs one after another: a few "multiprocessors" are enough to exercise split work.
INTERPRETER = Properties("Triton interpreter", (0, 0), 4, 232_448, 0)


@cache
def properties(device: torch.device) -> Properties:
    """The device's facts; a meta device answers as an H200, a CPU as the interpreter."""
    if device.type == "meta":
        return H200
    if device.type == "cpu":
        return INTERPRETER
    if device.type != "cuda":
        raise ValueError(f"device must be cuda, cpu or meta, got {device}")
    facts = torch.cuda.get_device_properties(device)
    return Properties(
        facts.name,
        (facts.major, facts.minor),
        facts.multi_processor_count,
        facts.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        facts.L2_cache_size,
    )


def has_wgmma(device: torch.device) -> bool:
    """Hopper's warpgroup matrix instructions, which later architectures dropped."""
    return properties(device).capability[0] == 9


def has_tma(device: torch.device) -> bool:
    """The tensor memory accelerator: Hopper and later."""
    return properties(device).capability >= (9, 0)


def has_dependent_launch(device: torch.device) -> bool:
    """A kernel can be launched before the one it follows has ended: Hopper and later."""
    return properties(device).capability >= (9, 0)


def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors."""
    return properties(device).num_sms
