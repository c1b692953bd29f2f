"""gather_kv beyond the shared cases: what store_kv wrote comes back, foreign page numbers, room left over, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.check import ContractError
from penstock.ops import gather_kv, store_kv
from penstock.ops.kvcache.gather_kv_triton import run_length
from penstock.ops.kvcache.layout import KVLayout

GPU = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = pytest.mark.parametrize(("impl", "device"), [("cpu", "cpu"), ("triton", GPU)])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def int32(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


@RUNS
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 7, 16, 33]), max_size=5),
    S=st.sampled_from([1, 4, 16, 256]),
    H=st.integers(1, 3),
    D=st.sampled_from([8, 33, 64]),
    hnd=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_returns_what_was_stored(impl, device, lengths, S, H, D, hnd, dtype, seed):
    torch.manual_seed(seed)
    pages = [-(-length // S) for length in lengths]
    P = sum(pages) + 1
    shape = (P, H, S, D) if hnd else (P, S, H, D)
    k_cache, v_cache = (torch.full(shape, float("nan"), dtype=dtype, device=device) for _ in range(2))
    if hnd:
        k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    # Entries past a request's end name no page at all.
    table = torch.full((len(lengths), max(pages, default=0) + 1), -(2**30), dtype=torch.int32)
    order, slots, starts = torch.randperm(P).tolist(), [], [0]
    for request, length in enumerate(lengths):
        for page in range(pages[request]):
            table[request, page] = order.pop()
        slots += [int(table[request, i // S]) * S + i % S for i in range(length)]
        starts.append(starts[-1] + length)
    k, v = (torch.randn(len(slots), H, D).to(device, dtype) for _ in range(2))
    store_kv(k, v, k_cache, v_cache, int32(slots, device), impl=impl)
    for x, held in ((k, k_cache), (v, v_cache)):
        got = gather_kv(held, table.to(device), int32(lengths, device), int32(starts, device), impl=impl)
        assert torch.equal(got, x)


@RUNS
def test_rows_that_no_request_fills_are_zero(impl, device):
    cache = torch.randn(3, 4, 2, 8, device=device)
    table, lengths = int32([[2, 0], [1, -9], [7, 7]], device), int32([5, 2, 0], device)
    starts = int32([1, 8, 10, 10], device)
    out = torch.full((13, 2, 8), float("nan"), device=device)
    assert gather_kv(cache, table, lengths, starts, out=out, impl=impl) is out
    want = torch.zeros(13, 2, 8)
    want[1:5], want[5], want[8:10] = cache[2].cpu(), cache[0, 0].cpu(), cache[1, :2].cpu()
    assert torch.equal(out.cpu(), want)


@RUNS
def test_total_cuts_and_extends(impl, device):
    cache = torch.randn(2, 4, 1, 8, device=device)
    arguments = cache, int32([[1, 0]], device), int32([6], device), int32([0, 6], device)
    whole = gather_kv(*arguments, impl=impl)
    assert whole.shape == (6, 1, 8)
    assert torch.equal(gather_kv(*arguments, total=4, impl=impl), whole[:4])
    longer = gather_kv(*arguments, total=9, impl=impl)
    assert torch.equal(longer[:6], whole)
    assert not longer[6:].any()


@RUNS
@pytest.mark.parametrize("B", [1, 2, 3, 7, 8, 9, 31, 33])
def test_every_number_of_requests(impl, device, B):
    lengths = [request % 3 for request in range(B)]
    starts = [sum(lengths[:request]) for request in range(B + 1)]
    cache = torch.arange(B * 4, dtype=torch.float32, device=device).view(B, 4, 1, 1).expand(B, 4, 1, 8).contiguous()
    table = torch.arange(B, dtype=torch.int32, device=device)[:, None]
    got = gather_kv(cache, table, int32(lengths, device), int32(starts, device), impl=impl)
    want = [4.0 * request + i for request in range(B) for i in range(lengths[request])]
    assert got[:, 0, 0].tolist() == want


@RUNS
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_bytes_are_copied_as_they_are(impl, device, dtype):
    cache = torch.randint(0, 256, (3, 4, 2, 16), dtype=torch.uint8, device=device).view(dtype)
    got = gather_kv(cache, int32([[2, 1]], device), int32([7], device), int32([0, 7], device), impl=impl)
    want = torch.cat((cache.view(torch.uint8)[2], cache.view(torch.uint8)[1]))[:7]
    assert torch.equal(got.view(torch.uint8), want)


def test_errors_name_the_argument():
    cache, table, lengths, starts = torch.ones(2, 4, 1, 8), int32([[0]], "cpu"), int32([3], "cpu"), int32([0, 3], "cpu")
    with pytest.raises(ContractError, match="`cu_seqlens`"):
        gather_kv(cache, table, lengths, lengths)
    with pytest.raises(ContractError, match="`seqlens`"):
        gather_kv(cache, table, int32([1, 2], "cpu"), starts)
    with pytest.raises(ContractError, match="`page_table`"):
        gather_kv(cache, table.long(), lengths, starts)
    with pytest.raises(ContractError, match="`out`"):
        gather_kv(cache, table, lengths, starts, out=torch.ones(3, 1, 7))
    with pytest.raises(ContractError, match="`total`"):
        gather_kv(cache, table, lengths, starts, out=torch.ones(3, 1, 8), total=4)
    with pytest.raises(ContractError, match="`total`"):
        gather_kv(cache, table, lengths, starts, total=-1)


def test_compiled_function_agrees():
    cache, table, lengths, starts = torch.randn(2, 4, 1, 8), int32([[1, 0]], "cpu"), int32([6], "cpu"), int32([0, 6], "cpu")

    def function(cache):
        return gather_kv(cache * 2, table, lengths, starts, total=6) + 1

    assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(cache), function(cache))


@RUNS
@pytest.mark.parametrize("S", [16, 64])
def test_requests_of_a_transposed_cache_begin_anywhere(impl, device, S):
    """Requests that fill runs, end inside them or are shorter; room after some; enough rows that runs are taken."""
    H, D = (2, 24) if device == "cpu" else (8, 128)
    lengths = [64, 75, 0, 3, 32, 33, 1, 96, 17] * (1 if device == "cpu" else 4)
    rooms = [0, 0, 5, 0, 0, 31, 0, 2, 0] * (1 if device == "cpu" else 4)
    counts = [-(-length // S) for length in lengths]
    layout = KVLayout(S, H, D, dtype=torch.float8_e4m3fn, order="HND", v_order="HDN")
    held = layout.allocate(sum(counts) + 1, device=device).v
    held.copy_(torch.randn(held.shape))
    table, free = torch.zeros(len(lengths), max(counts), dtype=torch.int32), torch.randperm(sum(counts)).tolist()
    starts = [2]
    for request, (length, room) in enumerate(zip(lengths, rooms, strict=True)):
        table[request, : counts[request]] = int32([free.pop() for _ in range(counts[request])], "cpu")
        starts.append(starts[-1] + length + room)
    total = starts[-1] + 40
    assert run_length(total, held) == min(S, 32)
    want = torch.zeros(total, H, D, dtype=torch.uint8)
    for request, length in enumerate(lengths):
        for i in range(length):
            want[starts[request] + i] = held[table[request, i // S], i % S].cpu().view(torch.uint8)
    arguments = held, table.to(device), int32(lengths, device), int32(starts, device)
    got = gather_kv(*arguments, total=total, impl=impl)
    assert torch.equal(got.cpu().view(torch.uint8), want)
