"""layer_norm beyond the shared cases: any shape, widths, a large mean, strides, in place, torch, errors, compilation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.check import ContractError
from penstock.core.op import NotSupported
from penstock.ops import layer_norm
from penstock.testing import judge

GPU = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = pytest.mark.parametrize(("impl", "device"), [("cpu", "cpu"), ("triton", GPU)])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def right(y, x, weight, bias):
    def reference(kind):
        arguments = [None if tensor is None else kind(tensor.cpu()) for tensor in (x, weight, bias)]
        return layer_norm(*arguments, impl="reference")

    judge("y", y, reference(torch.Tensor.double), reference(lambda tensor: tensor))


@RUNS
@settings(max_examples=20, deadline=None)
@given(
    rows=st.lists(st.integers(0, 5), max_size=2),
    N=st.integers(1, 700),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    wide=st.booleans(),
    with_bias=st.booleans(),
    mean=st.sampled_from([0.0, 30.0]),
)
def test_any_shape(impl, device, rows, N, dtype, wide, with_bias, mean):
    torch.manual_seed(0)
    x = (torch.randn(*rows, N) + mean).to(device, dtype)
    weight = torch.randn(N).to(device, torch.float32 if wide else dtype)
    bias = torch.randn(N).to(device, dtype) if with_bias else None
    right(layer_norm(x, weight, bias, impl=impl), x, weight, bias)


@RUNS
@pytest.mark.parametrize("N", [1, 3, 16384, 16385, 65536])
def test_widths_around_the_chunk(impl, device, N):
    x, weight, bias = (torch.randn(*shape, device=device).bfloat16() for shape in ((2, N), (N,), (N,)))
    right(layer_norm(x, weight, bias, impl=impl), x, weight, bias)


@RUNS
@pytest.mark.parametrize("N", [96, 20000])
def test_strided_and_in_place(impl, device, N):
    x, weight, bias = torch.randn(3, 4, N + 32, device=device)[:, 1:3, :N], torch.randn(N, device=device), None
    out = torch.full((3, 2, N + 8), float("nan"), device=device)[..., :N]
    assert layer_norm(x, weight, bias, out=out, impl=impl) is out
    right(out, x, weight, bias)
    again = x.clone()
    layer_norm(again, weight, bias, out=again, impl=impl)
    right(again, x, weight, bias)


def test_rows_that_do_not_fold_are_refused_with_a_reason():
    with pytest.raises(NotSupported, match="stride 3"):
        layer_norm(torch.randn(8, 3).t(), torch.ones(8), None, impl="triton")


def test_torch_agrees():
    x, weight, bias = torch.randn(5, 256), torch.randn(256), torch.randn(256)
    theirs = torch.nn.functional.layer_norm(x, (256,), weight, bias)
    torch.testing.assert_close(layer_norm(x, weight, bias, impl="reference"), theirs)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("weight", {"weight": torch.ones(7)}),
        ("bias", {"bias": torch.ones(7)}),
        ("bias", {"bias": torch.ones(8).half()}),
        ("out", {"out": torch.ones(2, 7)}),
        ("eps", {"eps": -1.0}),
    ],
)
def test_errors_name_the_argument(name, change):
    with pytest.raises(ContractError, match=f"`{name}`"):
        layer_norm(**{"x": torch.ones(2, 8), "weight": torch.ones(8), "bias": torch.zeros(8)} | change)


def test_compiled_function_agrees():
    def function(x, weight, bias):
        return layer_norm(layer_norm(x * 2, weight, None), weight, bias) + 1

    arguments = torch.randn(3, 64), torch.randn(64), torch.randn(64)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), function(*arguments))
