"""Arithmetic of the floor, and ceilings of this machine that cannot be wrong by orders of magnitude."""

import pytest
import torch

from penstock.bench.roofline import Ceilings, bound_by, floor_us, measure_ceilings
from penstock.core.cases import Cost

H200 = Ceilings(4.3e12, {"bf16": 790e12, "fp8": 1580e12})


def test_floor_is_the_larger_of_bytes_and_operations():
    assert floor_us(Cost(bytes=43 * 10**9), H200) == pytest.approx(10_000)
    square = Cost(bytes=3 * 2 * 8192**2, flops=2 * 8192**3)
    assert floor_us(square, H200) == pytest.approx(1391.8, abs=0.1)
    assert bound_by(square, H200) == "compute"
    fp8 = Cost(bytes=2 * 8192**2, flops=2 * 8192**3, rate="fp8")
    assert floor_us(fp8, H200) == pytest.approx(floor_us(square, H200) / 2)
    decode = Cost(bytes=16 * 2**20, flops=10**9)
    assert bound_by(decode, H200) == "memory"
    assert floor_us(decode, H200) == pytest.approx(3.902, abs=1e-3)


def test_a_missing_rate_is_stood_in_for_or_named():
    cpu = Ceilings(10e9, {"float32": 1e11})
    assert cpu.rate("int8") == cpu.rate("fp8") == cpu.rate("bf16") == 1e11
    with pytest.raises(ValueError, match="no matmul rate was measured for fp8; measured are none"):
        Ceilings(1e9, {}).rate("fp8")
    with pytest.raises(ValueError, match="rate must be one of int8, fp8, bf16, got 'int4'"):
        cpu.rate("int4")


def test_ceilings_of_this_machine():
    ceilings = measure_ceilings(torch.device("cpu"), quick=True, budget=0.05)
    assert 1e8 < ceilings.copy < 1e13
    for name in ("float32", "bf16", "int8"):
        assert 1e8 < ceilings.matmul[name] < 1e15
    assert "FP8" in ceilings.notes["fp8"]
