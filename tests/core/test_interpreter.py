"""The interpreter's repair: right with it, wrong without it, bit for bit against torch."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run on the GPU here")

TL = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e5m2: tl.float8e5,
}


@pytest.fixture(autouse=True, scope="module")
def repaired():
    from penstock.core import interpreter

    interpreter.repair()


@triton.jit
def _cast(out_ptr, x_ptr, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(out_ptr.dtype.element_ty))


@triton.jit
def _arithmetic(out_ptr, x_ptr, y_ptr, n: tl.constexpr):
    at = tl.arange(0, n)
    x = tl.load(x_ptr + at)
    y = tl.load(y_ptr + at)
    tl.store(out_ptr + at, x * y + x - y)
    tl.store(out_ptr + n + at, tl.where(x > y, -x, tl.maximum(x, y)))


@triton.jit
def _dot(out_ptr, a_ptr, b_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m = tl.arange(0, M)
    n = tl.arange(0, N)
    k = tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    tl.store(out_ptr + m[:, None] * N + n[None, :], tl.dot(a, b))


@triton.jit
def _loop(out_ptr, count_ptr):
    total = 0
    for i in range(tl.load(count_ptr)):
        total += i
    tl.store(out_ptr, total)


def draw(n=4096, scale=100.0):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, generator=generator) * scale


def bits(x):
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_float32_rounds_to_nearest_even_and_fp8_saturates(target):
    x = draw()
    out = torch.empty(4096, dtype=target)
    _cast[(1,)](out, x, 4096)
    limit = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}.get(target, float("inf"))
    assert torch.equal(bits(out), bits(x.clamp(-limit, limit).to(target)))


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_widening_is_exact(source):
    x = draw(scale=1.0).to(source)
    out = torch.empty(4096)
    _cast[(1,)](out, x, 4096)
    assert torch.equal(out, x.float())


def test_int_to_bfloat16():
    x = torch.arange(4096, dtype=torch.int32)
    out = torch.empty(4096, dtype=torch.bfloat16)
    _cast[(1,)](out, x, 4096)
    assert torch.equal(out, x.to(torch.bfloat16))


def test_bfloat16_arithmetic_and_comparison():
    x, y = draw().bfloat16(), draw().flip(0).bfloat16()
    out = torch.empty(2 * 4096, dtype=torch.bfloat16)
    _arithmetic[(1,)](out, x, y, 4096)
    assert torch.equal(out[:4096], x * y + x - y)
    assert torch.equal(out[4096:], torch.where(x > y, -x, torch.maximum(x, y)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_dot(dtype):
    a, b = draw(16 * 64, 1.0).to(dtype).view(16, 64), draw(64 * 32, 1.0).to(dtype).view(64, 32)
    out = torch.empty(16, 32)
    _dot[(1,)](out, a, b, 16, 32, 64)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_integer_dot_is_exact():
    a = torch.randint(-128, 128, (16, 64), dtype=torch.int8)
    b = torch.randint(-128, 128, (64, 32), dtype=torch.int8)
    out = torch.empty(16, 32, dtype=torch.int32)
    _dot[(1,)](out, a, b, 16, 32, 64)
    assert torch.equal(out, a.int() @ b.int())


@triton.jit
def _fused(out_ptr, x_ptr, y_ptr, n: tl.constexpr):
    at = tl.arange(0, n)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    product = x * y
    tl.store(out_ptr + at, tl.fma(x, y, -product))


def test_a_fused_multiply_add_rounds_once():
    x, y = draw(), draw().flip(0)
    out = torch.empty(4096)
    _fused[(1,)](out, x, y, 4096)
    rest = x.double() * y.double() - (x * y).double()
    assert rest.any()
    assert torch.equal(out, rest.float())


def test_range_over_a_loaded_value():
    out = torch.zeros(1, dtype=torch.int32)
    _loop[(1,)](out, torch.tensor([5], dtype=torch.int32))
    assert out.item() == 10


WITHOUT = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_interpreter as t
checks = {
    "cast": lambda: t.test_float32_rounds_to_nearest_even_and_fp8_saturates(torch.bfloat16),
    "fp8": lambda: t.test_float32_rounds_to_nearest_even_and_fp8_saturates(torch.float8_e4m3fn),
    "arithmetic": t.test_bfloat16_arithmetic_and_comparison,
    "dot": lambda: t.test_dot(torch.bfloat16),
    "fused": t.test_a_fused_multiply_add_rounds_once,
    "range": t.test_range_over_a_loaded_value,
}
for name, check in checks.items():
    try:
        check()
    except Exception as failure:
        print(name, "fails:", type(failure).__name__)
    else:
        print(name, "passes")
"""


def test_without_the_repair_the_same_checks_fail():
    here = os.path.dirname(__file__)
    result = subprocess.run([sys.executable, "-c", WITHOUT, here], capture_output=True, text=True)
    lines = result.stdout.splitlines()
    numpy_24 = tuple(int(part) for part in np.__version__.split(".")[:2]) >= (2, 4)
    wanted = ["cast", "fp8", "arithmetic", "dot", "fused"] + (["range"] if numpy_24 and triton.__version__ < "3.7" else [])
    assert [line.split()[0] for line in lines if "fails" in line] == wanted, result.stdout + result.stderr
