"""hadamard beyond the shared cases: the matrix, every width, its own inverse, strides, in place, errors, compilation."""

import pytest
import torch

from penstock.core.check import ContractError
from penstock.core.op import NotSupported
from penstock.ops import hadamard
from penstock.testing import judge

GPU = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = pytest.mark.parametrize(("impl", "device"), [("cpu", "cpu"), ("triton", GPU)])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def right(y, x, scale=None):
    exact = hadamard(x.cpu().double(), scale=scale, impl="reference")
    judge("y", y, exact, hadamard(x.cpu(), scale=scale, impl="reference"))


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("N", [1, 2, 4, 8, 64])
def test_it_is_the_matrix(impl, N):
    wanted = [[(-1.0) ** (i & j).bit_count() for j in range(N)] for i in range(N)]
    device = GPU if impl == "triton" else "cpu"
    assert hadamard(torch.eye(N, device=device), scale=1.0, impl=impl).tolist() == wanted


@RUNS
@pytest.mark.parametrize("rounds", range(16))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_width(impl, device, rounds, dtype):
    x = torch.randn(3, 2**rounds, device=device).to(dtype)
    right(hadamard(x, impl=impl), x)


@RUNS
def test_it_is_its_own_inverse_and_keeps_the_norm(impl, device):
    x = torch.randn(5, 1024, device=device)
    y = hadamard(x, impl=impl)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(hadamard(y, impl=impl), x)


@RUNS
def test_strided_and_in_place(impl, device):
    x = torch.randn(3, 4, 160, device=device)[:, 1:3, :128]
    out = torch.full((3, 2, 136), float("nan"), device=device)[..., :128]
    assert hadamard(x, scale=0.5, out=out, impl=impl) is out
    right(out, x, 0.5)
    again = x.clone()
    hadamard(again, scale=0.5, out=again, impl=impl)
    assert torch.equal(again, out)


@pytest.mark.parametrize("N", [0, 3, 96, 65536])
def test_other_widths_are_refused(N):
    with pytest.raises(ContractError, match=f"`x` must have a last dimension that is a power of two up to 32768, got {N}"):
        hadamard(torch.ones(2, N))


@pytest.mark.parametrize(
    ("name", "change"), [("out", {"out": torch.ones(2, 4)}), ("scale", {"scale": 0.0}), ("x", {"x": torch.ones(2, 8).int()})]
)
def test_errors_name_the_argument(name, change):
    with pytest.raises(ContractError, match=f"`{name}`"):
        hadamard(**{"x": torch.ones(2, 8)} | change)


def test_a_strided_last_dimension_is_refused_with_a_reason():
    with pytest.raises(NotSupported, match="stride 3"):
        hadamard(torch.ones(8, 3).t(), impl="triton")


def test_compiled_function_agrees():
    def function(x):
        return hadamard(hadamard(x * 2), scale=0.25) + 1

    x = torch.randn(3, 64)
    assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x))
