"""Dense products beyond the shared cases: exact integers, parts of K and their counters, split weights, errors, compilation."""

import pytest
import torch

from penstock.core.check import ContractError
from penstock.core.formats import FP8_BLOCK, FP8_TENSOR, FP8_TOKEN
from penstock.ops import gemm_bf16_fp32, gemm_counters, gemm_fp8, gemm_int8, quantize, split_fp32
from penstock.ops.matmul.tensor_core import cut_off

GPU = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = pytest.mark.parametrize(("impl", "device"), [("reference", "cpu"), ("cpu", "cpu"), ("triton", GPU)])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@RUNS
def test_integer_sums_are_exact(impl, device):
    x = torch.randint(-128, 128, (17, 1000), dtype=torch.int8, device=device)
    w = torch.randint(-128, 128, (40, 1000), dtype=torch.int8, device=device)
    x[0], w[0], w[1] = -128, -128, 127
    one = torch.ones(40, device=device)
    got = gemm_int8(x, w, one[:17].contiguous(), one, out_dtype=torch.float32, impl=impl)
    wanted = (x.cpu().long() @ w.cpu().long().t()).float()
    assert torch.equal(got.cpu(), wanted)


@RUNS
def test_counters_serve_call_after_call(impl, device):
    x8, x_scale = quantize(torch.randn(3, 2048, device=device), format=FP8_TENSOR)
    w8, w_scale = quantize(torch.randn(64, 2048, device=device), format=FP8_TENSOR)
    counters = gemm_counters(device)
    wanted = gemm_fp8(x8, w8, x_scale, w_scale, format=FP8_TENSOR, impl=impl)
    for _ in range(2):
        assert torch.equal(gemm_fp8(x8, w8, x_scale, w_scale, format=FP8_TENSOR, counters=counters, impl=impl), wanted)
        assert not counters.any()


@RUNS
@pytest.mark.parametrize("format", [FP8_TENSOR, FP8_TOKEN, FP8_BLOCK], ids=lambda format: format.name)
def test_quantised_operands_give_nearly_the_product(impl, device, format):
    x, w = torch.randn(5, 256, device=device), torch.randn(40, 256, device=device)
    x8, x_scale = quantize(x, format=format)
    w8, w_scale = quantize(w, format=format, weight=format is FP8_BLOCK)
    got = gemm_fp8(x8, w8, x_scale, w_scale, format=format, impl=impl).float()
    assert (got - x @ w.t()).norm() < 0.06 * (x @ w.t()).norm()


def test_split_weights_have_sixteen_bits():
    w = torch.randn(1000) * torch.logspace(-20, 20, 1000)
    w_hi, w_lo = split_fp32(w)
    error = (w_hi.double() + w_lo.double() / 256 - w.double()).abs() / w.double().abs()
    assert error.max() <= 2**-17
    assert split_fp32(torch.tensor([torch.inf, 0.0]))[1].tolist() == [0, 0]
    with pytest.raises(ValueError, match="`w` must be float32, got float16"):
        split_fp32(w.half())


@RUNS
def test_a_router_keeps_what_bfloat16_weights_lose(impl, device):
    x, w = torch.randn(4, 512, device=device).bfloat16(), torch.randn(16, 512, device=device)
    wanted = x.double() @ w.double().t()
    got = gemm_bf16_fp32(x, *split_fp32(w), impl=impl).double()
    rounded = x.double() @ w.bfloat16().double().t()
    assert (got - wanted).norm() < 0.01 * (rounded - wanted).norm()


def test_the_accumulator_cuts_off_what_it_has_no_bits_for():
    x = torch.tensor([[1.0, 2.0**-13, 2.0**-14, -(2.0**-14)]])
    assert cut_off(x, torch.ones(1, 4), depth=1, bits=13).item() == 1 + 2.0**-13 - 2.0**-13
    assert cut_off(x, torch.ones(1, 4), depth=4, bits=13).item() == 1 + 2.0**-13
    assert cut_off(x, torch.ones(1, 4), depth=1, bits=23).item() == 1 + 2.0**-13


def operands(**change):
    codes = torch.zeros(2, 256).to(torch.float8_e4m3fn)
    arguments = {"x": codes, "w": codes, "x_scale": torch.ones(1), "w_scale": torch.ones(1), "format": FP8_TENSOR}
    return arguments | change


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", {"x": torch.zeros(2, 256)}),
        ("w", {"w": torch.zeros(2, 128).to(torch.float8_e4m3fn)}),
        ("x_scale", {"format": FP8_TOKEN}),
        ("w_scale", {"format": FP8_BLOCK, "x_scale": torch.ones(2, 2)}),
        ("w_scale", {"w_scale": torch.ones(1).half()}),
        ("bias", {"bias": torch.ones(3)}),
        ("counters", {"counters": torch.zeros(4, dtype=torch.int32)}),
        ("format", {"format": None}),
    ],
)
def test_errors_name_the_argument(name, change):
    with pytest.raises(ContractError, match=f"`{name}`"):
        gemm_fp8(**operands(**change))


def test_integer_products_refuse_what_may_overflow():
    x = torch.zeros(1, 131073, dtype=torch.int8)
    with pytest.raises(ContractError, match="`x` must have K of at most 131072"):
        gemm_int8(x, x, torch.ones(1), torch.ones(1))
    with pytest.raises(ContractError, match="`format`"):
        gemm_int8(x[:, :8], x[:, :8], torch.ones(1), torch.ones(1), format=FP8_TENSOR)


def test_compiled_functions_agree():
    def function(x, w):
        x8, x_scale = quantize(x, format=FP8_TENSOR)
        w8, w_scale = quantize(w, format=FP8_TENSOR)
        routed = gemm_bf16_fp32(x.bfloat16(), *split_fp32(w))
        return gemm_fp8(x8, w8, x_scale, w_scale, format=FP8_TENSOR) + 1, routed

    x, w = torch.randn(3, 64), torch.randn(8, 64)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(x, w)
    assert all(torch.equal(a, b) for a, b in zip(compiled, function(x, w), strict=True))
