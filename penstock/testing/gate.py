"""Compile every kernel of every case for sm_90a on a machine with no GPU, and read what the compiler made of it.

    python -m penstock.testing.gate                 # every operator
    python -m penstock.testing.gate rms_norm        # some of them

Launchers run unchanged on meta tensors, which stand for an H200; a launch compiles its kernel exactly as it would on the GPU
and stops there. Each kernel must fit in shared memory, spill no more than its implementation states, and an implementation's
kernels must contain between them the instructions it was written for.
"""

import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from penstock.core.cases import Make
from penstock.core.device import H200
from penstock.core.op import Implementation, NotSupported, Op

INSTRUCTIONS = (
    "HGMMA",
    "QGMMA",
    "IGMMA",
    "HMMA",
    "UTMALDG",
    "UTMASTG",
    "LDGSTS",
    "LDL",
    "STL",
    "ACQBULK",
    "USETMAXREG",
)


@dataclass(frozen=True)
class Compiled:
    """One kernel as the compiler left it; sizes in bytes."""

    kernel: str
    registers: int
    spill: int
    shared: int
    num_warps: int
    instructions: dict[str, int]


class _NoGpu:
    """Answers Triton's questions about the active device as a Hopper GPU would; it cannot launch."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextmanager
def compile_only() -> Iterator[list[Compiled]]:
    """Inside, launching a Triton or Gluon kernel compiles it for sm_90a and appends what came of it to the list."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled: list[Compiled] = []
    seen: dict[int, None] = {}
    run = JITFunction.run

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        if id(kernel) not in seen:
            seen[id(kernel)] = None
            compiled.append(_inspect(kernel))
        return kernel

    driver.set_active(_NoGpu())
    JITFunction.run = compile_instead
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = None


def _inspect(kernel: Any) -> Compiled:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True)
        sass = subprocess.run([tools / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    text = usage.stdout + usage.stderr
    registers = re.search(r"REG:(\d+)", text)
    stack = re.search(r"STACK:(\d+)", text)
    if registers is None or stack is None:
        raise RuntimeError(f"cuobjdump -res-usage of {kernel.metadata.name} has no REG or STACK: {text!r}")
    counts = {name: len(re.findall(rf"\b{name}\b", sass)) for name in INSTRUCTIONS}
    return Compiled(
        kernel=kernel.metadata.name,
        registers=int(registers[1]),
        spill=int(stack[1]),
        shared=kernel.metadata.shared,
        num_warps=kernel.metadata.num_warps,
        instructions={name: count for name, count in counts.items() if count},
    )


def faults(implementation: Implementation, kernels: list[Compiled]) -> list[str]:
    """What is wrong with an implementation's kernels; empty when nothing is."""
    found = []
    for kernel in kernels:
        if kernel.shared > H200.shared_memory:
            found.append(f"{kernel.kernel}: shared memory {kernel.shared} bytes, at most {H200.shared_memory} launch")
        if kernel.spill > implementation.spill_bytes:
            found.append(f"{kernel.kernel}: {kernel.spill} bytes of stack, {implementation.spill_bytes} stated")
    present = {name for kernel in kernels for name in kernel.instructions}
    for name in implementation.instructions:
        if name not in present:
            found.append(f"instruction {name} appears in none of {[kernel.kernel for kernel in kernels]}")
    return found


def compile_implementation(op: Op, name: str) -> list[Compiled]:
    """The kernels that an implementation launches over all cases it takes, benchmark shapes included."""
    with compile_only() as kernels:
        for case in op.all_cases():
            arguments = case.build(Make("meta"))
            try:
                op(**arguments, impl=name)
            except NotSupported:
                continue
    return kernels


def main(names: list[str]) -> int:
    """Compiles the named operators (all when none is named), prints a table, returns the number of faults."""
    import triton

    catalogue = importlib.import_module("penstock.ops")
    # Kernels are compiled from scratch: a cache would hide a compiler that no longer accepts them.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        operators = [value for value in vars(catalogue).values() if isinstance(value, Op)]
        unknown = [name for name in names if name not in [operator.name for operator in operators]]
        if unknown:
            print(f"no operators named {', '.join(unknown)}; there are {', '.join(o.name for o in operators)}")
            return 2
        print(f"Triton {triton.__version__}, sm_90a")
        count = 0
        for operator in operators:
            if names and operator.name not in names:
                continue
            for name, implementation in operator.implementations.items():
                if "triton" not in implementation.needs:
                    continue
                kernels = compile_implementation(operator, name)
                found = faults(implementation, kernels) if kernels else ["no case launches a kernel"]
                count += len(found)
                for kernel in kernels:
                    values = asdict(kernel)
                    print(f"{operator.name:<24} {name:<8} " + " ".join(f"{k}={v}" for k, v in values.items()))
                for fault in found:
                    print(f"{operator.name:<24} {name:<8} FAULT {fault}")
        print(f"{count} faults")
        return min(count, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
