"""rope_norm_store_kv beyond the shared cases: against the separate operators, every unused byte, refusals, compilation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.cases import Case
from penstock.core.check import ContractError
from penstock.core.formats import FP8_BLOCK, FP8_TENSOR, FP8_TOKEN
from penstock.core.op import NotSupported
from penstock.ops import hadamard, quantize, rms_norm, rope, rope_norm_store_kv, store_kv
from penstock.ops.kvcache.layout import KVLayout
from penstock.testing import check_case

GPU = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = pytest.mark.parametrize(("impl", "device"), [("cpu", "cpu"), ("triton", GPU)])
FP8 = torch.float8_e4m3fn


def draw(T=6, Hq=4, Hkv=2, D=32, R=None, S=16, dtype=torch.float32, orders=(), format=None, device="cpu", **options):
    layout = KVLayout(S, Hkv, D, None, dtype if format is None else FP8, *orders, k_scales=format is FP8_TOKEN)
    P = -(-T // S) + 1
    caches = layout.allocate(P, device=device)
    angles = torch.randn(64, (R or D) // 2)
    slots = torch.randperm(P * S)[:T].int()
    slots[torch.rand(T) < 0.2] = -1
    arguments = {
        "qkv": torch.randn(T, (Hq + 2 * Hkv) * D).to(dtype),
        "cos_sin": torch.cat((angles.cos(), angles.sin()), 1),
        "positions": torch.randint(0, 64, (T,)).int(),
        "slots": slots,
        "format": format,
        **options,
    }
    if format is not None:
        arguments |= {"k_scale": torch.tensor([0.01]), "v_scale": torch.tensor([0.02])}
    arguments = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    for cache in caches:
        if cache is not None:
            # A byte that no kernel writes by chance: NaN of FP8, a large number of the others.
            torch.empty(0, dtype=torch.uint8, device=device).set_(cache.untyped_storage()).fill_(0x7F)
    arguments |= {"k_cache": caches.k, "v_cache": caches.v}
    if caches.k_scale is not None:
        arguments["k_scale"] = caches.k_scale
    return arguments


def used(arguments):
    """Which slots the call may write, [P, S]."""
    cache, slots = arguments["k_cache"], arguments["slots"]
    found = torch.zeros(cache.shape[0] * cache.shape[1], dtype=torch.bool, device=cache.device)
    found[slots[slots >= 0].long()] = True
    return found.view(cache.shape[:2])


@RUNS
@settings(max_examples=12, deadline=None)
@given(
    T=st.integers(0, 12),
    Hq=st.integers(0, 5),
    Hkv=st.integers(1, 3),
    D=st.sampled_from([64, 80, 128, 256]),
    part=st.sampled_from([1, 2, 5]),
    S=st.sampled_from([1, 16, 32]),
    orders=st.sampled_from([("NHD", None), ("HND", None), ("HND", "HDN")]),
    format=st.sampled_from([None, FP8_TENSOR, FP8_TOKEN]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    norms=st.booleans(),
    flags=st.fixed_dictionaries({name: st.booleans() for name in ("norm_first", "interleaved", "hadamard")}),
    seed=st.integers(0, 1000),
)
def test_any_shape_is_within_budget_and_leaves_other_slots_alone(
    impl, device, T, Hq, Hkv, D, part, S, orders, format, dtype, norms, flags, seed
):
    torch.manual_seed(seed)
    flags["hadamard"] &= D != 80
    if S < 16 or format is None:
        orders = (orders[0], None)
    options = {name: torch.randn(D).to(dtype) for name in ("q_norm", "k_norm")} if norms else {}
    arguments = draw(T, Hq, Hkv, D, D // part // 2 * 2, S, dtype, orders, format, device, **options, **flags)
    check_case(rope_norm_store_kv, impl, Case("drawn", lambda make: arguments), device)
    rope_norm_store_kv(**arguments, impl=impl)
    spare = ~used(arguments)
    for name in ("k_cache", "v_cache", "k_scale"):
        held = arguments.get(name)
        if held is not None and held.dim() > 1:
            assert bool((held[spare].contiguous().view(torch.uint8) == 0x7F).all()), name


@RUNS
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("format", [None, FP8_TENSOR, FP8_TOKEN])
def test_does_what_the_separate_operators_do(impl, device, norm_first, format):
    torch.manual_seed(1)
    weights = {name: torch.rand(32, device=device) + 0.5 for name in ("q_norm", "k_norm")}
    arguments = draw(format=format, device=device, norm_first=norm_first, hadamard=True, **weights)
    caches = [arguments[name].clone() for name in ("k_cache", "v_cache")]
    q, k, v = arguments["qkv"].clone().view(6, 8, 32).split((4, 2, 2), 1)
    for turn in (norm_first, not norm_first):
        if turn:
            q, k = (rms_norm(x, weight, eps=1e-6, impl=impl) for x, weight in zip((q, k), weights.values(), strict=True))
        else:
            q, k = rope(q, k, arguments["cos_sin"], arguments["positions"], impl=impl)
    q, k = hadamard(q, impl=impl), hadamard(k, impl=impl)
    k_scale = arguments.get("k_scale")
    k_scale = k_scale.clone() if format is FP8_TOKEN else k_scale
    scales = {"format": format, "k_scale": k_scale, "v_scale": arguments.get("v_scale")}
    store_kv(k, v, *caches, arguments["slots"], **scales, impl=impl)
    got = rope_norm_store_kv(**arguments, eps=1e-6, impl=impl)
    if format is not None:
        q8, q_scale = quantize(q, format=FP8_TOKEN, impl=impl)
        torch.testing.assert_close(got[1], q_scale)
        got, q = got[0].float() * got[1].unsqueeze(-1), q8.float() * q_scale.unsqueeze(-1)
    # One code of eight to a power of two where FP8 rounds the other way.
    torch.testing.assert_close(got, q, rtol=0.0 if format is None else 0.13, atol=1e-5)
    where = used(arguments)
    for mine, theirs in zip((arguments["k_cache"], arguments["v_cache"]), caches, strict=True):
        torch.testing.assert_close(mine[where].float(), theirs[where].float(), rtol=1e-4 if format is None else 0.13, atol=1e-5)
    if format is FP8_TOKEN:
        torch.testing.assert_close(arguments["k_scale"][where], k_scale[where])


@RUNS
def test_result_may_be_given_and_tokens_lie_apart(impl, device):
    arguments = draw(device=device)
    wider = torch.randn(6, 300, device=device)
    wider[:, :256] = arguments["qkv"]
    wanted = rope_norm_store_kv(**arguments, impl=impl)
    arguments["qkv"] = wider[:, :256]
    out = torch.empty(6, 5, 32, device=device)[:, :4]
    assert rope_norm_store_kv(**arguments, out=out, impl=impl) is out
    assert torch.equal(out, wanted)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("qkv", {"qkv": torch.ones(6, 250)}),
        ("qkv", {"qkv": torch.ones(6, 96)}),
        ("cos_sin", {"cos_sin": torch.ones(9, 64)}),
        ("k_cache", {"k_cache": torch.ones(2, 16, 2, 32).half()}),
        ("q_norm", {"q_norm": torch.ones(16)}),
        ("k_scale", {"k_scale": torch.ones(1)}),
        ("out", {"out": torch.ones(6, 3, 32)}),
        ("slots", {"slots": torch.zeros(5, dtype=torch.int32)}),
    ],
)
def test_errors_name_the_argument(name, change):
    with pytest.raises(ContractError, match=f"`{name}`"):
        rope_norm_store_kv(**draw() | change)


def test_what_cannot_be_done_is_refused_with_a_sentence():
    with pytest.raises(NotSupported, match="power of two, got 96"):
        rope_norm_store_kv(**draw(D=96), hadamard=True)
    with pytest.raises(NotSupported, match="FP8_BLOCK"):
        rope_norm_store_kv(**draw() | {"format": FP8_BLOCK})


@pytest.mark.parametrize("format", [None, FP8_TOKEN])
def test_compiled_function_agrees(format):
    arguments = draw(format=format)
    others = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}

    def function(qkv, **rest):
        q = rope_norm_store_kv(qkv * 2, **rest)
        return [part.float() + 1 for part in (q if isinstance(q, tuple) else (q,))]

    wanted = function(**arguments)
    got = torch.compile(function, fullgraph=True, backend="aot_eager")(**others)
    for one, two in zip(got, wanted, strict=True):
        assert torch.equal(one, two)
    where = used(arguments)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(others[name][where].view(torch.uint8), arguments[name][where].view(torch.uint8))
