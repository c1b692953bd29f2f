"""rope beyond the shared cases: packed views, in-place results, padding, errors, compilation, transformers' functions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.check import ContractError
from penstock.core.op import NotSupported
from penstock.ops import rope, rope_table
from penstock.testing import judge

GPU = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = pytest.mark.parametrize(("impl", "device"), [("cpu", "cpu"), ("triton", GPU)])


def packed(T, Hq, Hkv, D, dtype=torch.float32, device="cpu"):
    qkv = torch.randn(T, (Hq + 2 * Hkv) * D).to(device, dtype).view(T, Hq + 2 * Hkv, D)
    return qkv, qkv[:, :Hq], qkv[:, Hq : Hq + Hkv]


def check(got, q, k, table, positions, interleaved):
    narrow = [tensor.cpu() for tensor in (q, k, table, positions)]
    wide = [tensor.double() for tensor in narrow[:3]]
    exact = rope(*wide, narrow[3], interleaved=interleaved, impl="reference")
    plain = rope(*narrow, interleaved=interleaved, impl="reference")
    for name, one, two, three in zip("qk", got, exact, plain, strict=True):
        judge(name, one, two, three)


@RUNS
@settings(max_examples=20, deadline=None)
@given(
    T=st.integers(0, 6),
    Hq=st.integers(1, 5),
    Hkv=st.integers(1, 3),
    half=st.integers(1, 24),
    rest=st.integers(0, 20),
    interleaved=st.booleans(),
    views=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_any_shape(impl, device, T, Hq, Hkv, half, rest, interleaved, views, dtype):
    _, q, k = packed(T, Hq, Hkv, 2 * half + rest, dtype, device)
    q, k = (q, k) if views else (q.contiguous(), k.contiguous())
    table = rope_table(rotary_dim=2 * half, max_position=64, device=device)
    positions = torch.randint(-1, 64, (T,), dtype=torch.int32, device=device)
    got = rope(q, k, table, positions, interleaved=interleaved, impl=impl)
    check(got, q, k, table, positions, interleaved)


@RUNS
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("R", [32, 8])
def test_in_place_in_a_packed_buffer(impl, device, interleaved, R):
    qkv, q, k = packed(5, 4, 2, 32, device=device)
    table = rope_table(rotary_dim=R, max_position=64, device=device)
    positions = torch.tensor([3, 0, 63, 7, 7], dtype=torch.int32, device=device)
    before = qkv.clone()
    want_q, want_k = rope(q.clone(), k.clone(), table, positions, interleaved=interleaved, impl=impl)
    got_q, got_k = rope(q, k, table, positions, interleaved=interleaved, out=(q, k), impl=impl)
    assert got_q is q
    assert got_k is k
    assert torch.equal(qkv[:, :4], want_q)
    assert torch.equal(qkv[:, 4:6], want_k)
    assert torch.equal(qkv[:, 6:], before[:, 6:])


@RUNS
def test_only_one_result_in_place(impl, device):
    _, q, k = packed(3, 2, 2, 32, device=device)
    table, positions = (
        rope_table(rotary_dim=16, max_position=8, device=device),
        torch.arange(3, dtype=torch.int32, device=device),
    )
    want_q, want_k = rope(q.clone(), k.clone(), table, positions, impl=impl)
    got_q, got_k = rope(q, k, table, positions, out=(None, k), impl=impl)
    assert torch.equal(got_q, want_q)
    assert got_k is k
    assert torch.equal(k, want_k)


@RUNS
def test_results_side_by_side_elsewhere(impl, device):
    _, q, k = packed(3, 4, 2, 32, device=device)
    table, positions = (
        rope_table(rotary_dim=16, max_position=8, device=device),
        torch.arange(3, dtype=torch.int32, device=device),
    )
    _, out_q, out_k = packed(3, 4, 2, 32, device=device)
    want_q, want_k = rope(q, k, table, positions, impl=impl)
    rope(q, k, table, positions, out=(out_q, out_k), impl=impl)
    assert torch.equal(out_q, want_q)
    assert torch.equal(out_k, want_k)


@RUNS
def test_padding_rows_are_copied(impl, device):
    _, q, k = packed(3, 2, 1, 16, device=device)
    table, positions = rope_table(rotary_dim=16, max_position=8, device=device), torch.tensor([2, -1, -7], dtype=torch.int32)
    got_q, got_k = rope(q, k, table, positions.to(device), impl=impl)
    assert torch.equal(got_q[1:], q[1:])
    assert torch.equal(got_k[1:], k[1:])
    assert not torch.equal(got_q[0], q[0])


@RUNS
def test_token_and_head_strides_in_any_order(impl, device):
    q = torch.randn(4, 5, 16, device=device).transpose(0, 1)
    k = torch.randn(2, 5, 16, device=device).transpose(0, 1)
    table, positions = (
        rope_table(rotary_dim=16, max_position=8, device=device),
        torch.arange(5, dtype=torch.int32, device=device),
    )
    check(rope(q, k, table, positions, impl=impl), q, k, table, positions, False)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("k", {"k": torch.ones(3, 2, 16)}),
        ("k", {"k": torch.ones(3, 2, 32).half()}),
        ("cos_sin", {"cos_sin": torch.ones(8, 34)}),
        ("cos_sin", {"cos_sin": torch.ones(8, 7)}),
        ("cos_sin", {"cos_sin": torch.ones(8, 32).bfloat16()}),
        ("positions", {"positions": torch.ones(2, dtype=torch.int32)}),
        ("positions", {"positions": torch.ones(3)}),
        ("interleaved", {"interleaved": 1}),
        ("out_k", {"out": (None, torch.ones(3, 1, 32))}),
    ],
)
def test_errors_name_the_argument(name, change):
    arguments = {
        "q": torch.ones(3, 4, 32),
        "k": torch.ones(3, 2, 32),
        "cos_sin": torch.ones(8, 32),
        "positions": torch.zeros(3, dtype=torch.int32),
    }
    with pytest.raises(ContractError, match=f"`{name}`"):
        rope(**arguments | change)


def test_a_strided_head_is_refused_by_triton_with_a_reason():
    q = torch.randn(3, 4, 32)[..., ::2]
    table, positions = rope_table(rotary_dim=16, max_position=8), torch.arange(3, dtype=torch.int32)
    with pytest.raises(NotSupported, match="stride 2"):
        rope(q, q, table, positions, impl="triton")
    check(rope(q, q.clone(), table, positions), q, q, table, positions, False)


@pytest.mark.parametrize("interleaved", [False, True])
def test_compiled_functions_agree(interleaved):
    table, positions = rope_table(rotary_dim=16, max_position=8), torch.arange(5, dtype=torch.int32)

    def function(qkv):
        q, k = rope(qkv[:, :4], qkv[:, 4:6], table, positions, interleaved=interleaved)
        return q * 2, k + 1

    def in_place(qkv):
        q, k = qkv[:, :4], qkv[:, 4:6]
        rope(q, k, table, positions, interleaved=interleaved, out=(q, k))
        return qkv * 2

    qkv, _, _ = packed(5, 4, 2, 32)
    for plain in (function, in_place):
        one, two = qkv.clone(), qkv.clone()
        got, want = torch.compile(plain, fullgraph=True, backend="aot_eager")(one), plain(two)
        assert torch.equal(one, two)
        for left, right in zip(got, want, strict=True):
            assert torch.equal(left, right)


def halves(table, positions, dtype=torch.float32):
    rows = table[positions.long()]
    cos, sin = rows.chunk(2, 1)
    return [torch.cat((part, part), 1).to(dtype)[None] for part in (cos, sin)]


def test_transformers_llama():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    _, q, k = packed(7, 4, 2, 64)
    table, positions = rope_table(rotary_dim=64, max_position=128), torch.randint(0, 128, (7,), dtype=torch.int32)
    cos, sin = halves(table, positions)
    theirs = llama.apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    for ours, other in zip(rope(q, k, table, positions), theirs, strict=True):
        torch.testing.assert_close(ours, other[0].transpose(0, 1))


def test_transformers_partial():
    neox = pytest.importorskip("transformers.models.gpt_neox.modeling_gpt_neox")
    _, q, k = packed(7, 4, 4, 64)
    table, positions = rope_table(rotary_dim=16, max_position=128), torch.randint(0, 128, (7,), dtype=torch.int32)
    cos, sin = halves(table, positions)
    theirs = neox.apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    for ours, other in zip(rope(q, k, table, positions), theirs, strict=True):
        torch.testing.assert_close(ours, other[0].transpose(0, 1))


def test_transformers_interleaved():
    cohere = pytest.importorskip("transformers.models.cohere.modeling_cohere")
    _, q, k = packed(7, 4, 2, 32)
    table, positions = rope_table(rotary_dim=32, max_position=128), torch.randint(0, 128, (7,), dtype=torch.int32)
    cos, sin = (part.repeat_interleave(2, 1)[None] for part in table[positions.long()].chunk(2, 1))
    theirs = cohere.apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    for ours, other in zip(rope(q, k, table, positions, interleaved=True), theirs, strict=True):
        torch.testing.assert_close(ours, other[0].transpose(0, 1))
