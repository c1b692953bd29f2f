"""rms_norm_quant beyond the shared cases: it equals quantize of the float32 norm, strides, refusals, errors, compilation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.check import ContractError
from penstock.core.formats import FP8_BLOCK, FP8_TENSOR, FP8_TOKEN, INT8_CHANNEL, INT8_TOKEN
from penstock.core.op import NotSupported
from penstock.ops import dequantize, quantize, rms_norm, rms_norm_quant
from penstock.ops.norm.rms_norm_quant_triton import configure
from penstock.testing import judge

GPU = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = pytest.mark.parametrize(("impl", "device"), [("cpu", "cpu"), ("triton", GPU)])
FORMATS = [FP8_TENSOR, FP8_TOKEN, FP8_BLOCK, INT8_TOKEN]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def agrees(result, y, format, static):
    """The codes are those of quantize on the same float32 values, but for ties; the error is half a step."""
    q, scale = (values.cpu() for values in result[:2])
    want_q, want_scale = quantize(y, format=format, scale=static, impl="reference")
    torch.testing.assert_close(scale, want_scale, rtol=2e-6, atol=0)
    judge("q", q, want_q, want_q)
    spread = format.spread(scale, y.shape).expand_as(y)
    error = (dequantize(q, scale, format=format, dtype=torch.float32) - y).abs()
    step = spread if format is INT8_TOKEN else torch.maximum(y.abs() / 8, spread * 2**-9)
    inside = y.abs() <= spread * format.largest
    assert (error <= step * 0.5001)[inside].all()


@RUNS
@settings(max_examples=20, deadline=None)
@given(
    format=st.sampled_from(FORMATS),
    rows=st.lists(st.integers(0, 5), min_size=1, max_size=2),
    N=st.integers(1, 700),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    with_residual=st.booleans(),
    static=st.booleans(),
    offset=st.sampled_from([0.0, 1.0]),
)
def test_it_is_quantize_of_the_float32_norm(impl, device, format, rows, N, dtype, with_residual, static, offset):
    torch.manual_seed(0)
    x, residual, weight = torch.randn(*rows, N).to(dtype), torch.randn(*rows, N).to(dtype), torch.randn(N)
    total = (x.float() + residual.float()).to(dtype) if with_residual else x
    y = rms_norm(total.float(), weight, eps=1e-5, weight_offset=offset, impl="reference")
    static = static or format is FP8_TENSOR
    scale = torch.rand(format.scale_shape(x.shape)) * 0.01 + 0.005 if static else None
    result = rms_norm_quant(
        x.to(device),
        weight.to(device),
        format=format,
        residual=residual.to(device) if with_residual else None,
        scale=None if scale is None else scale.to(device),
        eps=1e-5,
        weight_offset=offset,
        impl=impl,
    )
    assert len(result) == 2 + with_residual
    agrees(result, y, format, scale)
    if with_residual:
        assert torch.equal(result[2].cpu(), total)


@RUNS
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("N", [1, 127, 129, 16384, 16385, 65536])
def test_widths_around_block_and_chunk(impl, device, format, N):
    x, weight = torch.randn(2, N), torch.randn(N)
    scale = torch.tensor([0.01]) if format is FP8_TENSOR else None
    on = None if scale is None else scale.to(device)
    result = rms_norm_quant(x.to(device), weight.to(device), format=format, scale=on, impl=impl)
    agrees(result, rms_norm(x, weight, impl="reference"), format, scale)


@RUNS
@pytest.mark.parametrize("format", FORMATS[1:])
def test_rows_of_zeros_have_scale_one(impl, device, format):
    x = torch.zeros(3, 256, device=device)
    q, scale = rms_norm_quant(x, torch.ones(256, device=device), format=format, impl=impl)
    assert (scale == 1).all()
    assert (q.float() == 0).all()


@RUNS
@pytest.mark.parametrize("N", [96, 20000])
def test_strided_and_given_results(impl, device, N):
    buffer = torch.randn(3, 4, N + 32, device=device)
    x, residual, weight = buffer[:, 1:3, :N], torch.randn(3, 2, N, device=device), torch.randn(N, device=device)
    total = (x + residual).cpu()
    q = torch.zeros(3, 2, N + 8, device=device).to(torch.float8_e4m3fn)[..., :N]
    scale = torch.full((3, 2), float("nan"), device=device)
    result = rms_norm_quant(x, weight, format=FP8_TOKEN, residual=residual, out=(q, scale, residual), impl=impl)
    assert [a is b for a, b in zip(result, (q, scale, residual), strict=True)] == [True] * 3
    assert torch.equal(residual.cpu(), total)
    agrees(result, rms_norm(total, weight.cpu(), impl="reference"), FP8_TOKEN, None)


def test_a_program_holds_at_most_sixteen_values_a_thread():
    for N in (1, 7, 128, 300, 4096, 7168, 16384, 16385, 65536):
        for format in FORMATS:
            config = configure(N, format)
            assert config.rows * config.block <= 16 * 32 * config.num_warps
            assert config.num_warps <= 32


def test_what_one_pass_cannot_do_is_refused_with_a_reason():
    x, weight = torch.ones(2, 8), torch.ones(8)
    with pytest.raises(NotSupported, match="rms_norm_quant: format FP8_TENSOR without `scale`"):
        rms_norm_quant(x, weight, format=FP8_TENSOR)
    with pytest.raises(NotSupported, match="rows of a weight"):
        rms_norm_quant(x, weight, format=INT8_CHANNEL)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("weight", {"weight": torch.ones(7)}),
        ("residual", {"residual": torch.ones(3, 8)}),
        ("format", {"format": "FP8"}),
        ("eps", {"eps": 0.0}),
        ("scale", {"scale": torch.ones(1)}),
        ("out", {"out": (torch.ones(2, 8, dtype=torch.int8), None)}),
        ("out_scale", {"out": (None, torch.ones(1))}),
        ("out_residual", {"out": (None, None, torch.ones(2, 8))}),
    ],
)
def test_errors_name_the_argument(name, change):
    with pytest.raises(ContractError, match=f"`{name}`"):
        rms_norm_quant(**{"x": torch.ones(2, 8), "weight": torch.ones(8), "format": FP8_TOKEN} | change)


@pytest.mark.parametrize("format", [FP8_TOKEN, FP8_BLOCK])
def test_compiled_function_agrees(format):
    def function(x, residual, weight):
        q, scale, total = rms_norm_quant(x * 2, weight, format=format, residual=residual)
        again, _ = rms_norm_quant(total, weight, format=format, scale=scale)
        return q.float(), scale + 1, total, again.float()

    arguments = torch.randn(3, 256), torch.randn(3, 256), torch.randn(256)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*arguments), function(*arguments), strict=True):
        assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan"), 1e38])
@pytest.mark.parametrize("N", [300, 20001])
def test_bad_values_give_what_the_reference_gives(N, bad):
    x = torch.randn(3, N, device=GPU)
    x[1, 17] = bad
    weight = torch.randn(N, device=GPU)
    weight[5] = 0.0
    got = rms_norm_quant(x, weight, format=FP8_TOKEN, impl="triton")
    wanted = rms_norm_quant(x, weight, format=FP8_TOKEN, impl="reference")
    assert torch.equal(got[0].float().isnan(), wanted[0].float().isnan())
    torch.testing.assert_close(got[1], wanted[1], equal_nan=True)
    torch.testing.assert_close(got[0].float().nan_to_num(), wanted[0].float().nan_to_num(), rtol=0.13, atol=0.002)
