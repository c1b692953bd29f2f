"""Row-wise operators on drawn shapes: any number of rows, narrow, ragged and wide, every format and dtype."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import penstock.ops as catalogue
from penstock.core.cases import Case
from penstock.core.formats import FP8_BLOCK, FP8_TENSOR, FP8_TOKEN, INT8_TOKEN
from penstock.testing import check_case

GPU = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = pytest.mark.parametrize(("impl", "device"), [("cpu", "cpu"), ("triton", GPU)])
# One warp's worth, a ragged width, whole rows, and both sides of the width from which rows are walked in chunks.
WIDTHS = (64, 129, 1000, 4096, 12000, 16384, 16385, 32768, 65536)
NORMS = ("rms_norm", "add_rms_norm", "layer_norm", "rms_norm_quant")
GATES = ("silu_and_mul", "gelu_and_mul", "silu_and_mul_quant")


@RUNS
@pytest.mark.parametrize("name", [*NORMS, *GATES])
@settings(max_examples=6, deadline=None)
@given(
    rows=st.integers(0, 5),
    width=st.sampled_from(WIDTHS),
    format=st.sampled_from([FP8_TENSOR, FP8_TOKEN, FP8_BLOCK, INT8_TOKEN]),
    static=st.booleans(),
    residual=st.booleans(),
    apart=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_any_shape_is_within_budget(impl, device, name, rows, width, format, static, residual, apart, dtype, seed):
    def build(make):
        columns = 2 * width if name in GATES else width
        x = make.randn(rows, columns + 8 * apart, dtype=dtype)[:, :columns]
        arguments = {"x": x}
        if name in NORMS:
            arguments["weight"] = make.randn(width, dtype=dtype)
        if name == "layer_norm":
            arguments["bias"] = make.randn(width, dtype=dtype)
        if name == "add_rms_norm" or (name == "rms_norm_quant" and residual):
            arguments["residual"] = make.randn(rows, width, dtype=dtype, scale=3.0)
        if name == "gelu_and_mul":
            arguments["approximate"] = "tanh" if static else "none"
        if name.endswith("quant"):
            arguments["format"] = format
            if static or format is FP8_TENSOR:
                arguments["scale"] = make.randn(*format.scale_shape((rows, width)), dtype=torch.float32).abs() * 0.01 + 0.005
        return arguments

    check_case(getattr(catalogue, name), impl, Case("drawn", build), device, seed)


def far_apart(rows, columns, dtype, device):
    """Rows 2³⁰ elements apart: from the third on their offsets do not fit into 32 bits. Only what is touched takes memory."""
    held = torch.empty((rows - 1) * 2**30 + columns, dtype=dtype, device=device)
    return held.as_strided((rows, columns), (2**30, 1))


@pytest.mark.parametrize("name", [*NORMS, *GATES, "quantize", "hadamard"])
def test_offsets_beyond_32_bits(name):
    x = far_apart(3, 64, torch.bfloat16, GPU)
    x.copy_(torch.randn(3, 64))
    arguments = {"x": x}
    if name in NORMS:
        arguments["weight"] = torch.ones(64, dtype=torch.bfloat16, device=GPU)
    if name == "layer_norm":
        arguments["bias"] = None
    if name == "add_rms_norm":
        arguments["residual"] = x
    if name.startswith("quant") or name.endswith("quant"):
        arguments["format"] = FP8_TOKEN
    operator = getattr(catalogue, name)
    got = operator(**arguments, impl="triton")
    near = {key: value.contiguous() if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}
    wanted = operator(**near, impl="triton")
    for one, two in zip(*(result if isinstance(result, tuple) else (result,) for result in (got, wanted)), strict=True):
        assert torch.equal(one.contiguous().view(torch.uint8), two.contiguous().view(torch.uint8))


def test_offsets_of_pages_beyond_32_bits():
    held = far_apart(3, 256, torch.float8_e4m3fn, GPU).view(3, 16, 1, 16)
    turned = far_apart(3, 256, torch.float8_e4m3fn, GPU).view(3, 1, 16, 16).permute(0, 3, 1, 2)
    x = torch.randn(48, 1, 16, device=GPU).bfloat16()
    slots = torch.arange(48, dtype=torch.int32, device=GPU)
    one = torch.ones(1, device=GPU)
    catalogue.store_kv(x, x, held, turned, slots, format=FP8_TENSOR, k_scale=one, v_scale=one, impl="triton")
    facts = [torch.tensor(values, dtype=torch.int32, device=GPU) for values in ([[0, 1, 2]], [48], [0, 48])]
    for cache in (held, turned):
        got = catalogue.gather_kv(cache, *facts, total=48, impl="triton")
        assert torch.equal(got.float(), x.to(torch.float8_e4m3fn).float())
