"""store_kv beyond the shared cases: bytes of slots nobody named, layouts, page sizes, FP8 bit for bit, errors, compilation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.check import ContractError
from penstock.core.formats import FP8_TENSOR, FP8_TOKEN, INT8_TOKEN
from penstock.core.op import NotSupported
from penstock.ops import store_kv

GPU = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = pytest.mark.parametrize(("impl", "device"), [("cpu", "cpu"), ("triton", GPU)])
FP8 = torch.float8_e4m3fn


def bits(tensor):
    return tensor.detach().contiguous().cpu().view(torch.uint8)


def cache(P, S, H, D, dtype, hnd, device="cpu"):
    drawn = torch.randn(*((P, H, S, D) if hnd else (P, S, H, D))).to(device, dtype)
    return drawn.transpose(1, 2) if hnd else drawn


def expected(before, x, slots, scale=None):
    """What the cache must hold, slot by slot, every byte of it."""
    after = before.clone()
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            row = x[token]
            if scale is not None:
                row = (row.float() / scale).clamp(-448, 448).to(FP8)
            after[slot // before.shape[1], slot % before.shape[1]] = row
    return after


@RUNS
@settings(max_examples=25, deadline=None)
@given(
    T=st.integers(0, 9),
    S=st.sampled_from([1, 2, 16, 256]),
    H=st.integers(1, 3),
    D=st.sampled_from([8, 33, 64]),
    Dv=st.sampled_from([8, 40]),
    hnd=st.booleans(),
    views=st.booleans(),
    fp8=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_every_byte(impl, device, T, S, H, D, Dv, hnd, views, fp8, dtype, seed):
    torch.manual_seed(seed)
    P = -(-(T + 3) // S) + 1
    both = torch.randn(T, H, D + Dv).mul(30).to(device, dtype)
    k, v = both[..., :D], both[..., D:]
    k, v = (k, v) if views else (k.contiguous(), v.contiguous())
    slots = torch.randperm(P * S)[:T].int()
    slots[torch.rand(T) < 0.3] = -1
    slots = slots.to(device)
    held = FP8 if fp8 else dtype
    k_cache, v_cache = cache(P, S, H, D, held, hnd, device), cache(P, S, H, Dv, held, hnd, device)
    k_scale, v_scale = (torch.tensor([0.25], device=device), torch.tensor([3.0], device=device)) if fp8 else (None, None)
    want = expected(k_cache, k, slots, k_scale), expected(v_cache, v, slots, v_scale)
    format = FP8_TENSOR if fp8 else None
    store_kv(k, v, k_cache, v_cache, slots, format=format, k_scale=k_scale, v_scale=v_scale, impl=impl)
    for got, after in zip((k_cache, v_cache), want, strict=True):
        assert torch.equal(bits(got), bits(after))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@RUNS
def test_fp8_of_awkward_values_is_clamp_and_cast(impl, device):
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite() & ((every == 0) | (every.abs() > 1e-20)) & (every.abs() < 1e20)]
    every = torch.cat((every, torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0], dtype=torch.bfloat16)))
    rows = every[: len(every) // 64 * 64].view(-1, 1, 64).to(device)
    tail = every[-64:].view(1, 1, 64).to(device)
    x = torch.cat((rows, tail))
    slots = torch.arange(len(x), dtype=torch.int32, device=device)
    for number in (1.0, 0.37, 2.5e-3):
        scale = torch.tensor([number], device=device)
        caches = [torch.zeros(-(-len(x) // 16), 16, 1, 64, dtype=FP8, device=device) for _ in range(2)]
        store_kv(x, x, *caches, slots, format=FP8_TENSOR, k_scale=scale, v_scale=scale, impl=impl)
        want = (x.cpu().float() / scale.cpu()).clamp(-448, 448).to(FP8)
        for held in caches:
            assert torch.equal(bits(held.view(-1, 64)[: len(x)]), bits(want.view(-1, 64)))


@RUNS
def test_all_padding_writes_nothing(impl, device):
    for T in (1, 5):
        k_cache, v_cache = (cache(2, 4, 2, 16, torch.float32, False, device) for _ in range(2))
        before = k_cache.clone(), v_cache.clone()
        k = torch.randn(T, 2, 16, device=device)
        store_kv(k, k, k_cache, v_cache, torch.full((T,), -1, dtype=torch.int32, device=device), impl=impl)
        assert torch.equal(k_cache, before[0])
        assert torch.equal(v_cache, before[1])


@RUNS
def test_a_cache_inside_a_larger_buffer(impl, device):
    """Keys and values of one page lie together, as engines allocate them."""
    buffer = torch.randn(4, 2, 8, 3, 16, device=device)
    before = buffer.clone()
    k, v = torch.randn(2, 3, 16, device=device), torch.randn(2, 3, 16, device=device)
    store_kv(k, v, buffer[:, 0], buffer[:, 1], torch.tensor([9, 31], dtype=torch.int32, device=device), impl=impl)
    for token, (page, offset) in enumerate([(1, 1), (3, 7)]):
        before[page, 0, offset], before[page, 1, offset] = k[token], v[token]
    assert torch.equal(buffer, before)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("v", {"v": torch.ones(3, 1, 8)}),
        ("k_cache", {"k_cache": torch.ones(2, 4, 2, 16)}),
        ("k_cache", {"k_cache": torch.ones(2, 4, 2, 8).half()}),
        ("v_cache", {"v_cache": torch.ones(2, 4, 2, 8).to(FP8)}),
        ("v_cache", {"v_cache": torch.ones(3, 4, 2, 8)}),
        ("slots", {"slots": torch.zeros(3, dtype=torch.int64)}),
        ("k_scale", {"k_scale": torch.ones(1)}),
        ("k_cache", {"format": FP8_TENSOR, "k_scale": torch.ones(1), "v_scale": torch.ones(1)}),
        (
            "k_scale",
            {"format": FP8_TENSOR, "k_cache": torch.ones(2, 4, 2, 8).to(FP8), "v_cache": torch.ones(2, 4, 2, 8).to(FP8)},
        ),
    ],
)
def test_errors_name_the_argument(name, change):
    arguments = {
        "k": torch.ones(3, 2, 8),
        "v": torch.ones(3, 2, 8),
        "k_cache": torch.ones(2, 4, 2, 8),
        "v_cache": torch.ones(2, 4, 2, 8),
        "slots": torch.zeros(3, dtype=torch.int32),
    }
    with pytest.raises(ContractError, match=f"`{name}`"):
        store_kv(**arguments | change)


@pytest.mark.parametrize("format", [FP8_TOKEN, INT8_TOKEN])
def test_other_formats_are_refused_with_a_reason(format):
    x, held = torch.ones(1, 1, 8), torch.ones(1, 1, 1, 8)
    with pytest.raises(NotSupported, match=format.name):
        store_kv(x, x, held, held, torch.zeros(1, dtype=torch.int32), format=format)


@pytest.mark.parametrize("fp8", [False, True])
def test_compiled_function_agrees(fp8):
    options = {"format": FP8_TENSOR, "k_scale": torch.tensor([0.5]), "v_scale": torch.tensor([2.0])} if fp8 else {}

    def function(x, k_cache, v_cache, slots):
        store_kv(x * 2, x + 1, k_cache, v_cache, slots, **options)
        return k_cache.float() + 1

    dtype = FP8 if fp8 else torch.float32
    one = [cache(2, 4, 2, 16, dtype, False) for _ in range(2)]
    two = [held.clone() for held in one]
    x, slots = torch.randn(3, 2, 16), torch.tensor([5, -1, 0], dtype=torch.int32)
    got = torch.compile(function, fullgraph=True, backend="aot_eager")(x, *one, slots)
    assert torch.equal(got, function(x, *two, slots))
    for left, right in zip(one, two, strict=True):
        assert torch.equal(bits(left), bits(right))
