"""attention_prefill and attention_prefill_paged beyond conformance: layouts, masks and padding against a dense softmax."""

import pytest
import torch

from penstock.core.cases import Make
from penstock.core.check import ContractError
from penstock.core.op import NotSupported
from penstock.ops.attention import _cases, _cpu, _reference
from penstock.ops.attention.prefill import attention_prefill
from penstock.ops.attention.prefill_paged import attention_prefill_paged
from penstock.testing import check_case

NAN = float("nan")
IMPLS = ["triton", pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU path"))]


def dense(q, k, v, *, causal=True, window=(-1, -1), softcap=None, sinks=None, scale=None):
    """One request written out once more, in float64: a mask from its inequality, softmax over a row with its sink."""
    n, m, group = len(q), len(k), q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q.double(), k) * (scale or q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    for i in range(n):
        for j in range(m):
            distance = j - (i + m - n)
            right = 0 if causal else window[1]
            if (right >= 0 and distance > right) or (window[0] >= 0 and distance < -window[0]):
                scores[:, i, j] = float("-inf")
    sink = torch.full((scores.shape[0],), float("-inf")) if sinks is None else sinks.double().cpu()
    column = sink[:, None, None].to(scores).expand(-1, n, 1)
    weights = torch.cat([scores, column], -1)
    alive = (scores > float("-inf")).any(-1) if m else torch.zeros(scores.shape[:2], dtype=torch.bool)
    p = torch.where(alive[..., None], torch.softmax(weights, -1), 0)[..., :m]
    lse = torch.where(alive, torch.logsumexp(weights, -1), float("-inf"))
    return torch.einsum("hnm,mhd->nhd", p, v), lse.T


@pytest.mark.parametrize("attend", [_reference.exact, _reference.naive, _reference.narrow_weights])
def test_a_reference_in_pieces_is_the_whole_one(monkeypatch, attend):
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(rows, heads, 16, dtype=torch.float64, generator=draw) for rows, heads in ((220, 6), (330, 2), (330, 2))
    )
    mask = (torch.rand(2, 6, 2, 3, generator=draw) < 0.7).to(torch.uint8)
    sinks = torch.randn(6, dtype=torch.float64, generator=draw)
    lengths = [(150, 300), (70, 30)]
    largest = []

    def watched(q, k, v, *others):
        largest.append(q.shape[1] * max(q.shape[0] * k.shape[0], k.shape[0] * 16))
        return attend(q, k, v, *others)

    def result():
        ends = [torch.tensor([0, *torch.tensor(each).cumsum(0).tolist()]) for each in zip(*lengths, strict=True)]
        requests = _reference.packed_requests(k, v, *ends)
        return _reference.over_requests(watched, q, requests, 16, True, None, 100, -1, 3.0, sinks, block_mask=mask)

    whole = result()
    assert len(largest) == 2
    largest.clear()
    monkeypatch.setattr(_reference, "PIECE", 10_000)
    for mine, other in zip(result(), whole, strict=True):
        assert torch.allclose(mine, other, rtol=1e-10, atol=1e-12)
    assert max(largest) <= 10_000 and len(largest) > 10


def packed(device, lengths, Hq, Hkv, D, **options):
    arguments = _cases.prefill("drawn", lengths, Hq, Hkv, D, dtype=torch.float32, **options).build(Make(device))
    return arguments


def check_against_dense(arguments, lengths, impl, sinks=None, **options):
    out, lse = attention_prefill(**arguments, **options, return_lse=True, impl=impl)
    q0 = k0 = 0
    for n, m in lengths:
        q, k, v = arguments["q"][q0 : q0 + n], arguments["k"][k0 : k0 + m], arguments["v"][k0 : k0 + m]
        want, want_lse = dense(q.cpu(), k.cpu(), v.cpu(), sinks=sinks, **options)
        torch.testing.assert_close(out[q0 : q0 + n].cpu().double(), want, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(lse[q0 : q0 + n].cpu().double(), want_lse, atol=2e-5, rtol=2e-5)
        q0, k0 = q0 + n, k0 + m


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False},
        {"window": (7, -1)},
        {"window": (0, -1)},
        {"causal": False, "window": (5, 3)},
        {"causal": False, "window": (-1, 4)},
        {"window": (40, 2)},
        {"softcap": 2.0, "scale": 0.7},
    ],
    ids=str,
)
def test_masks_against_a_dense_softmax(device, impl, options):
    lengths = [(37, 37), (3, 50), (20, 5), (1, 1), (0, 4), (6, 0), (35, 40)]
    check_against_dense(packed(device, lengths, 2, 1, 16), lengths, impl, **options)


@pytest.mark.parametrize("impl", IMPLS)
def test_sinks_larger_than_every_score(device, impl):
    lengths = [(9, 20), (4, 0)]
    arguments = packed(device, lengths, 4, 2, 16)
    arguments["sinks"] = torch.tensor([-3.0, 0.0, 4.0, 300.0], device=device)
    sinks = arguments.pop("sinks")
    out, lse = attention_prefill(**arguments, sinks=sinks, return_lse=True, impl=impl)
    want, want_lse = dense(*(arguments[name][:n].cpu() for name, n in (("q", 9), ("k", 20), ("v", 20))), sinks=sinks)
    torch.testing.assert_close(out[:9].cpu().double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse[:9].cpu().double(), want_lse, atol=1e-4, rtol=1e-5)
    assert (out[9:] == 0).all() and (lse[9:] == float("-inf")).all()


@pytest.mark.parametrize("group", [1, 3, 4, 8, 12])
def test_groups(device, group):
    check_case(attention_prefill, "triton", _cases.prefill("group", [(9, 9), (20, 33)], group * 2, 2, 32), device)


@pytest.mark.parametrize(("D", "Dv"), [(80, 80), (96, 96), (192, 128), (64, 24), (8, 8), (256, 64)])
def test_head_dims(device, D, Dv):
    check_case(attention_prefill, "triton", _cases.prefill("head_dim", [(9, 40)], 2, 1, D, Dv=Dv, return_lse=True), device)


@pytest.mark.parametrize("page_size", [1, 4, 16, 64, 256])
@pytest.mark.parametrize("head_major", [False, True])
def test_pages(device, page_size, head_major):
    case = _cases.paged_prefill("pages", [(9, 9), (3, 150)], 2, 1, 32, page_size=page_size, head_major=head_major)
    check_case(attention_prefill_paged, "triton", case, device, seed=page_size)
    if device == "cpu":
        check_case(attention_prefill_paged, "cpu", case, device, seed=page_size)


@pytest.mark.parametrize("impl", IMPLS)
def test_garbage_around_the_keys_never_arrives(device, impl):
    lengths, window = [(5, 21), (2, 130), (3, 3)], (10, -1)
    make = Make(device)
    drawn = _cases.paged_prefill("clean", lengths, 2, 1, 32, page_size=8, window=window).build(make)
    want = attention_prefill_paged(**drawn, impl=impl)
    table, seqlens = drawn["page_table"], drawn["seqlens_k"].tolist()
    for b, (n, m) in enumerate(lengths):
        table[b, -(-seqlens[b] // 8) :] = -(2**31)
        hidden = max(0, m - n - window[0]) // 8
        for page in table[b, :hidden].tolist():  # a server frees the pages that the window has left behind
            drawn["k_cache"][page] = drawn["v_cache"][page] = NAN
        if impl == "triton":
            table[b, :hidden] = -(2**31)
    assert torch.equal(attention_prefill_paged(**drawn, impl=impl), want)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs_and_a_given_output(device, impl):
    lengths = [(17, 17), (9, 30)]
    arguments = _cases.prefill("plain", lengths, 4, 2, 32).build(Make(device))
    want = attention_prefill(**arguments, impl=impl)
    for name in ("q", "k", "v"):
        wide = torch.full((*arguments[name].shape[:2], 48), NAN, dtype=torch.bfloat16, device=device)
        wide = wide.transpose(0, 1).contiguous().transpose(0, 1)
        wide[:, :, 8:40] = arguments[name]
        arguments[name] = wide[:, :, 8:40]
    out = torch.full((26, 5, 64), NAN, dtype=torch.bfloat16, device=device)[:, :4, 16:48]
    returned = attention_prefill(**arguments, out=out, impl=impl)
    assert returned is out and torch.equal(out, want)


def test_paged_equals_packed_bit_for_bit(device):
    lengths = [(9, 70), (40, 40)]
    paged = _cases.paged_prefill("paged", lengths, 4, 2, 32, page_size=16).build(Make(device))
    requests = list(
        _reference.paged_requests(paged["k_cache"], paged["v_cache"], paged["page_table"], [0, 9, 49], paged["seqlens_k"])
    )
    k, v = (torch.cat([request[i] for request in requests]) for i in (1, 2))
    cu_seqlens_k = torch.tensor([0, 70, 110], dtype=torch.int32, device=device)
    packed_out = attention_prefill(
        paged["q"], k, v, paged["cu_seqlens_q"], cu_seqlens_k, max_seqlen_q=40, max_seqlen_k=70, impl="triton"
    )
    assert torch.equal(attention_prefill_paged(**paged, impl="triton"), packed_out)


@pytest.mark.parametrize("options", [{}, {"return_lse": True}, {"window": (9, -1)}], ids=str)
def test_float64_on_the_cpu_path(options):
    mixed = [(5, 5), (1, 40), (0, 9), (33, 97)]
    for op, case in ((attention_prefill, _cases.prefill), (attention_prefill_paged, _cases.paged_prefill)):
        drawn = case("float64", mixed, 2, 1, 32, dtype=torch.float64, **options).build(Make())
        torch.testing.assert_close(op(**drawn), op(**drawn, impl="reference"), atol=1e-13, rtol=1e-13)


def test_explicit_softmax_of_the_cpu_path_in_slices(monkeypatch):
    arguments = packed("cpu", [(30, 40)], 4, 2, 16, softcap=3.0)
    want = attention_prefill(**arguments, impl="cpu")
    monkeypatch.setattr(_cpu, "SCORES_AT_ONCE", 4 * 40 * 7)
    assert torch.equal(attention_prefill(**arguments, impl="cpu"), want)


def test_contract_errors_name_the_argument(device):
    good = packed(device, [(3, 3), (2, 2)], 4, 2, 16)

    def refused(argument, **changes):
        with pytest.raises(ContractError, match=f"attention_prefill: `{argument}`"):
            attention_prefill(**{**good, **changes})

    refused("q", q=good["q"][:, :3])
    refused("k", k=good["k"].half())
    refused("v", v=good["v"][:4])
    refused("v", v=good["v"].repeat(1, 1, 20))
    refused("cu_seqlens_q", cu_seqlens_q=good["cu_seqlens_q"].long())
    refused("cu_seqlens_k", cu_seqlens_k=good["cu_seqlens_k"][:2])
    refused("max_seqlen_q", max_seqlen_q=3.0)
    refused("max_seqlen_k", max_seqlen_k=None)
    refused("causal", causal=1)
    refused("scale", scale=-1.0)
    refused("window", window=4)
    refused("window_left", window=(-2, 0))
    refused("softcap", softcap=-1.0)
    refused("sinks", sinks=torch.zeros(3, device=device))
    refused("out", out=torch.empty(5, 4, 15, device=device))
    refused("impl", impl="fast")


def test_paged_contract_errors_name_the_argument(device):
    good = _cases.paged_prefill("good", [(3, 3), (2, 20)], 4, 2, 16).build(Make(device))

    def refused(argument, **changes):
        with pytest.raises(ContractError, match=f"attention_prefill_paged: `{argument}`"):
            attention_prefill_paged(**{**good, **changes})

    refused("page_table", page_table=good["page_table"].long())
    refused("page_table", page_table=good["page_table"][0])
    refused("seqlens_k", seqlens_k=good["seqlens_k"][:1])
    refused("max_seqlen_q", max_seqlen_q=torch.tensor(3))
    refused("v_cache", v_cache=good["v_cache"][:, :8])
    odd = {"k_cache": good["k_cache"][:, :7], "v_cache": good["v_cache"][:, :7]}
    with pytest.raises(NotSupported, match="page_size 7 is not a power of two"):
        attention_prefill_paged(**{**good, **odd}, impl="triton")


def test_value_checks_name_the_argument():
    good = packed("cpu", [(3, 3), (2, 2)], 4, 2, 16)
    named = {"q": good["q"]}
    contract = attention_prefill.contract
    from penstock.ops.attention import _options

    for offsets, longest, argument in (
        ([0, 3, 9], 5, "cu_seqlens_q"),
        ([1, 3, 5], 5, "cu_seqlens_q"),
        ([0, 4, 3], 5, "cu_seqlens_q"),
        ([0, 4, 5], 3, "max_seqlen_q"),
    ):
        with pytest.raises(ContractError, match=f"`{argument}`"):
            _options.check_offsets(contract, "cu_seqlens_q", torch.tensor(offsets), 5, longest, named)
    _options.check_offsets(contract, "cu_seqlens_q", torch.tensor([0, 3, 5]), 5, 3, named)


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("queries", ["short", "long"])
def test_candidates_fit_in_shared_memory(width, queries):
    pytest.importorskip("triton")
    from penstock.ops.attention.prefill_triton import candidates

    found = list(candidates(2, width, "none", queries, True, False))
    assert 2 <= len(found) == len(set(found)) <= 8
    for config in found:
        assert (config.block_m + 2 * config.num_stages * config.block_n) * width * 2 <= 232_448
        assert config.block_m == 64 or queries == "long"
