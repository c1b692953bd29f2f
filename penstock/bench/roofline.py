"""Ceilings measured in the same run, and the floor they put under a call: max(bytes / bandwidth, operations / rate)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from penstock.bench.timing import Call, measure
from penstock.core.cases import Cost

# Which measured rate stands for which declared one, best first.
STAND_INS = {"int8": ("int8", "fp8", "bf16", "float32"), "fp8": ("fp8", "bf16", "float32"), "bf16": ("bf16", "float32")}


@dataclass(frozen=True)
class Ceilings:
    """What this device reached just now.

    Args:
        copy: bytes per second of a large copy, read and written bytes together.
        matmul: operations per second of a large matrix product by name of the dtype.
        notes: why a rate is missing.
    """

    copy: float
    matmul: dict[str, float]
    notes: dict[str, str] = field(default_factory=dict)

    def rate(self, name: str) -> float:
        """The matmul rate for "bf16", "fp8" or "int8" operations."""
        if name not in STAND_INS:
            raise ValueError(f"rate must be one of {', '.join(STAND_INS)}, got {name!r}")
        for known in STAND_INS[name]:
            if known in self.matmul:
                return self.matmul[known]
        raise ValueError(f"no matmul rate was measured for {name}; measured are {', '.join(self.matmul) or 'none'}")


def floor_us(cost: Cost, ceilings: Ceilings) -> float:
    """The least time of a call with this cost, in µs."""
    seconds = cost.bytes / ceilings.copy
    if cost.flops:
        seconds = max(seconds, cost.flops / ceilings.rate(cost.rate))
    return seconds * 1e6


def bound_by(cost: Cost, ceilings: Ceilings) -> str:
    """Which of the two makes the floor: "memory" or "compute"."""
    if cost.flops and cost.flops / ceilings.rate(cost.rate) > cost.bytes / ceilings.copy:
        return "compute"
    return "memory"


def measure_ceilings(device: torch.device, *, quick: bool = False, budget: float = 0.4) -> Ceilings:
    """Measures copy bandwidth and matmul rates on random data; `quick` shrinks the problems."""
    size = (2**31 if device.type == "cuda" else 2**28) // (8 if quick else 1)
    # Inside a CUDA graph copy_ becomes a memcpy node, which reaches two thirds of what an element-wise kernel does.
    copy = max(2 * size / _time(job, device, budget) for job in _copies(size, device))
    if device.type == "cuda":
        n = 4096 if quick else 8192
        jobs = {"bf16": _bf16(n, device)}
    else:
        n = 512 if quick else 1024
        a, b = torch.randn(n, n), torch.randn(n, n)
        codes = torch.randint(-127, 128, (n, n), dtype=torch.int8)
        jobs = {"float32": lambda: a @ b, "bf16": _bf16(n, device), "int8": lambda: torch._int_mm(codes, codes)}
    notes = {}
    fp8 = _fp8(n, device)
    if isinstance(fp8, str):
        notes["fp8"] = fp8
    else:
        jobs["fp8"] = fp8
    matmul = {name: 2 * n**3 / _time(job, device, budget) for name, job in jobs.items()}
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Ceilings(copy, matmul, notes)


def _time(call: Call, device: torch.device, budget: float) -> float:
    return measure({"ceiling": [call]}, device, budget=budget)["ceiling"].median_us * 1e-6


def _copies(size: int, device: torch.device) -> list[Call]:
    source = torch.randint(0, 2**31 - 1, (size // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return [lambda: target.copy_(source), lambda: torch.bitwise_not(source, out=target)]


def _bf16(n: int, device: torch.device) -> Call:
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    b = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _fp8(n: int, device: torch.device) -> Call | str:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return f"{device} has no FP8 matrix product"

    def draw() -> Tensor:
        return torch.randn(n, n, device=device).to(torch.float8_e4m3fn)

    a, b = draw(), draw().t()
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
