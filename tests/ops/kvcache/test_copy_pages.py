"""copy_pages beyond the shared cases: every byte of every page, layouts, page sizes, padding, errors, compilation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.check import ContractError
from penstock.ops import copy_pages

GPU = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = pytest.mark.parametrize(("impl", "device"), [("cpu", "cpu"), ("triton", GPU)])


@RUNS
@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(0, 4),
    S=st.sampled_from([1, 2, 16, 256]),
    H=st.integers(1, 3),
    D=st.sampled_from([1, 8, 33, 64]),
    layout=st.sampled_from(["nhd", "hnd", "inside"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int8]),
    padding=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_byte(impl, device, n, S, H, D, layout, dtype, padding, seed):
    torch.manual_seed(seed)
    P = 2 * n + 2
    shape = {"nhd": (P, S, H, D), "hnd": (P, H, S, D), "inside": (P, 2, S, H + 1, D)}[layout]
    buffer = torch.randint(-100, 100, shape, dtype=torch.int8, device=device)
    buffer = buffer.view(dtype) if dtype.itemsize == 1 else buffer.to(dtype)
    cache = {"nhd": buffer, "hnd": buffer.transpose(1, 2), "inside": buffer[:, 1, :, :H] if layout == "inside" else None}[
        layout
    ]
    pairs = torch.randperm(P)[: 2 * n].int().view(n, 2)
    if padding and n:
        pairs[0, seed % 2] = -1
    # Plain bytes or numbers, because FP8 has no equality.
    plain = (lambda tensor: tensor.view(torch.int8)) if dtype.itemsize == 1 else (lambda tensor: tensor)
    want = plain(buffer).clone()
    for source, destination in pairs.tolist():
        if source >= 0 and destination >= 0:
            target = {"nhd": want, "hnd": want, "inside": want[:, 1, :, :H] if layout == "inside" else None}[layout]
            target[destination] = target[source].clone()
    assert copy_pages(cache, pairs.to(device), impl=impl) is None
    assert torch.equal(plain(buffer), want)


@RUNS
def test_one_source_for_many(impl, device):
    cache = torch.randn(5, 4, 2, 8, device=device)
    source = cache[3].clone()
    pairs = torch.tensor([[3, 0], [3, 4], [3, 1]], dtype=torch.int32, device=device)
    copy_pages(cache, pairs, impl=impl)
    for page in (0, 1, 3, 4):
        assert torch.equal(cache[page], source)


def test_pairs_may_be_strided():
    cache = torch.randn(4, 2, 1, 8)
    want = cache[2].clone()
    copy_pages(cache, torch.tensor([[2], [1]], dtype=torch.int32).t(), impl="triton" if GPU == "cpu" else "cpu")
    assert torch.equal(cache[1], want)


def test_errors_name_the_argument():
    cache = torch.ones(2, 4, 1, 8)
    with pytest.raises(ContractError, match="`pairs`"):
        copy_pages(cache, torch.zeros(2, 3, dtype=torch.int32))
    with pytest.raises(ContractError, match="`pairs`"):
        copy_pages(cache, torch.zeros(2, 2))
    with pytest.raises(ContractError, match="`cache`"):
        copy_pages(cache[0], torch.zeros(2, 2, dtype=torch.int32))


def test_compiled_function_agrees():
    def function(cache, pairs):
        copy_pages(cache, pairs)
        return cache * 2

    one = torch.randn(4, 2, 1, 8)
    two = one.clone()
    pairs = torch.tensor([[0, 3]], dtype=torch.int32)
    got = torch.compile(function, fullgraph=True, backend="aot_eager")(one, pairs)
    assert torch.equal(got, function(two, pairs))
    assert torch.equal(one, two)
