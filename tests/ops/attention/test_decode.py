"""attention_decode with its plan: every shape, option and layout; equal work; pieces that equal the whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.cases import Make
from penstock.core.check import ContractError
from penstock.core.op import NotSupported
from penstock.ops.attention import _cases
from penstock.ops.attention.decode import attention_decode
from penstock.ops.attention.decode_cpu import CALL_IN_KEYS, GATHERED_BYTES, batches
from penstock.ops.attention.decode_plan import LEAD, SHARE, TILE, DecodePlan, attention_decode_plan, num_programs
from penstock.ops.attention.prefill_paged import attention_prefill_paged
from penstock.testing import check_case

NAN = float("nan")
IMPLS = ["triton"] if torch.cuda.is_available() else ["triton", "cpu"]
HEADS = {"num_heads_q": 4, "num_heads_kv": 2, "head_dim": 32, "page_size": 16}


def runs(plan: DecodePlan) -> list[list[tuple[int, int]]]:
    """Each program's units as (request, tile of the request or -1), read off the plan the way the kernel does."""
    unit_start, first_tile, first_request, _ = (values.tolist() for values in plan)
    total, C = unit_start[-1], len(first_request)
    working = min(C, -(-total // SHARE))
    found = []
    for c in range(C):
        own = []
        if c < working:
            unit, end, request = c * total // working, (c + 1) * total // working, first_request[c]
            while unit < end:
                stop = min(unit_start[request + 1], end)
                begin = unit_start[request] + LEAD
                own += [(request, first_tile[request] + u - begin if u >= begin else -1) for u in range(unit, stop)]
                unit, request = max(unit, stop), request + 1
        found.append(own)
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.integers(0, 200), st.integers(0, 5000)), max_size=40),
    st.sampled_from([(8, 8), (8, 1), (4, 2), (64, 1)]),
    st.integers(1, 8),
    st.sampled_from([-1, 0, 100, 1000]),
)
def test_every_tile_is_assigned_once_and_work_is_equal(seqlens, heads, q_len, left):
    lengths = torch.tensor(seqlens, dtype=torch.int32)
    shape = {"num_heads_q": heads[0], "num_heads_kv": heads[1], "head_dim": 64, "page_size": 16, "q_len": q_len}
    plan = attention_decode_plan(lengths, **shape, window=(left, -1), impl="reference")
    work = runs(plan)
    wanted = [
        (b, t)
        for b, length in enumerate(seqlens)
        for t in range(max(0, length - q_len - left) // TILE if left >= 0 else 0, -(-length // TILE))
    ]
    assert [unit for own in work for unit in own if unit[1] >= 0] == wanted
    sizes = [len(own) for own in work if own]
    assert not sizes or max(sizes) - min(sizes) <= 1
    units = len(wanted) + LEAD * len({b for b, _ in wanted})
    assert len(sizes) == min(len(work), -(-units // SHARE))
    assert len(work) == num_programs(lengths.device, *heads, 128, q_len)
    assert all(values.dtype == torch.int32 for values in plan) and not plan.tickets.any()


def test_scratch_does_not_grow_with_the_batch():
    sizes = {
        attention_decode_plan(torch.full((B,), 500, dtype=torch.int32), **HEADS).first_request.numel() for B in (1, 7, 600)
    }
    assert len(sizes) == 1


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(0, 700), max_size=12), st.sampled_from([-1, 90]))
def test_the_kernel_makes_the_same_plan(seqlens, left):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lengths = torch.tensor(seqlens, dtype=torch.int32, device=device)
    got = attention_decode_plan(lengths, **HEADS, window=(left, -1), impl="triton")
    want = attention_decode_plan(lengths, **HEADS, window=(left, -1), impl="reference")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_plan_contract():
    lengths = torch.tensor([3, 4], dtype=torch.int32)
    with pytest.raises(ContractError, match="attention_decode_plan: `seqlens_k` must be int32"):
        attention_decode_plan(lengths.long(), **HEADS)
    with pytest.raises(ContractError, match="attention_decode_plan: `num_heads_q` must be a multiple of num_heads_kv = 3"):
        attention_decode_plan(lengths, **{**HEADS, "num_heads_kv": 3})
    with pytest.raises(ContractError, match="attention_decode_plan: `q_len`"):
        attention_decode_plan(lengths, **HEADS, q_len=0)
    assert attention_decode_plan(lengths, **HEADS, device="cpu").unit_start.device.type == "cpu"


@pytest.mark.parametrize("seqlens", [[700], [0, 640, 3, 0], [65] * 9, [1000, 20, 20, 20], [64, 128, 0]], ids=str)
@pytest.mark.parametrize("q_len", [1, 3])
def test_pieces_equal_the_whole(device, seqlens, q_len):
    case = _cases.decode("pieces", seqlens, 4, 2, 32, q_len=q_len, return_lse=True)
    check_case(attention_decode, "triton", case, device)
    arguments = case.build(Make(device))
    plan = attention_decode_plan(arguments["seqlens_k"], **HEADS, q_len=q_len, impl="triton")
    planned = attention_decode(**arguments, plan=plan, impl="triton")
    # Without a plan the schedule is the same, or short requests are not split at all.
    alone = attention_decode(**arguments, impl="triton")
    for got, want in zip(planned, alone, strict=True):
        torch.testing.assert_close(got, want, atol=1e-2, rtol=1e-2)
        assert torch.equal(got, want) or max(seqlens) <= 256


def test_any_number_of_programs_gives_the_same_result(device):
    """The kernel reads how many programs there are off the plan."""
    arguments = _cases.decode("programs", [300, 0, 130, 1], 4, 2, 32, dtype=torch.float32, return_lse=True).build(Make(device))
    want, want_lse = attention_decode(**arguments, impl="reference")
    for C in (1, 2, 5, 9, 15, 40):
        tiles = torch.tensor([5, 0, 3, 1])
        ends = torch.where(tiles > 0, tiles + LEAD, 0).cumsum(0)
        total = int(ends[-1])
        starts = torch.arange(C) * total // min(C, -(-total // SHARE))
        first_request = torch.searchsorted(ends, starts, right=True).int()
        unit_start = torch.cat([ends.new_zeros(1), ends]).int()
        parts = (unit_start, torch.zeros(4, dtype=torch.int32), first_request, torch.zeros(0, dtype=torch.int32))
        plan = DecodePlan(*(part.to(device) for part in parts))
        out, lse = attention_decode(**arguments, plan=plan, impl="triton")
        torch.testing.assert_close(out, want, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(lse, want_lse, atol=1e-6, rtol=1e-5)


def test_many_pieces_of_one_request(device, monkeypatch):
    monkeypatch.setattr("penstock.ops.attention.decode_plan.PROGRAMS_PER_SM", 1 if device == "cuda" else 20)
    lengths = [TILE * 150 + 3, 70, 0]
    arguments = _cases.decode("pieces", lengths, 2, 1, 16, dtype=torch.float32, return_lse=True).build(Make(device))
    heads = {"num_heads_q": 2, "num_heads_kv": 1, "head_dim": 16, "page_size": 16}
    plan = attention_decode_plan(arguments["seqlens_k"], **heads)
    assert plan.first_request.numel() > 64
    out, lse = attention_decode(**arguments, plan=plan, impl="triton")
    want, want_lse = attention_decode(**arguments, impl="reference")
    torch.testing.assert_close(out, want, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse, want_lse, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("q_len", range(1, 9))
def test_q_len_equals_paged_prefill(device, q_len):
    arguments = _cases.decode("steps", [90, 2, 70], 2, 1, 32, q_len=q_len, dtype=torch.float32, return_lse=True).build(
        Make(device)
    )
    out, lse = attention_decode(**arguments, impl="triton")
    del arguments["q_len"]
    ends = torch.arange(4, dtype=torch.int32, device=device) * q_len
    want, want_lse = attention_prefill_paged(**arguments, cu_seqlens_q=ends, max_seqlen_q=q_len, impl="reference")
    torch.testing.assert_close(out, want, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse, want_lse, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("group", [1, 3, 4, 8, 12, 80])
def test_groups(device, impl, group):
    case = _cases.decode("group", [40, 300, 0], group, 1, 32, q_len=1 + (group == 12), return_lse=group == 3)
    check_case(attention_decode, impl, case, device)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("page_size", [1, 16, 64, 256])
@pytest.mark.parametrize("head_major", [False, True])
def test_pages(device, impl, page_size, head_major):
    case = _cases.decode("pages", [40, 130, 1], 4, 2, 32, page_size=page_size, head_major=head_major)
    check_case(attention_decode, impl, case, device, seed=page_size)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("D", "Dv"), [(80, 80), (96, 96), (192, 128), (8, 24), (256, 256)])
def test_head_dims(device, impl, D, Dv):
    check_case(attention_decode, impl, _cases.decode("head_dim", [40, 130], 2, 1, D, Dv=Dv, return_lse=True), device)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("seqlens", [[21, 300, 9], [21, 22, 23], [5] * 3 + [900]], ids=str)
def test_garbage_around_the_keys_never_arrives(device, impl, seqlens):
    window = (10, -1)
    drawn = _cases.decode("clean", seqlens, 2, 1, 32, page_size=8, q_len=2, window=window).build(Make(device))
    want = attention_decode(**drawn, impl=impl)
    assert want.isfinite().all()
    table = drawn["page_table"]
    for b, length in enumerate(seqlens):
        table[b, -(-length // 8) :] = -(2**31)
        hidden = max(0, length - 2 - window[0]) // 8
        for page in table[b, :hidden].tolist():  # a server frees the pages that the window has left behind
            drawn["k_cache"][page] = drawn["v_cache"][page] = NAN
        table[b, :hidden] = -(2**31)
    assert torch.equal(attention_decode(**drawn, impl=impl), want)


@pytest.mark.parametrize("impl", IMPLS)
def test_sinks_larger_than_every_score(device, impl):
    drawn = _cases.decode("sinks", [300, 0, 40], 4, 2, 32, dtype=torch.float32, return_lse=True).build(Make(device))
    drawn["sinks"] = torch.tensor([-3.0, 0.0, 4.0, 300.0], device=device)
    out, lse = attention_decode(**drawn, impl=impl)
    want, want_lse = attention_decode(**drawn, impl="reference")
    torch.testing.assert_close(out, want, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=1e-6)
    assert (out[1] == 0).all() and (lse[1] == float("-inf")).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_given_output_and_strided_query(device, impl):
    drawn = _cases.decode("plain", [30, 40], 4, 2, 32).build(Make(device))
    want = attention_decode(**drawn, impl=impl)
    wide = torch.full((2, 7, 80), NAN, dtype=torch.bfloat16, device=device)
    wide[:, 1:5, 16:48] = drawn["q"]
    out = torch.full((2, 6, 40), NAN, dtype=torch.bfloat16, device=device)[:, :4, 4:36]
    returned = attention_decode(**{**drawn, "q": wide[:, 1:5, 16:48]}, out=out, impl=impl)
    assert returned is out and torch.equal(out, want)


@pytest.mark.parametrize("options", [{}, {"window": (30, -1)}, {"softcap": 2.0}, {"return_lse": True}, {"q_len": 3}], ids=str)
@pytest.mark.parametrize("seqlens", [[50] * 4, [50, 40, 0, 1], [2000, 3, 5, 0]], ids=str)
def test_batching_of_the_cpu_path(options, seqlens):
    """Uniform, padded and request by request: the three ways through it."""
    check_case(attention_decode, "cpu", _cases.decode("batch", seqlens, 4, 2, 16, dtype=torch.float32, **options))


@pytest.mark.parametrize("options", [{}, {"return_lse": True}, {"window": (9, -1), "q_len": 2}], ids=str)
def test_float64_on_the_cpu_path(options):
    drawn = _cases.decode("float64", [5, 130, 0, 64], 2, 1, 32, dtype=torch.float64, **options).build(Make())
    want = attention_decode(**drawn, impl="reference")
    torch.testing.assert_close(attention_decode(**drawn), want, atol=1e-13, rtol=1e-13)


@given(st.lists(st.integers(0, 3000), max_size=30), st.integers(1, 10**6))
def test_batches_of_the_cpu_path(spans, key_bytes):
    found = list(batches(spans, key_bytes))
    assert sorted(b for batch in found for b in batch) == [b for b, span in enumerate(spans) if span]
    for batch in found:
        longest = max(spans[b] for b in batch)
        assert len(batch) == 1 or len(batch) * longest * key_bytes <= GATHERED_BYTES
        assert len(batch) * longest - sum(spans[b] for b in batch) <= len(batch) * CALL_IN_KEYS


@pytest.mark.gpu
def test_a_cuda_graph_follows_the_lengths():
    drawn = _cases.decode("graph", [3000, 1, 700, 64], 8, 2, 128, page_size=64).build(Make("cuda"))
    heads = {"num_heads_q": 8, "num_heads_kv": 2, "head_dim": 128, "page_size": 64}

    def step():
        return attention_decode(**drawn, plan=attention_decode_plan(drawn["seqlens_k"], **heads))

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for lengths in ([3000, 1, 700, 64], [10, 0, 699, 3], [0, 0, 0, 0]):
        drawn["seqlens_k"].copy_(torch.tensor(lengths))
        graph.replay()
        assert torch.equal(out, step())


def test_contract_errors_name_the_argument(device):
    good = _cases.decode("good", [20, 3], 4, 2, 16).build(Make(device))

    def refused(argument, **changes):
        with pytest.raises(ContractError, match=f"attention_decode: `{argument}`"):
            attention_decode(**{**good, **changes})

    refused("q", q=good["q"][:, :3])
    refused("q", q_len=2)
    refused("q_len", q_len=9)
    refused("page_table", page_table=good["page_table"].long())
    refused("page_table", page_table=good["page_table"][0])
    refused("seqlens_k", seqlens_k=tuple(good["seqlens_k"].tolist()))
    refused("v_cache", v_cache=good["v_cache"].half())
    refused("window", window=(1, 2, 3))
    refused("sinks", sinks=torch.zeros(4, 1, device=device))
    refused("plan", plan=attention_decode_plan(good["seqlens_k"][:1], **HEADS))
    refused("plan", plan=good["seqlens_k"])
    odd = {"k_cache": good["k_cache"][:, :7], "v_cache": good["v_cache"][:, :7]}
    with pytest.raises(NotSupported, match="page_size 7 is not a power of two"):
        attention_decode(**{**good, **odd}, impl="triton")


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("rows", [16, 64])
def test_candidates_fit_twice_on_a_multiprocessor(width, rows):
    pytest.importorskip("triton")
    from penstock.ops.attention.decode_triton import candidates

    found = list(candidates(2, width, rows, "large"))
    assert 4 <= len(found) == len(set(found)) <= 8
    for config in found:
        assert TILE % config.block_n == 0
        assert (config.num_stages - 1) * config.block_n * 4 * width < 227 * 1024 // 2
