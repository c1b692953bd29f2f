"""store_kv beyond the shared cases: bytes of slots nobody named, layouts, page sizes, FP8 bit for bit, errors, compilation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.check import ContractError
from penstock.core.formats import FP8_BLOCK, FP8_TENSOR, FP8_TOKEN, INT8_TOKEN
from penstock.core.op import NotSupported
from penstock.ops import store_kv
from penstock.ops.kvcache.layout import KVLayout
from penstock.ops.kvcache.store_kv_triton import configure_values

GPU = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = pytest.mark.parametrize(("impl", "device"), [("cpu", "cpu"), ("triton", GPU)])
FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def bits(tensor):
    return tensor.detach().contiguous().cpu().view(torch.uint8)


def cache(P, S, H, D, dtype, order="NHD", device="cpu"):
    v_order = order if dtype is FP8 and S >= 16 else order.replace("HDN", "HND")
    held = KVLayout(S, H, D, dtype=dtype, v_order=v_order).allocate(P, device=device).v
    return held.copy_(torch.randn(P, S, H, D).to(device))


def expected(before, x, slots, scale=None):
    """What the cache must hold, slot by slot, every byte of it; scale [T, H] or broadcastable to it."""
    after = before.clone()
    if scale is not None:
        x = (x.float() / torch.broadcast_to(scale, x.shape[:2]).unsqueeze(-1)).clamp(-448, 448).to(FP8)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            after[slot // before.shape[1], slot % before.shape[1]] = x[token]
    return after


@RUNS
@settings(max_examples=30, deadline=None)
@given(
    T=st.integers(0, 40),
    S=st.sampled_from([1, 2, 16, 256]),
    H=st.integers(1, 3),
    D=st.sampled_from([8, 33, 64]),
    Dv=st.sampled_from([8, 40]),
    order=st.sampled_from(["NHD", "HND", "HDN"]),
    views=st.booleans(),
    runs=st.booleans(),
    format=st.sampled_from([None, FP8_TENSOR, FP8_TOKEN]),
    per_head=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_every_byte(impl, device, T, S, H, D, Dv, order, views, runs, format, per_head, dtype, seed):
    torch.manual_seed(seed)
    P = -(-(T + 3) // S) + 1
    both = torch.randn(T, H, D + Dv).mul(30).to(device, dtype)
    k, v = both[..., :D], both[..., D:]
    k, v = (k, v) if views else (k.contiguous(), v.contiguous())
    slots = torch.arange(T).int() + seed % 4 if runs else torch.randperm(P * S)[:T].int()
    if not runs:
        slots[torch.rand(T) < 0.3] = -1
    slots = slots.to(device)
    held = dtype if format is None else FP8
    k_cache, v_cache = cache(P, S, H, D, held, order, device), cache(P, S, H, Dv, held, order, device)
    k_scale = v_scale = k_factor = wanted_scales = None
    if format is not None:
        k_scale = torch.rand(H if per_head else 1).add(0.2).to(device)
        k_factor, v_scale = k_scale, k_scale * 3
    if format is FP8_TOKEN:
        k_scale = torch.randn(P, H, S).to(device).transpose(1, 2)
        k_factor = FP8_TOKEN.dynamic_scale(k.float())
        wanted_scales = k_scale.clone()
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                wanted_scales[slot // S, slot % S] = k_factor[token]
    want = expected(k_cache, k, slots, k_factor), expected(v_cache, v, slots, v_scale)
    store_kv(k, v, k_cache, v_cache, slots, format=format, k_scale=k_scale, v_scale=v_scale, impl=impl)
    for got, after in zip((k_cache, v_cache), want, strict=True):
        assert torch.equal(bits(got), bits(after))
    if wanted_scales is not None:
        assert torch.equal(k_scale, wanted_scales)


@RUNS
@pytest.mark.parametrize("S", [16, 64])
@pytest.mark.parametrize("format", [FP8_TENSOR, FP8_TOKEN])
def test_requests_of_a_prefill_begin_anywhere(impl, device, S, format):
    """Prefixes that end inside a page, requests shorter than a run, padding, slots in reverse; V transposed in its pages."""
    H, D = (2, 24) if device == "cpu" else (8, 128)
    requests = [(0, 64), (37, 75), (5, 3), (0, 16), (64, 33), (1, 1)] * (1 if device == "cpu" else 5)
    counts = [-(-(prefix + length) // S) for prefix, length in requests]
    pages, P = iter(torch.randperm(sum(counts) + 3).tolist()), sum(counts) + 3
    slots = []
    for (prefix, length), count in zip(requests, counts, strict=True):
        table = [next(pages) for _ in range(count)]
        slots += [table[i // S] * S + i % S for i in range(prefix, prefix + length)] + [-1] * (prefix % 3)
    last = next(pages) * S
    slots = torch.tensor(slots + [last + i for i in reversed(range(S))], dtype=torch.int32)
    k, v = torch.randn(2, len(slots), H, D).mul(30).bfloat16()
    layout = KVLayout(S, H, D, dtype=FP8, order="HND", v_order="HDN", k_scales=format is FP8_TOKEN)
    k_cache, v_cache, k_scale = layout.allocate(P, device=device)
    for held in (k_cache, v_cache):
        held.copy_(torch.randn(P, S, H, D))
    v_scale = torch.rand(H) + 0.2
    factor = torch.rand(1) + 0.2 if k_scale is None else FP8_TOKEN.dynamic_scale(k.float())
    want = [expected(held.cpu(), x, slots, s) for held, x, s in ((k_cache, k, factor), (v_cache, v, v_scale))]
    scales = {"k_scale": factor.to(device) if k_scale is None else k_scale, "v_scale": v_scale.to(device)}
    store_kv(k.to(device), v.to(device), k_cache, v_cache, slots.to(device), format=format, **scales, impl=impl)
    for got, after in zip((k_cache, v_cache), want, strict=True):
        assert torch.equal(bits(got), bits(after))


def test_values_are_taken_in_runs_where_that_leaves_no_multiprocessor_idle():
    turned = KVLayout(64, 8, 128, dtype=FP8, order="HND", v_order="HDN").allocate(2, device="meta").v
    assert configure_values(64, 8, turned).run == 0
    assert configure_values(32768, 8, turned).run == 32
    assert configure_values(32768, 8, KVLayout(64, 8, 128).allocate(2, device="meta").v).run == 0


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
        k_cache, v_cache = (cache(2, 4, 2, 16, torch.float32, device=device) for _ in range(2))
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


FP8_CACHES = {"k_cache": torch.ones(2, 4, 2, 8).to(FP8), "v_cache": torch.ones(2, 4, 2, 8).to(FP8)}


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
        ("k_scale", FP8_CACHES | {"format": FP8_TENSOR, "k_scale": torch.ones(3), "v_scale": torch.ones(1)}),
        ("k_scale", FP8_CACHES | {"format": FP8_TOKEN, "k_scale": torch.ones(1), "v_scale": torch.ones(1)}),
        ("v_scale", FP8_CACHES | {"format": FP8_TOKEN, "k_scale": torch.ones(2, 4, 2), "v_scale": torch.ones(2, 4, 2)}),
        ("v_scale", FP8_CACHES | {"format": FP8_TENSOR, "k_scale": torch.ones(1), "v_scale": torch.ones(2).half()}),
        ("k_cache", {"format": FP8_TENSOR, "k_scale": torch.ones(1), "v_scale": torch.ones(1)}),
        ("k_scale", FP8_CACHES | {"format": FP8_TENSOR}),
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


@pytest.mark.parametrize("format", [FP8_BLOCK, INT8_TOKEN])
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
    one = [cache(2, 4, 2, 16, dtype) for _ in range(2)]
    two = [held.clone() for held in one]
    x, slots = torch.randn(3, 2, 16), torch.tensor([5, -1, 0], dtype=torch.int32)
    got = torch.compile(function, fullgraph=True, backend="aot_eager")(x, *one, slots)
    assert torch.equal(got, function(x, *two, slots))
    for left, right in zip(one, two, strict=True):
        assert torch.equal(bits(left), bits(right))
