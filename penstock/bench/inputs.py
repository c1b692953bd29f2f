"""Rotating input sets: copies of a case's arguments whose bytes together exceed three times the cache."""

import math
from typing import Any

import torch
from torch import Tensor

from penstock.core.cases import nbytes
from penstock.core.device import properties
from penstock.testing.budget import Arguments, copy_arguments

CACHES = 3
# A CPU's last-level cache is not reported by torch; server parts have this much or more for each few cores.
CPU_CACHE = 32 * 2**20
MEMORY_SHARE = 0.25
MAX_SETS = 512


def tensors_of(arguments: Any) -> list[Tensor]:
    """Every tensor of the arguments, looked for in tuples and lists too."""
    if isinstance(arguments, Tensor):
        return [arguments]
    if isinstance(arguments, dict):
        arguments = arguments.values()
    elif not isinstance(arguments, (tuple, list)):
        return []
    return [tensor for value in arguments for tensor in tensors_of(value)]


def cache_bytes(device: torch.device) -> int:
    """The last-level cache that rotation has to defeat."""
    return properties(device).l2_cache if device.type == "cuda" else CPU_CACHE


def available_bytes(device: torch.device) -> int:
    """Memory that could still be taken."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as lines:
        facts = dict(line.split(":", 1) for line in lines)
    return int(facts["MemAvailable"].split()[0]) * 1024


def rotation(arguments: Arguments, result: Any, moved: int | None, device: torch.device) -> list[Arguments]:
    """Input sets for one case.

    Args:
        arguments: the first set.
        result: what one call returns; results rotate too.
        moved: bytes one call moves, when declared; otherwise everything it was given and returned.
    Returns: enough sets to exceed three caches, at most 512, within a quarter of the free memory, at least one.
    """
    held = sum(tensor.untyped_storage().nbytes() for tensor in tensors_of(arguments)) + nbytes(*tensors_of(result))
    wanted = math.ceil(CACHES * cache_bytes(device) / max(moved or held, 1)) + 1
    fitting = int(MEMORY_SHARE * available_bytes(device) / max(held, 1))
    count = max(1, min(wanted, fitting, MAX_SETS))
    return [arguments, *[copy_arguments(arguments) for _ in range(count - 1)]]
