"""Rotating input sets: copies of a case's arguments whose bytes together exceed three times the cache."""

import math
from typing import Any

import torch
from torch import Tensor

from penstock.core.cases import nbytes
from penstock.core.device import properties

CACHES = 3
# A CPU's last-level cache is not reported by torch; server parts have this much or more for each few cores.
CPU_CACHE = 32 * 2**20
MEMORY_SHARE = 0.25
MAX_SETS = 512

Arguments = dict[str, Any]


def tensors_of(arguments: Any) -> list[Tensor]:
    """Every tensor of the arguments, looked for in tuples and lists too."""
    if isinstance(arguments, Tensor):
        return [arguments]
    if isinstance(arguments, dict):
        arguments = arguments.values()
    elif not isinstance(arguments, (tuple, list)):
        return []
    return [tensor for value in arguments for tensor in tensors_of(value)]


def copy_arguments(arguments: Arguments) -> Arguments:
    """The same values and strides in other memory; tensors that share memory share it in the copy."""
    storages: dict[int, Any] = {}

    def copy(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            items = [copy(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if not isinstance(value, Tensor):
            return value
        if value.numel() == 0:
            return value.clone()
        storage = value.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = storage.clone()
        whole = torch.empty(0, dtype=value.dtype, device=value.device).set_(storages[storage.data_ptr()])
        return whole.as_strided(value.shape, value.stride(), value.storage_offset())

    return {name: copy(value) for name, value in arguments.items()}


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
