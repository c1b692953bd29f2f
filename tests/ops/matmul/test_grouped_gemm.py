"""grouped_gemm beyond the shared cases: what must not be read, gathers out of range, errors, compilation, one wrong tile."""

from dataclasses import replace

import pytest
import torch

from penstock.core.check import ContractError
from penstock.core.formats import FP8_BLOCK, FP8_TENSOR, FP8_TOKEN
from penstock.core.op import NotSupported
from penstock.ops import grouped_gemm, quantize
from penstock.testing import check_case

GPU = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = pytest.mark.parametrize(("impl", "device"), [("reference", "cpu"), ("cpu", "cpu"), ("triton", GPU)])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def call(**change):
    arguments = {
        "x": torch.randn(6, 32).bfloat16(),
        "w": torch.randn(3, 16, 32).bfloat16(),
        "group_offsets": torch.tensor([0, 2, 2, 5], dtype=torch.int32),
    }
    return arguments | change


@RUNS
def test_what_no_row_needs_is_not_read(impl, device):
    arguments = {name: value.to(device) for name, value in call().items()}
    wanted = grouped_gemm(**arguments, impl=impl)
    arguments["x"][5] = torch.nan
    arguments["w"][1] = torch.nan
    got = grouped_gemm(**arguments, impl=impl)
    assert torch.equal(got, wanted)
    assert not got[5].any()


@RUNS
def test_rows_gathered_from_outside_are_zeros(impl, device):
    arguments = {name: value.to(device) for name, value in call().items()}
    gather = torch.tensor([-1, 3, 6, 0, 3, 2, 2**31 - 1], dtype=torch.int32, device=device)
    got = grouped_gemm(**arguments, gather=gather, impl=impl)
    plain = grouped_gemm(
        **arguments | {"group_offsets": torch.tensor([0, 6, 6, 6], dtype=torch.int32, device=device)}, impl=impl
    )
    assert got.shape == (7, 16)
    assert not got[[0, 2, 5, 6]].any()
    torch.testing.assert_close(got[1], plain[3])


@RUNS
@pytest.mark.parametrize("format", [FP8_TENSOR, FP8_TOKEN, FP8_BLOCK], ids=lambda format: format.name)
def test_quantised_operands_give_nearly_the_product(impl, device, format):
    x, w = torch.randn(5, 256, device=device), torch.randn(2, 40, 256, device=device)
    offsets = torch.tensor([0, 3, 5], dtype=torch.int32, device=device)
    x8, x_scale = quantize(x, format=format)
    made = [quantize(expert, format=format, weight=format is FP8_BLOCK) for expert in w]
    w8, w_scale = torch.stack([values for values, _ in made]), torch.stack([scale for _, scale in made])
    got = grouped_gemm(x8, w8, offsets, x_scale=x_scale, w_scale=w_scale, format=format, impl=impl).float()
    wanted = torch.cat([x[:3] @ w[0].t(), x[3:] @ w[1].t()])
    assert (got - wanted).norm() < 0.06 * wanted.norm()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("w", {"w": torch.zeros(3, 16, 31).bfloat16()}),
        ("w", {"w": torch.zeros(3, 16, 32)}),
        ("w", {"w": torch.zeros(0, 16, 32).bfloat16(), "group_offsets": torch.zeros(1, dtype=torch.int32)}),
        ("group_offsets", {"group_offsets": torch.zeros(3, dtype=torch.int32)}),
        ("group_offsets", {"group_offsets": torch.zeros(4, dtype=torch.int64)}),
        ("x_scale", {"x_scale": torch.ones(1)}),
        ("x", {"format": FP8_TENSOR}),
        ("out", {"out": torch.zeros(5, 16).bfloat16()}),
        ("format", {"format": "FP4"}),
    ],
)
def test_errors_name_the_argument(name, change):
    with pytest.raises(ContractError, match=f"`{name}`"):
        grouped_gemm(**call(**change))


def test_scales_must_have_the_formats_shape():
    x, w = torch.zeros(6, 32).to(torch.float8_e4m3fn), torch.zeros(3, 16, 32).to(torch.float8_e4m3fn)
    scales = {"format": FP8_TOKEN, "x_scale": torch.ones(6), "w_scale": torch.ones(3, 16)}
    assert grouped_gemm(**call(x=x, w=w, **scales)).dtype is torch.bfloat16
    with pytest.raises(ContractError, match=r"`w_scale` must be float32\[3, 16\] with format=FP8_TOKEN, got float32\[16\]"):
        grouped_gemm(**call(x=x, w=w, **scales | {"w_scale": torch.ones(16)}))
    with pytest.raises(ContractError, match="`format` must be given"):
        grouped_gemm(**call(x=x, w=w))


def test_what_the_kernel_cannot_read_is_refused_with_a_reason():
    with pytest.raises(NotSupported, match="stride 6 along K"):
        grouped_gemm(**call(x=torch.zeros(32, 6).bfloat16().t()), impl="triton")
    with pytest.raises(NotSupported, match="TF32"):
        grouped_gemm(**call(x=torch.zeros(6, 32), w=torch.zeros(3, 16, 32)), impl="triton")


def test_compiled_function_agrees():
    def function(x, w, offsets):
        return grouped_gemm(x * 2, w, offsets) + 1

    arguments = tuple(call().values())
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.equal(compiled, function(*arguments))


def test_one_wrong_tile_is_found(monkeypatch):
    case = next(case for case in grouped_gemm.all_cases() if case.name == "bf16_ragged")
    right = grouped_gemm.implementations["cpu"]

    def spoiled(out, x, *others):
        # A row that is 300 times as small as the others, and so within their rounding.
        right.launch(out, x, *others)
        out[300] = 0

    def build(make):
        arguments = case.build(make)
        arguments["x"][256:384] /= 300
        return arguments

    small = replace(case, build=build)
    monkeypatch.setattr(grouped_gemm, "_picked", {})
    check_case(grouped_gemm, "cpu", small)
    monkeypatch.setitem(grouped_gemm.implementations, "cpu", replace(right, launch=spoiled))
    monkeypatch.setattr(grouped_gemm, "_picked", {})
    with pytest.raises(AssertionError, match=r"over budget; at .300, "):
        check_case(grouped_gemm, "cpu", small)
    monkeypatch.setattr(grouped_gemm, "tile", None)
    check_case(grouped_gemm, "cpu", small)
