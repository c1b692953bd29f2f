"""The Hopper kernel of decode: its source on CPU threads against the reference, what lies in a run, what it refuses."""

import random
from contextlib import nullcontext

import pytest
import torch

from penstock.core.cases import Make
from penstock.core.op import NotSupported
from penstock.ops.attention import _cases, _options, decode_plan
from penstock.ops.attention._reference import FP8
from penstock.ops.attention.decode import attention_decode
from penstock.ops.attention.decode_plan import attention_decode_plan
from penstock.testing.budget import judge, poisoned

pytest.importorskip("triton")

from penstock.ops.attention import (
    _load_hopper,
    _softmax_hopper,
    _tiles_hopper,
    decode_gather_hopper,
    decode_hopper,
    decode_work_hopper,
)
from tests.ops.attention import gluon_on_threads

NAN = float("nan")


class Kernel:
    """Stands in for the compiled kernel: a launch runs its source, its programs in the order that `shuffled` gives."""

    def __init__(self, **constants):
        nothing = {"gdc_wait": lambda: None, "gdc_launch_dependents": lambda: None}
        tiles = gluon_on_threads.functions_of(_tiles_hopper)
        softmax = gluon_on_threads.functions_of(_softmax_hopper)
        load = gluon_on_threads.functions_of(_load_hopper, tiles=tiles)
        work = gluon_on_threads.functions_of(decode_work_hopper)
        gather = gluon_on_threads.functions_of(decode_gather_hopper, softmax=softmax, **constants)
        others = {"tiles": tiles, "softmax": softmax, "load": load, "work": work, "gather": gather}
        self.source = gluon_on_threads.functions_of(decode_hopper, **others, **nothing)
        self.launches = []
        self.shuffled = list

    def __getitem__(self, grid):
        def launch(*arguments, C, num_warps, maxnreg):
            self.launches.append(C.tile)
            arguments = [gluon_on_threads.as_argument(value) for value in arguments]
            order = self.shuffled(range(grid[0]))
            gluon_on_threads.run(self.source._decode_kernel, grid[0], (*arguments, C.tile), order)

        return launch


@pytest.fixture
def emulated(monkeypatch):
    torch.manual_seed(0)

    def install(**constants):
        kernel = Kernel(**constants)
        monkeypatch.setattr(decode_hopper, "_decode_kernel", kernel)
        return kernel

    return install


def named(drawn):
    """Every argument of the operator, in the contract's names and with the plan's."""
    window = drawn.get("window", (-1, -1))
    defaults = {"q_len": 1, "causal": True, "window_left": window[0], "window_right": window[1], **drawn}
    return {argument.name: defaults.get(argument.name) for argument in attention_decode.arguments[2:]}


def call(drawn, config=None, plan=None):
    """(out, lse) of one call through the emulated kernel."""
    out = torch.full((*drawn["q"].shape[:2], drawn["v_cache"].shape[-1]), NAN, dtype=_options.out_dtype(drawn["q"]))
    lse = torch.full(drawn["q"].shape[:2], NAN)
    arguments = {**named(drawn), "plan": plan}
    with poisoned(), nullcontext() if config is None else decode_hopper.configure.forced(config):
        decode_hopper.launch(out, lse, *arguments.values())
    return out, lse


def check(drawn, config=None, plan=None):
    """One call through the emulated kernel against the reference, by the budget of the conformance tests."""
    drawn = {**drawn, "return_lse": True}
    wide = {n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in drawn.items()}
    exact, same = attention_decode(**wide, impl="reference"), attention_decode(**drawn, impl="baseline")
    found = call(drawn, config, plan)
    for name, *results in zip(("out", "lse"), found, exact, same, strict=True):
        judge(name, *results)
    return found


def refusal(drawn):
    """Why the kernel does not take a call, or None."""
    given = {name: value for name, value in named(drawn).items() if name in attention_decode.contract.names}
    return attention_decode.implementations["hopper"].supports(**given, out=None)


SMALL_CASES = [case for case in attention_decode.all_cases() if not case.bench]


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_cases(emulated, case):
    drawn = case.build(Make())
    if reason := refusal(drawn):
        pytest.skip(reason)
    emulated()
    check(drawn)


def planned(drawn, monkeypatch, programs):
    """A plan for so many programs of each KV head, and its tickets' first value."""
    monkeypatch.setattr(decode_plan, "num_programs", lambda *shape: programs)
    q, k = drawn["q"], drawn["k_cache"]
    shape = {"num_heads_q": q.shape[1], "num_heads_kv": k.shape[2], "head_dim": q.shape[2], "page_size": k.shape[1]}
    return attention_decode_plan(drawn["seqlens_k"], **shape, q_len=drawn.get("q_len", 1), impl="reference")


@pytest.mark.parametrize(("programs", "gather"), [(1, True), (3, True), (9, True), (14, True), (9, False)])
def test_pieces_in_any_order_give_the_same_bits(emulated, monkeypatch, programs, gather):
    """Fewer pieces than a group, and groups of groups, here of two; the plan is used again each time."""
    kernel = emulated(GROUP=2)
    drawn = _cases.decode("pieces", [640, 0, 70, 130], 4, 2, 64, q_len=2, with_sinks=True).build(Make())
    plan = planned(drawn, monkeypatch, programs)
    config = decode_hopper.HopperConfig(64, 2, gather)
    want = check(drawn, config, plan)
    for seed in range(2):
        kernel.shuffled = lambda numbers, seed=seed: random.Random(seed).sample(numbers, len(numbers))
        found = call(drawn, config, plan)
        assert all(torch.equal(mine, other) for mine, other in zip(found, want, strict=True))
        assert not plan.tickets.any()


def test_a_request_ends_where_the_next_begins(emulated, monkeypatch):
    """The last piece of three is a group of its own, in the program where a request of two pieces begins."""
    kernel = emulated(GROUP=2)
    drawn = _cases.decode("shared", [1408, 1408], 2, 1, 64).build(Make())
    plan = planned(drawn, monkeypatch, 5)
    config = decode_hopper.HopperConfig(64, 2, True)
    # 9.6 units a program: the requests, of 24 units each, meet in the middle of the third.
    assert plan.unit_start.tolist() == [0, 24, 48] and plan.first_request.tolist() == [0, 0, 0, 1, 1]
    want = check(drawn, config, plan)
    for order in ((4, 3, 2, 1, 0), (3, 4, 2, 0, 1), (0, 4, 2, 3, 1)):
        kernel.shuffled = lambda numbers, order=order: order
        found = call(drawn, config, plan)
        assert all(torch.equal(mine, other) for mine, other in zip(found, want, strict=True)), order
        assert not plan.tickets.any()


def test_a_missing_ticket_is_seen(emulated, monkeypatch):
    """The order test can fail: with a ticket too many a sum is made before its pieces are there."""
    emulated(GROUP=2)
    drawn = _cases.decode("pieces", [640], 1, 1, 64).build(Make())
    plan = planned(drawn, monkeypatch, 5)
    plan.tickets[2 * 1 + 1] = 1  # of the request that begins in program 1: the first has the lead alone
    found, _ = call(drawn, decode_hopper.HopperConfig(64, 2, True), plan)
    assert found.isnan().any()


@pytest.mark.parametrize("group", [1, 3, 6, 12, 16])
@pytest.mark.parametrize("q_len", [1, 8])
def test_groups(emulated, group, q_len):
    kernel = emulated()
    check(_cases.decode("group", [40, 90], group, 1, 64, q_len=q_len).build(Make()))
    rows = min(64, group * q_len)
    assert rows <= kernel.launches[0].rows < max(9, 2 * rows)


@pytest.mark.parametrize(
    "config", [decode_hopper.HopperConfig(128, 1, True), decode_hopper.HopperConfig(128, 2, False)], ids=str
)
@pytest.mark.parametrize("window", [(-1, -1), (75, -1)])
def test_wide_blocks(emulated, config, window):
    emulated()
    check(_cases.decode("wide", [300, 64, 0, 129, 5], 4, 2, 64, page_size=32, window=window, softcap=4.0).build(Make()), config)


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "with_sinks": True}, {"window": (100, -1), "q_len": 3}], ids=str)
@pytest.mark.parametrize("scales", ["", "static", "token"])
def test_fp8(emulated, options, scales):
    emulated()
    fp8 = {"dtype": FP8, "with_scales": scales, "transposed": True, "page_size": 128 if scales == "static" else 64}
    check(_cases.decode("fp8", [150, 3, 0, 260], 4, 2, 64, **fp8, **options).build(Make()))


@pytest.mark.parametrize(("dtype", "page_size"), [(torch.bfloat16, 16), (FP8, 64)], ids=str)
def test_garbage_around_the_keys_never_arrives(emulated, dtype, page_size):
    emulated()
    lengths, window = [21, 300, 9, 64], (40, -1)
    options = {"dtype": dtype, "transposed": dtype is FP8, "page_size": page_size, "window": window, "q_len": 2}
    drawn = _cases.decode("clean", lengths, 2, 1, 64, **options).build(Make())
    want, _ = check(drawn)
    table = drawn["page_table"]
    for b, length in enumerate(lengths):
        table[b, -(-length // page_size) :] = -(2**31)
        hidden = max(0, length - 2 - window[0]) // page_size
        for page in table[b, :hidden].tolist():
            for name in ("k_cache", "v_cache"):
                drawn[name][page] = torch.full_like(drawn[name][page].float(), NAN).to(dtype)
        table[b, :hidden] = -(2**31)
    assert torch.equal(call(drawn)[0], want)


def test_a_plan_without_a_window_serves_a_window(emulated, monkeypatch):
    emulated()
    drawn = _cases.decode("window", [300, 9, 200], 2, 1, 64, window=(20, -1)).build(Make())
    check(drawn, plan=planned(drawn, monkeypatch, 6))


def test_a_cache_of_one_page(emulated):
    emulated()
    for head_major in (False, True):
        drawn = _cases.decode("one", [30], 4, 2, 64, page_size=64, head_major=head_major).build(Make())
        drawn = {**drawn, **{name: drawn[name][drawn["page_table"][0].long()] for name in ("k_cache", "v_cache")}}
        check({**drawn, "page_table": torch.zeros_like(drawn["page_table"])})


def test_strided_query_and_output(emulated):
    emulated()
    drawn = _cases.decode("plain", [30, 40], 4, 2, 64).build(Make())
    want, _ = call(drawn)
    wide = torch.full((2, 7, 80), NAN, dtype=torch.bfloat16)
    wide[:, 1:5, 8:72] = drawn["q"]
    out = torch.full((2, 6, 72), NAN, dtype=torch.bfloat16)
    arguments = named({**drawn, "q": wide[:, 1:5, 8:72]})
    decode_hopper.launch(out[:, :4, 4:68], None, *arguments.values())
    assert torch.equal(out[:, :4, 4:68], want) and out[:, 4:].isnan().all() and out[:, :, :4].isnan().all()


@pytest.mark.parametrize("itemsize", [1, 2])
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("rows", [8, 16, 32, 64])
def test_two_programs_fit_on_a_multiprocessor(itemsize, width, rows):
    shape = (itemsize, max(width, 128 // itemsize), width, rows)
    for config in (decode_hopper.configure(*shape), *decode_hopper.candidates(*shape)):
        assert decode_hopper.held_bytes(*shape, config.block_n, config.stages) <= decode_hopper.SHARED


def test_what_the_kernel_does_not_take_is_refused():
    def refused(reason, *shape, **options):
        with pytest.raises(NotSupported, match=reason):
            attention_decode(**_cases.decode("refused", [9], 2, 1, *shape, **options).build(Make("meta")), impl="hopper")

    turned = {"dtype": FP8, "transposed": True}
    refused("page_size 8 is not a power of two from 16 to 256", 64, page_size=8)
    refused("the head dimension 32 of q", 32)
    refused("multiplies float16 or bfloat16", 64, dtype=torch.float32)
    refused("q does not start every row on a multiple of 16 bytes", 68)
    refused("page_size 32 is not 64, 128 or 256; a block of FP8 values is 64 slots", 128, page_size=32, **turned)
    refused("the head dimension 48 of q is not from 64 to 256", 48, page_size=64, **turned)
    refused("v_cache is not transposed inside its pages", 128, page_size=64, dtype=FP8)
    drawn = _cases.decode("scaled", [9], 2, 1, 128, page_size=64, with_scales="token", **turned).build(Make("meta"))
    drawn["k_scale"] = torch.empty(*drawn["k_cache"].shape[:3], 2, device="meta")[..., 0]
    with pytest.raises(NotSupported, match="k_scale's slots are 2 elements apart"):
        attention_decode(**drawn, impl="hopper")


@pytest.mark.gpu
@pytest.mark.parametrize("gather", [True, False])
def test_the_same_bits_every_time(gather):
    drawn = _cases.decode("bits", [9000, 3, 0, 700, 64] * 5, 8, 1, 128, page_size=64, return_lse=True).build(Make("cuda"))
    heads = {"num_heads_q": 8, "num_heads_kv": 1, "head_dim": 128, "page_size": 64}
    plan = attention_decode_plan(drawn["seqlens_k"], **heads)
    with decode_hopper.configure.forced(decode_hopper.HopperConfig(64, 3, gather)):
        want = attention_decode(**drawn, plan=plan, impl="hopper")
        for _ in range(20):
            found = attention_decode(**drawn, plan=plan, impl="hopper")
            assert all(torch.equal(mine, other) for mine, other in zip(found, want, strict=True))
    assert not plan.tickets.any()


@pytest.mark.gpu
def test_scales_of_keys_are_not_overtaken_by_the_next_copy():
    """Handed back before they were used, they were: in one run of five at this size."""
    fp8 = {"dtype": FP8, "transposed": True, "with_scales": "token"}
    drawn = _cases.decode("overtaken", [4096] * 64, 64, 8, 128, page_size=64, **fp8).build(Make("cuda"))
    with decode_hopper.configure.forced(decode_hopper.HopperConfig(64, 6, True)):
        want = attention_decode(**drawn, impl="hopper")
        assert all(torch.equal(attention_decode(**drawn, impl="hopper"), want) for _ in range(200))


@pytest.mark.gpu
def test_a_graph_follows_the_lengths():
    drawn = _cases.decode("graph", [3000, 1, 700, 64], 8, 1, 128, page_size=64).build(Make("cuda"))
    heads = {"num_heads_q": 8, "num_heads_kv": 1, "head_dim": 128, "page_size": 64}

    def step():
        return attention_decode(**drawn, plan=attention_decode_plan(drawn["seqlens_k"], **heads), impl="hopper")

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for lengths in ([3000, 1, 700, 64], [10, 0, 699, 3], [0, 0, 0, 0]):
        drawn["seqlens_k"].copy_(torch.tensor(lengths))
        for _ in range(2):
            graph.replay()
            assert torch.equal(out, step())
