"""quantize and dequantize beyond the shared cases: every bit, awkward values, extreme scales, strides, errors, compilation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.check import ContractError
from penstock.core.formats import FORMATS, FP8_BLOCK, FP8_TENSOR, FP8_TOKEN, INT8_CHANNEL, INT8_TOKEN
from penstock.core.op import NotSupported
from penstock.ops import dequantize, quantize

GPU = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = pytest.mark.parametrize(("impl", "device"), [("cpu", "cpu"), ("triton", GPU)])
EVERY = list(FORMATS.values())
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def same_bits(got, want):
    """Equal in every byte; NaN may have either sign."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    got, want = got.cpu(), want.cpu()
    lost = want.float().isnan()
    assert torch.equal(got.float().isnan(), lost)
    left, right = (torch.where(lost, 0.0, values.float()) for values in (got, want))
    assert torch.equal(left, right)
    assert torch.equal(left.signbit(), right.signbit())


def divided(x, scale, format):
    """The codes by float64 division, whose quotient rounds to float32 as the exact one does."""
    quotient = (x.double() / scale.double()).float().clamp(-format.largest, format.largest)
    return quotient.to(format.dtype) if format.dtype is not torch.int8 else quotient.nan_to_num(nan=0.0).round().to(torch.int8)


@RUNS
@settings(max_examples=40, deadline=None)
@given(
    format=st.sampled_from(EVERY),
    rows=st.lists(st.integers(0, 5), min_size=1, max_size=2),
    K=st.integers(0, 400),
    dtype=st.sampled_from(DTYPES),
    static=st.booleans(),
    weight=st.booleans(),
    exponent=st.integers(-12, 4),
    seed=st.integers(0, 1000),
)
def test_every_bit(impl, device, format, rows, K, dtype, static, weight, exponent, seed):
    torch.manual_seed(seed)
    weight = weight and format is FP8_BLOCK and len(rows) > 0
    x = (torch.randn(*rows, K) * 10.0**exponent).to(dtype)
    x[torch.rand(x.shape) < 0.1] = 0
    scale = torch.rand(format.scale_shape(x.shape, weight)) * 10.0**exponent + 1e-6 if static else None
    q, s = quantize(x, format=format, scale=scale, weight=weight, impl="reference")
    on = x.to(device), None if scale is None else scale.to(device)
    got_q, got_s = quantize(on[0], format=format, scale=on[1], weight=weight, impl=impl)
    same_bits(got_s, s)
    same_bits(got_q, q)
    if K:
        same_bits(q, divided(x, format.spread(s, x.shape, weight), format))
    for result in DTYPES:
        want = dequantize(q, s, format=format, dtype=result, weight=weight, impl="reference")
        same_bits(dequantize(got_q, got_s, format=format, dtype=result, weight=weight, impl=impl), want)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@RUNS
@pytest.mark.parametrize("format", [FP8_TENSOR, INT8_TOKEN])
@pytest.mark.parametrize("number", [1.0, 0.37, 2.5e-3, 2.0**-126, 3e-45, 1e-30, 7e30, 3e38])
def test_every_bfloat16_over_awkward_scales(impl, device, format, number):
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(64, 1024)
    scale = torch.full(format.scale_shape(every.shape), number)
    q, _ = quantize(every.to(device), format=format, scale=scale.to(device), impl=impl)
    same_bits(q, divided(every, scale.view(-1, 1), format))
    same_bits(quantize(every, format=format, scale=scale, impl="reference")[0], q)


@RUNS
def test_ties_round_to_even(impl, device):
    codes = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = ((codes[1:] + codes[:-1]) / 2)[None].to(device)
    for number in (1.0, 3.0, 0.7):
        scale = torch.tensor([number], device=device)
        q, _ = quantize(middles * number, format=FP8_TENSOR, scale=scale, impl=impl)
        same_bits(q, divided(middles.cpu() * number, scale.cpu(), FP8_TENSOR))
    q, _ = quantize(middles, format=FP8_TENSOR, scale=torch.ones(1, device=device), impl=impl)
    assert (q.cpu().view(torch.uint8) % 2 == 0).all()
    halves = torch.arange(-130, 130, device=device)[None] + 0.5
    q, _ = quantize(halves, format=INT8_TOKEN, scale=torch.ones(1, device=device), impl=impl)
    assert torch.equal(q.cpu(), halves.cpu().round().clamp(-127, 127).to(torch.int8))


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@RUNS
@pytest.mark.parametrize("format", EVERY)
def test_nan_infinity_zero_and_the_smallest_number(impl, device, format):
    x = torch.randn(6, 256)
    x[0] = 0
    x[1, 3] = float("nan")
    x[2, 3], x[2, 4] = float("inf"), -float("inf")
    x[3] = float("nan")
    x[4] = 1e-45
    x[5] = -0.0
    q, scale = quantize(x.to(device), format=format, impl=impl)
    assert scale.isfinite().all()
    assert (scale > 0).all()
    want_q, want_scale = quantize(x, format=format, impl="reference")
    same_bits(scale, want_scale)
    same_bits(q, want_q)
    values = q.cpu().float()
    assert values[2, 3] == format.largest
    assert values[2, 4] == -format.largest
    if format.dtype is torch.int8:
        assert values[1, 3] == 0
    else:
        assert values[1, 3].isnan()
        assert values[5].signbit().all()
    if format is FP8_TOKEN:
        assert scale[[0, 3, 5]].tolist() == [1, 1, 1]


@RUNS
@pytest.mark.parametrize("format", EVERY)
def test_strided_input_and_results(impl, device, format):
    x = torch.randn(3, 4, 400, device=device)[:, 1:3, :300]
    q = torch.zeros(3, 2, 320, device=device).to(format.dtype)[..., :300]
    scale = torch.full(format.scale_shape(x.shape), float("nan"), device=device)
    returned = quantize(x, format=format, out=(q, scale), impl=impl)
    assert returned[0] is q
    assert returned[1] is scale
    want_q, want_scale = quantize(x.cpu().contiguous(), format=format, impl="reference")
    same_bits(q, want_q)
    same_bits(scale, want_scale)
    back = torch.empty(3, 2, 320, device=device)[..., :300]
    assert dequantize(q, scale, format=format, out=back, impl=impl) is back
    same_bits(back, dequantize(want_q, want_scale, format=format, dtype=torch.float32, impl="reference"))


@pytest.mark.parametrize("format", EVERY)
def test_the_error_is_half_a_step(format):
    x = torch.randn(64, 256)
    q, scale = quantize(x, format=format)
    error = (dequantize(q, scale, format=format, dtype=torch.float32) - x).abs()
    spread = format.spread(scale, x.shape).expand_as(x)
    step = spread if format.dtype is torch.int8 else torch.maximum(x.abs() / 8, spread * 2**-9)
    assert (error <= step * 0.5001).all()
    assert q.float().abs().amax() == format.largest


def test_one_square_of_a_weight_has_one_scale():
    x = torch.randn(2, 130, 260)
    _, scale = quantize(x, format=FP8_BLOCK, weight=True)
    assert scale.shape == (2, 2, 3)
    assert scale[1, 0, 1] == x[1, :128, 128:256].abs().max() / 448
    assert scale[1, 1, 2] == x[1, 128:, 256:].abs().max() / 448


def test_a_static_scale_is_returned():
    scale = torch.tensor([0.5])
    assert quantize(torch.ones(2, 8), format=FP8_TENSOR, scale=scale)[1] is scale


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", {"x": torch.ones(2, 8, dtype=torch.float64)}),
        ("format", {"format": "FP4"}),
        ("scale", {"scale": torch.ones(3)}),
        ("scale", {"scale": torch.ones(2).half()}),
        ("scale", {"scale": 0.5}),
        ("weight", {"weight": True}),
        ("out", {"out": (torch.ones(2, 8, dtype=torch.int8), None)}),
        ("out", {"out": (torch.ones(2, 7).to(torch.float8_e4m3fn), None)}),
        ("out_scale", {"out": (None, torch.ones(3))}),
        ("out_scale", {"out": (None, torch.ones(2)), "scale": torch.ones(2)}),
    ],
)
def test_errors_name_the_argument(name, change):
    with pytest.raises(ContractError, match=f"`{name}`"):
        quantize(**{"x": torch.ones(2, 8), "format": FP8_TOKEN} | change)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", {"q": torch.ones(2, 8)}),
        ("q", {"format": FP8_TOKEN}),
        ("scale", {"scale": torch.ones(2, 1)}),
        ("weight", {"weight": True}),
        ("out", {"dtype": torch.float64}),
    ],
)
def test_dequantize_errors_name_the_argument(name, change):
    with pytest.raises(ContractError, match=f"`{name}`"):
        dequantize(**{"q": torch.ones(2, 8, dtype=torch.int8), "scale": torch.ones(2), "format": INT8_CHANNEL} | change)


def test_what_the_kernel_cannot_walk_is_refused_with_a_reason():
    x = torch.ones(4, 256)
    with pytest.raises(NotSupported, match="`scale` has strides"):
        quantize(x, format=FP8_BLOCK, scale=torch.ones(2, 4).t(), impl="triton")
    with pytest.raises(NotSupported, match="stride 256"):
        quantize(x.t(), format=FP8_TOKEN, impl="triton")
    assert quantize(x.t(), format=FP8_TOKEN)[1].shape == (256,)


@pytest.mark.parametrize("format", [FP8_TENSOR, FP8_BLOCK, INT8_TOKEN])
def test_compiled_function_agrees(format):
    def function(x):
        q, scale = quantize(x * 2, format=format)
        again, _ = quantize(x, format=format, scale=scale)
        return q.float(), again.float(), dequantize(q, scale, format=format, dtype=torch.float32) + 1

    x = torch.randn(3, 256)
    for got, want in zip(torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x), strict=True):
        assert torch.equal(got, want)
