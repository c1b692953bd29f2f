"""silu_and_mul_quant beyond the shared cases: it equals quantize of the float32 products, strides, refusals, compilation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.check import ContractError
from penstock.core.formats import FP8_BLOCK, FP8_TENSOR, FP8_TOKEN, INT8_CHANNEL, INT8_TOKEN
from penstock.core.op import NotSupported
from penstock.ops import quantize, silu_and_mul, silu_and_mul_quant
from penstock.testing import judge

GPU = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = pytest.mark.parametrize(("impl", "device"), [("cpu", "cpu"), ("triton", GPU)])
FORMATS = [FP8_TENSOR, FP8_TOKEN, FP8_BLOCK, INT8_TOKEN]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def agrees(result, x, format, static=None):
    want_q, want_scale = quantize(silu_and_mul(x.float(), impl="reference"), format=format, scale=static, impl="reference")
    torch.testing.assert_close(result[1].cpu(), want_scale, rtol=2e-6, atol=1e-30)
    judge("q", result[0], want_q, want_q)


@RUNS
@settings(max_examples=20, deadline=None)
@given(
    format=st.sampled_from(FORMATS),
    rows=st.lists(st.integers(0, 5), min_size=1, max_size=2),
    C=st.integers(0, 400),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    static=st.booleans(),
)
def test_it_is_quantize_of_the_float32_products(impl, device, format, rows, C, dtype, static):
    torch.manual_seed(0)
    x = torch.randn(*rows, 2 * C).mul(3).to(dtype)
    scale = torch.rand(format.scale_shape((*rows, C))) + 0.01 if static or format is FP8_TENSOR else None
    on = None if scale is None else scale.to(device)
    agrees(silu_and_mul_quant(x.to(device), format=format, scale=on, impl=impl), x, format, scale)


@RUNS
@pytest.mark.parametrize("format", FORMATS[1:])
@pytest.mark.parametrize("C", [127, 129, 8192, 8193])
def test_widths_around_block_and_chunk(impl, device, format, C):
    x = torch.randn(2, 2 * C)
    agrees(silu_and_mul_quant(x.to(device), format=format, impl=impl), x, format)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@RUNS
def test_zeros_and_far_gates(impl, device):
    x = torch.zeros(2, 256)
    x[1, :128] = torch.linspace(-1000, 1000, 128)
    x[1, 128:] = 2.0
    result = silu_and_mul_quant(x.to(device), format=FP8_TOKEN, impl=impl)
    assert result[1][0] == 1
    assert result[0].float().isfinite().all()
    agrees(result, x, FP8_TOKEN)


@RUNS
def test_strided_and_given_results(impl, device):
    x = torch.randn(3, 4, 632, device=device)[:, 1:3, :600]
    q = torch.zeros(3, 2, 320, device=device).to(torch.float8_e4m3fn)[..., :300]
    scale = torch.full((3, 2, 3), float("nan"), device=device)
    result = silu_and_mul_quant(x, format=FP8_BLOCK, out=(q, scale), impl=impl)
    assert result[0] is q
    assert result[1] is scale
    agrees(result, x.cpu(), FP8_BLOCK)


def test_what_one_pass_cannot_do_is_refused_with_a_reason():
    with pytest.raises(NotSupported, match="silu_and_mul_quant: format FP8_TENSOR without `scale`"):
        silu_and_mul_quant(torch.ones(2, 8), format=FP8_TENSOR)
    with pytest.raises(NotSupported, match="rows of a weight"):
        silu_and_mul_quant(torch.ones(2, 8), format=INT8_CHANNEL)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", {"x": torch.ones(2, 7)}),
        ("format", {"format": None}),
        ("scale", {"scale": torch.ones(1)}),
        ("out", {"out": (torch.ones(2, 8).to(torch.float8_e4m3fn), None)}),
        ("out_scale", {"out": (None, torch.ones(2)), "scale": torch.ones(2)}),
    ],
)
def test_errors_name_the_argument(name, change):
    with pytest.raises(ContractError, match=f"`{name}`"):
        silu_and_mul_quant(**{"x": torch.ones(2, 8), "format": FP8_TOKEN} | change)


def test_compiled_function_agrees():
    def function(x):
        q, scale = silu_and_mul_quant(x * 2, format=FP8_BLOCK)
        return q.float() + 1, scale * 2

    x = torch.randn(3, 512)
    for got, want in zip(torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x), strict=True):
        assert torch.equal(got, want)
