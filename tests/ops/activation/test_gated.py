"""silu_and_mul and gelu_and_mul beyond the shared cases: shapes, strides, extremes, errors, compilation, torch's own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.check import ContractError
from penstock.core.op import NotSupported
from penstock.ops import gelu_and_mul, silu_and_mul
from penstock.testing import judge

GPU = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = pytest.mark.parametrize(("impl", "device"), [("cpu", "cpu"), ("triton", GPU)])
KINDS = ["silu", "tanh", "none"]
interpreted = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def call(kind, x, **options):
    return silu_and_mul(x, **options) if kind == "silu" else gelu_and_mul(x, approximate=kind, **options)


def check(kind, got, x):
    x = x.cpu()
    judge(kind, got, call(kind, x.double(), impl="reference"), call(kind, x, impl="reference"))


@interpreted
@RUNS
@settings(max_examples=20, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.lists(st.integers(0, 5), max_size=3),
    C=st.integers(0, 300),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_any_shape(impl, device, kind, rows, C, dtype):
    x = torch.randn(*rows, 2 * C).mul(3).to(device, dtype)
    got = call(kind, x, impl=impl)
    assert got.shape == (*rows, C)
    check(kind, got, x)


@RUNS
@pytest.mark.parametrize("kind", KINDS)
def test_strided_input_and_result_inside_the_input(impl, device, kind):
    x = torch.randn(3, 5, 100, device=device)[:, 1:4, :80]
    want = call(kind, x, impl=impl)
    check(kind, want, x)
    for half in (slice(0, 40), slice(40, 80)):
        copy = torch.randn(3, 5, 100, device=device)[:, 1:4, :80]
        copy.copy_(x)
        out = copy[..., half]
        assert call(kind, copy, out=out, impl=impl) is out
        assert torch.equal(out, want)


@interpreted
@RUNS
@pytest.mark.parametrize("kind", KINDS)
def test_large_gates_saturate_without_nan(impl, device, kind):
    gate = torch.tensor([-3e38, -1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4], device=device)
    x = torch.cat((gate, torch.ones(8, device=device)))
    got = call(kind, x, impl=impl)
    assert torch.equal(got[-4:].cpu(), torch.tensor([0.0, 20.0, 100.0, 1e4]))
    assert bool((got[:4].abs() < 1e-6).all())


def test_errors_name_the_argument():
    with pytest.raises(ContractError, match="`x`"):
        silu_and_mul(torch.ones(2, 7))
    with pytest.raises(ContractError, match="`out`"):
        silu_and_mul(torch.ones(2, 8), out=torch.ones(2, 8))
    with pytest.raises(ContractError, match="`approximate`"):
        gelu_and_mul(torch.ones(2, 8), approximate="erf")
    with pytest.raises(NotSupported, match="stride 2"):
        silu_and_mul(torch.ones(2, 16)[:, ::2], impl="triton")


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_function_agrees(kind):
    def function(x):
        return call(kind, x * 2) + 1

    x = torch.randn(3, 64)
    assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x))


def test_agrees_with_torch():
    x = torch.randn(4, 256)
    gate, up = x.chunk(2, -1)
    torch.testing.assert_close(silu_and_mul(x), torch.nn.functional.silu(gate) * up)
    for kind in ("tanh", "none"):
        torch.testing.assert_close(gelu_and_mul(x, approximate=kind), torch.nn.functional.gelu(gate, approximate=kind) * up)
