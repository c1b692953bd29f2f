"""The compile gate: every kernel compiles for sm_90a within its limits, on this Triton and on the newest; plants are found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from penstock import ops as catalogue
from penstock.core.op import Implementation, Op
from penstock.testing.gate import Compiled, faults

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent.parent
NEWEST = os.environ.get("PENSTOCK_NEWEST_TRITON", "")


def run(*arguments, newest=False):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([NEWEST, str(ROOT)] if newest else [str(ROOT)])
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def groups():
    """Operators by room, those of attention one by one: parts of the gate that several test workers take among them."""
    rooms = {}
    for value in vars(catalogue).values():
        if isinstance(value, Op) and any("triton" in each.needs for each in value.implementations.values()):
            room = value.module.split(".")[2]
            rooms.setdefault(value.name if room == "attention" else room, []).append(value.name)
    return rooms


GROUPS = groups()


@pytest.mark.parametrize("group", GROUPS)
def test_every_kernel_compiles(group):
    result = run("-m", "penstock.testing.gate", *GROUPS[group])
    assert result.returncode == 0, found(result)
    assert result.stdout.splitlines()[-1] == "0 faults"


def found(result):
    """The faults, or how it broke off."""
    return "\n".join(line for line in result.stdout.splitlines() if "FAULT" in line) or result.stderr[-4000:]


@pytest.mark.skipif(not NEWEST, reason="PENSTOCK_NEWEST_TRITON names no folder with the newest Triton (make test sets it)")
@pytest.mark.parametrize("group", GROUPS)
def test_every_kernel_compiles_with_the_newest_triton(group):
    result = run("-m", "penstock.testing.gate", *GROUPS[group], newest=True)
    assert result.returncode == 0, found(result)
    assert f"Triton {version_in(NEWEST)}" in result.stdout.splitlines()[0]


def version_in(folder):
    program = "import triton; print(triton.__version__)"
    environment = {**os.environ, "PYTHONPATH": folder}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment).stdout.strip()


PLANTED = """
import sys
import torch, triton, triton.language as tl
from penstock.core.op import Implementation
from penstock.testing.gate import compile_only, faults

@triton.jit
def copy_all(out_ptr, x_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, at < n)
    y = tl.load(x_ptr + at + n, at < n)
    tl.debug_barrier()
    tl.store(out_ptr + at, tl.sqrt(x) + y, at < n)
    tl.store(out_ptr + at + n, tl.sum(x) * y + x, at < n)

@triton.jit
def matmul(out_ptr, a_ptr, b_ptr, K, stride, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr):
    m = tl.arange(0, M)[:, None]
    n = tl.arange(0, N)[None, :]
    acc = tl.zeros((M, N), tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        acc = tl.dot(tl.load(a_ptr + m * stride + k[None, :]), tl.load(b_ptr + k[:, None] * stride + n), acc)
    tl.store(out_ptr + m * stride + n, acc)

def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")

kind = sys.argv[1]
wants = ("HGMMA",) if kind == "instruction" else ()
with compile_only() as kernels:
    if kind == "shared":
        a = b = empty(8, dtype=torch.bfloat16)
        matmul[(1,)](empty(8), a, b, 4096, 4096, M=128, N=256, BK=128, num_stages=4, num_warps=8)
    elif kind == "spill":
        copy_all[(1,)](empty(8), empty(8), 8, BLOCK=8192, num_warps=4, maxnreg=32)
    else:
        copy_all[(1,)](empty(8), empty(8), 8, BLOCK=1024, num_warps=4)
for fault in faults(Implementation("planted", copy_all, ("triton",), None, wants, 0), kernels):
    print(fault)
"""


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("clean", ""),
        ("spill", "bytes of stack, 0 stated"),
        ("shared", "at most 232448 launch"),
        ("instruction", "HGMMA appears in none"),
    ],
)
def test_planted_faults_are_found(kind, fault, tmp_path):
    program = tmp_path / "planted.py"
    program.write_text(PLANTED)
    result = run(str(program), kind)
    assert result.returncode == 0, result.stderr
    assert fault in result.stdout and bool(result.stdout.strip()) == bool(fault), result.stdout


def test_an_unknown_operator_is_named():
    result = run("-m", "penstock.testing.gate", "rms_nrom")
    assert result.returncode == 2
    assert "no operators named rms_nrom; there are " in result.stdout
    assert "rms_norm" in result.stdout


def test_a_stated_spill_is_accepted():
    kernel = Compiled("kernel", registers=255, spill=16, shared=1024, num_warps=8, instructions={"HGMMA": 4})
    stated = Implementation("stated", print, ("triton",), None, ("HGMMA",), 16)
    assert faults(stated, [kernel]) == []
    assert faults(Implementation("strict", print, ("triton",), None, ("HGMMA",), 8), [kernel]) == [
        "kernel: 16 bytes of stack, 8 stated"
    ]
