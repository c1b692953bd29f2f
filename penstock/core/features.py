"""The features an implementation may need. Each answers None, or why this call's tensors do not have it."""

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from penstock.core.device import has_tma, has_wgmma

Feature = Callable[[Sequence[Tensor], bool], str | None]


@functools.cache
def has_triton() -> bool:
    """Triton is installed."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def interpreting() -> bool:
    """TRITON_INTERPRET=1: kernels run on the CPU, slowly, through the interpreter, which is repaired here first."""
    if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("1", "true", "on"):
        return False
    from penstock.core import interpreter

    interpreter.repair()
    return True


def _cpu(tensors: Sequence[Tensor], by_name: bool) -> str | None:
    return None if tensors[0].device.type == "cpu" else f"needs CPU tensors, these are on {tensors[0].device}"


def _triton(tensors: Sequence[Tensor], by_name: bool) -> str | None:
    """A GPU; or, asked for by name, the interpreter on CPU tensors or compilation alone on meta tensors."""
    if not has_triton():
        return "Triton is not installed (pip install 'penstock[cuda]')"
    wide = next((tensor for tensor in tensors if tensor.dtype == torch.float64), None)
    if wide is not None:
        return "float64 is for the reference and the CPU path"
    kind = tensors[0].device.type
    if kind == "cuda" or (kind == "meta" and by_name):
        return None
    if kind == "cpu" and by_name:
        return None if interpreting() else "on CPU tensors it needs TRITON_INTERPRET=1, set before Triton is imported"
    return f"needs a CUDA device, these tensors are on {tensors[0].device}"


def _hopper(name: str, has: Callable[[torch.device], bool]) -> Feature:
    def feature(tensors: Sequence[Tensor], by_name: bool) -> str | None:
        device = tensors[0].device
        if device.type == "cpu":
            return "needs a CUDA device, these tensors are on cpu"
        return None if has(device) else f"{device} has no {name}"

    return feature


FEATURES: dict[str, Feature] = {
    "cpu": _cpu,
    "triton": _triton,
    "wgmma": _hopper("wgmma", has_wgmma),
    "tma": _hopper("TMA", has_tma),
}
