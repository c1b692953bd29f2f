"""rms_norm and add_rms_norm beyond the shared cases: strides, in-place results, widths, errors, compilation, transformers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.check import ContractError
from penstock.core.op import NotSupported
from penstock.ops import add_rms_norm, rms_norm
from penstock.ops.norm.rms_norm_triton import configure
from penstock.testing import judge

GPU = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = pytest.mark.parametrize(("impl", "device"), [("cpu", "cpu"), ("triton", GPU)])
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def exact(x, weight, offset=0.0, eps=1e-6):
    return rms_norm(x.cpu().double(), weight.cpu().double(), eps=eps, weight_offset=offset, impl="reference")


def plain(x, weight, offset=0.0, eps=1e-6):
    return rms_norm(x.cpu(), weight.cpu(), eps=eps, weight_offset=offset, impl="reference")


@RUNS
@settings(max_examples=15, deadline=None)
@given(
    rows=st.lists(st.integers(0, 5), max_size=2),
    N=st.integers(1, 700),
    dtype=st.sampled_from(DTYPES),
    wide_weight=st.booleans(),
    offset=st.sampled_from([0.0, 1.0]),
)
def test_any_shape(impl, device, rows, N, dtype, wide_weight, offset):
    x = torch.randn(*rows, N).to(device, dtype)
    residual = torch.randn(*rows, N).to(device, dtype)
    weight = torch.randn(N).to(device, torch.float32 if wide_weight else dtype)
    judge("y", rms_norm(x, weight, weight_offset=offset, impl=impl), exact(x, weight, offset), plain(x, weight, offset))
    y, total = add_rms_norm(x, residual, weight, eps=1e-6, weight_offset=offset, impl=impl)
    assert torch.equal(total, (x.float() + residual.float()).to(dtype))
    judge("y", y, exact(total, weight, offset), plain(total, weight, offset))


@RUNS
@pytest.mark.parametrize("N", [1, 3, 16383, 16384, 16385, 65535, 65536])
def test_widths_around_the_chunk(impl, device, N):
    x, residual = torch.randn(2, N, device=device).bfloat16(), torch.randn(2, N, device=device).bfloat16()
    weight = torch.randn(N, device=device).bfloat16()
    judge("y", rms_norm(x, weight, impl=impl), exact(x, weight), plain(x, weight))
    y, total = add_rms_norm(x, residual, weight, impl=impl)
    assert torch.equal(total, x + residual)
    judge("y", y, exact(total, weight), plain(total, weight))


def test_a_program_holds_at_most_sixteen_values_a_thread():
    for N in (1, 7, 128, 300, 4096, 7168, 16384, 16385, 65536):
        config = configure(N)
        assert config.rows * config.block <= 16 * 32 * config.num_warps
        assert config.num_warps <= 32


@RUNS
@pytest.mark.parametrize("N", [96, 20000])
def test_strided_inputs_and_results(impl, device, N):
    buffer = torch.randn(3, 4, N + 32, device=device)
    x, weight = buffer[:, 1:3, :N], torch.randn(N, device=device)
    out = torch.full((3, 2, N + 8), float("nan"), device=device)[..., :N]
    returned = rms_norm(x, weight, out=out, impl=impl)
    assert returned is out
    judge("y", out, exact(x, weight), plain(x, weight))


@RUNS
@pytest.mark.parametrize("N", [64, 20000])
@pytest.mark.parametrize("aliases", ["none", "residual", "both", "crossed"])
def test_results_may_be_the_inputs(impl, device, N, aliases):
    x, residual = torch.randn(3, N, device=device), torch.randn(3, N, device=device)
    weight = torch.randn(N, device=device)
    want_y, want_total = add_rms_norm(x.clone(), residual.clone(), weight, impl=impl)
    out = {"none": None, "residual": (None, residual), "both": (x, residual), "crossed": (residual, x)}[aliases]
    y, total = add_rms_norm(x, residual, weight, out=out, impl=impl)
    assert torch.equal(y, want_y)
    assert torch.equal(total, want_total)
    if out is not None:
        assert total is out[1]
        assert out[0] is None or y is out[0]
    z = torch.randn(3, N, device=device)
    want = rms_norm(z, weight, impl=impl)
    assert torch.equal(rms_norm(z, weight, out=z, impl=impl), want)


def test_one_row_and_the_same_row_in_a_batch_agree():
    x, weight = torch.randn(4, 512), torch.randn(512)
    torch.testing.assert_close(rms_norm(x[:1], weight), rms_norm(x, weight)[:1], rtol=1e-6, atol=1e-6)


def test_rows_that_do_not_fold_are_refused_with_a_reason():
    x = torch.randn(3, 4, 5, 8).permute(2, 0, 1, 3)[:, ::2]
    with pytest.raises(NotSupported, match="do not fold into two"):
        rms_norm(x, torch.ones(8), impl="triton")
    with pytest.raises(NotSupported, match="stride 3"):
        rms_norm(torch.randn(8, 3).t(), torch.ones(8), impl="triton")
    judge("y", rms_norm(x, torch.ones(8)), exact(x, torch.ones(8)), plain(x, torch.ones(8)))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("weight", {"weight": torch.ones(7)}),
        ("residual", {"residual": torch.ones(3, 8)}),
        ("residual", {"residual": torch.ones(2, 8).double()}),
        ("eps", {"eps": 0.0}),
        ("out_residual", {"out": (None, torch.ones(2, 7))}),
    ],
)
def test_errors_name_the_argument(name, change):
    arguments = {"x": torch.ones(2, 8), "residual": torch.ones(2, 8), "weight": torch.ones(8), "eps": 1e-6} | change
    with pytest.raises(ContractError, match=f"`{name}`"):
        add_rms_norm(**arguments)


def test_one_tensor_cannot_be_both_results():
    x = torch.ones(2, 8)
    with pytest.raises(ContractError, match="two tensors"):
        add_rms_norm(x, x.clone(), torch.ones(8), out=(x, x))


def test_compiled_functions_agree():
    def block(x, residual, weight):
        y, total = add_rms_norm(x, residual, weight, eps=1e-6)
        return rms_norm(y, weight) + total

    def in_place(x, residual, weight):
        add_rms_norm(x, residual, weight, out=(x, residual))
        return x * 2, residual + 1

    x, residual, weight = torch.randn(3, 64), torch.randn(3, 64), torch.randn(64)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, residual, weight), block(x, residual, weight))
    one, two = [x.clone(), residual.clone()], [x.clone(), residual.clone()]
    got = torch.compile(in_place, fullgraph=True, backend="aot_eager")(*one, weight)
    for left, right in zip([*got, *one], [*in_place(*two, weight), *two], strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_llama_and_gemma(dtype):
    gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x = torch.randn(5, 256).to(dtype)
    for module, offset in ((llama.LlamaRMSNorm(256, 1e-5), 0.0), (gemma.GemmaRMSNorm(256, 1e-5), 1.0)):
        module = module.to(dtype)
        torch.nn.init.normal_(module.weight)
        theirs = module(x)
        ours = rms_norm(x, module.weight.detach(), eps=1e-5, weight_offset=offset)
        torch.testing.assert_close(ours, theirs)
