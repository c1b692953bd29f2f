"""FP8 codes widened on a CPU: every code, rows with gaps, NaN, and both ways to multiply."""

import pytest
import torch

from penstock.core.formats import FP8_TENSOR, FP8_TOKEN
from penstock.ops import gemm_fp8
from penstock.ops.matmul import fp8_cpu

CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_code_keeps_its_value(dtype):
    numbers = CODES[~CODES.float().isnan()]
    assert torch.equal(fp8_cpu.decoded(numbers, dtype), numbers.to(dtype))
    assert torch.equal(fp8_cpu.decoded(CODES, dtype).isnan(), CODES.float().isnan())
    gaps = numbers[:252].view(12, 21)[:, :16]
    assert torch.equal(fp8_cpu.decoded(gaps, dtype), gaps.to(dtype))
    assert fp8_cpu.decoded(CODES[:0], dtype).dtype is dtype


def test_subnormal_codes_survive_where_subnormal_numbers_are_flushed():
    try:
        torch.set_flush_denormal(True)
        assert fp8_cpu.decoded(CODES[1:8], torch.float32).tolist() == [i * 2.0**-9 for i in range(1, 8)]
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("format", [FP8_TENSOR, FP8_TOKEN], ids=lambda format: format.name)
@pytest.mark.parametrize("narrow", [True, False])
def test_both_products_are_within_a_rounding_of_bfloat16(format, narrow, monkeypatch):
    monkeypatch.setattr(fp8_cpu, "has_bf16_products", lambda: narrow)
    torch.manual_seed(0)
    x, w = (torch.randn(rows, 200).mul(100).to(torch.float8_e4m3fn) for rows in (5, 300))
    scales = [torch.rand(format.scale_shape(operand.shape)) for operand in (x, w)]
    wanted = gemm_fp8(x.double(), w.double(), *(scale.double() for scale in scales), format=format, impl="reference")
    got = gemm_fp8(x, w, *scales, format=format, impl="cpu")
    torch.testing.assert_close(got.double(), wanted, rtol=2.0**-7, atol=1e-3 * float(wanted.abs().mean()))
    exact = gemm_fp8(x, w, *scales, format=format, out_dtype=torch.float32, impl="cpu")
    torch.testing.assert_close(exact.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().mean()))
