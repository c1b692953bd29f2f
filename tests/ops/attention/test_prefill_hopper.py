"""The Hopper kernel of prefill: its source on CPU threads against the reference, its schedule, what it refuses."""

from contextlib import nullcontext

import pytest
import torch

from penstock.core import features
from penstock.core.cases import Make
from penstock.core.op import NotSupported
from penstock.ops.attention import _cases, _options
from penstock.ops.attention._reference import FP8
from penstock.ops.attention.prefill import attention_prefill
from penstock.ops.attention.prefill_paged import attention_prefill_paged
from penstock.testing.budget import judge

pytest.importorskip("triton")

from penstock.ops.attention import _load_hopper, _softmax_hopper, _tiles_hopper, prefill_hopper
from tests.ops.attention import gluon_on_threads


class Kernel:
    """Stands in for the compiled kernel: a launch runs its source."""

    def __init__(self, requests=64):
        tiles = gluon_on_threads.functions_of(_tiles_hopper, REQUESTS=requests)
        softmax = gluon_on_threads.functions_of(_softmax_hopper)
        load = gluon_on_threads.functions_of(_load_hopper, tiles=tiles)
        self.source = gluon_on_threads.functions_of(prefill_hopper, tiles=tiles, softmax=softmax, load=load)
        self.launches = []

    def __getitem__(self, grid):
        def launch(*arguments, C, num_warps, maxnreg):
            self.launches.append(C.tile)
            arguments = [gluon_on_threads.as_argument(value) for value in arguments]
            gluon_on_threads.run(self.source._prefill_kernel, grid[0], (*arguments, C.tile))

        return launch


@pytest.fixture
def emulated(monkeypatch):
    torch.manual_seed(0)
    # The lists of a block mask are made by a Triton kernel, through the interpreter.
    assert features.interpreting()

    def install(**options):
        kernel = Kernel(**options)
        monkeypatch.setattr(prefill_hopper, "_prefill_kernel", kernel)
        return kernel

    return install


def call(op, drawn, config=None, impl="hopper"):
    """(out, lse) of one call through the emulated kernel."""
    window = drawn.get("window", (-1, -1))
    defaults = {"causal": True, "scale": None, "softcap": None, "sinks": None, "max_seqlen_k": None}
    given = {**defaults, **drawn, "window_left": window[0], "window_right": window[1]}
    values = drawn["v"] if "v" in drawn else drawn["v_cache"]
    out = torch.full((*drawn["q"].shape[:2], values.shape[-1]), float("nan"), dtype=_options.out_dtype(drawn["q"]))
    lse = torch.full(drawn["q"].shape[:2], float("nan"))
    with nullcontext() if config is None else prefill_hopper.configure.forced(config):
        op.implementations[impl].launch(out, lse, *[given.get(argument.name) for argument in op.arguments[2:]])
    return out, lse


def check(op, drawn, config=None, impl="hopper"):
    """One call through the emulated kernel against the reference, by the budget of the conformance tests."""
    drawn = {"return_lse": True, **drawn}
    wide = {n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in drawn.items()}
    exact, same = op(**wide, impl="reference"), op(**drawn, impl="baseline")
    found = call(op, drawn, config, impl)
    for name, *results in zip(("out", "lse"), found, exact, same, strict=True):
        judge(name, *results)
    return found[0]


SMALL = prefill_hopper.HopperConfig(2, 64, 2, True)
MIXED = [(150, 150), (0, 9), (33, 200), (7, 0), (40, 9)]


def test_packed_requests_of_all_kinds(emulated):
    kernel = emulated(requests=2)
    drawn = _cases.prefill("ragged", MIXED, 2, 1, 64, padding=3).build(Make())
    check(attention_prefill, {**drawn, "max_seqlen_q": 256}, SMALL)
    assert kernel.launches[0].group == 1


def test_heads_in_sections(emulated, monkeypatch):
    emulated()
    monkeypatch.setattr(prefill_hopper, "SECTION_BYTES", 1)
    drawn = _cases.prefill("sections", [(70, 70), (3, 40)], 6, 3, 64).build(Make())
    check(attention_prefill, {**drawn, "max_seqlen_q": 256}, SMALL)


@pytest.mark.parametrize(("group", "held"), [(3, 1), (6, 2), (8, 8)])
def test_heads_packed_for_short_requests(emulated, group, held):
    kernel = emulated()
    drawn = _cases.prefill("short", [(20, 150), (1, 3), (45, 45)], 2 * group, 2, 64, with_sinks=True).build(Make())
    check(attention_prefill, drawn, SMALL)
    assert kernel.launches[0].group == held


@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"window": (70, -1)},
        {"window": (0, -1)},
        {"causal": False, "window": (90, 20)},
        {"causal": False, "window": (-1, 5)},
    ],
    ids=str,
)
def test_masks(emulated, options):
    emulated()
    drawn = _cases.prefill("masks", [(140, 300), (40, 9), (1, 130)], 1, 1, 64, **options).build(Make())
    check(attention_prefill, drawn, SMALL)


@pytest.mark.parametrize(
    "config",
    [
        prefill_hopper.HopperConfig(2, 128, 2, False),
        prefill_hopper.HopperConfig(3, 64, 3, True),
        prefill_hopper.HopperConfig(2, 128, 4, True),
    ],
    ids=str,
)
def test_configs(emulated, config):
    emulated()
    drawn = _cases.prefill("configs", [(200, 200), (130, 400)], 2, 1, 64, dtype=torch.float16, softcap=3.0).build(Make())
    check(attention_prefill, drawn, config)


@pytest.mark.parametrize(("D", "Dv", "reuse"), [(192, 128, True), (256, 256, True), (80, 40, False), (128, 128, False)])
def test_head_dims(emulated, D, Dv, reuse):
    kernel = emulated()
    drawn = _cases.prefill("head_dims", [(70, 150), (3, 3)], 1, 1, D, Dv=Dv).build(Make())
    check(attention_prefill, drawn)
    tile = kernel.launches[0]
    assert tile.reuse == reuse and tile.shared <= prefill_hopper.SHARED


@pytest.mark.parametrize("d", [64, 128, 192, 256])
@pytest.mark.parametrize("dv", [64, 128, 256])
def test_configs_fit_in_shared_memory(d, dv):
    for config in (
        prefill_hopper.configure(d, dv, True, False, False, 2),
        *prefill_hopper.candidates(d, dv, True, False, False, 2),
    ):
        assert prefill_hopper.shape_of(d, dv, config).shared <= prefill_hopper.SHARED


@pytest.mark.parametrize(("page_size", "head_major"), [(16, True), (64, False), (256, True)])
def test_pages(emulated, page_size, head_major):
    emulated()
    case = _cases.paged_prefill(
        "pages", [(9, 9), (130, 150), (0, 20), (2, 0)], 2, 1, 64, page_size=page_size, head_major=head_major
    )
    drawn = case.build(Make())
    for request, length in enumerate(drawn["seqlens_k"].tolist()):
        drawn["page_table"][request, -(-length // page_size) :] = -(2**31)
    check(attention_prefill_paged, drawn, SMALL)


def test_pages_left_behind_by_the_window(emulated):
    emulated()
    drawn = _cases.paged_prefill("window", [(5, 150), (2, 130)], 2, 1, 64, page_size=16, window=(20, -1)).build(Make())
    want = check(attention_prefill_paged, dict(drawn), SMALL)
    for request, hidden in enumerate([(150 - 5 - 20) // 16, (130 - 2 - 20) // 16]):
        for page in drawn["page_table"][request, :hidden].tolist():
            drawn["k_cache"][page] = drawn["v_cache"][page] = float("nan")
        drawn["page_table"][request, :hidden] = -(2**31)
    assert torch.equal(call(attention_prefill_paged, drawn, SMALL)[0], want)


@pytest.mark.parametrize(
    ("scales", "options"),
    [("", {}), ("static", {"softcap": 5.0, "with_sinks": True}), ("token", {"window": (100, -1)})],
    ids=["plain", "static", "token"],
)
def test_fp8(emulated, scales, options):
    emulated()
    lengths = [(9, 9), (130, 300), (0, 20), (70, 128), (3, 0)]
    case = _cases.paged_prefill(
        "fp8", lengths, 2, 1, 64, dtype=FP8, with_scales=scales, transposed=True, page_size=128, **options
    )
    check(attention_prefill_paged, case.build(Make()))


MASKED = prefill_hopper.HopperConfig(2, 128, 2, True)


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({"with_blocks": 0.5}, MASKED),
        ({"with_blocks": 0.3, "page_size": 64, "with_sinks": True}, SMALL),
        ({"with_blocks": 0.5, "window": (150, -1)}, prefill_hopper.HopperConfig(2, 64, 3, False)),
        ({"with_blocks": 0.5, "causal": False, "window": (140, 60), "dtype": torch.float16}, MASKED),
        ({"with_blocks": 0.5, "dtype": FP8, "transposed": True, "with_scales": "token", "page_size": 128}, MASKED),
    ],
    ids=str,
)
def test_block_masks(emulated, options, config):
    kernel = emulated()
    # Short requests too, whose heads would be packed without a mask.
    case = _cases.paged_prefill("blocks", [(300, 420), (0, 9), (20, 140), (7, 0)], 2, 1, 64, **options)
    check(attention_prefill_paged, case.build(Make()), config, "hopper")
    assert kernel.launches[0].has_blocks and kernel.launches[0].group == 1


def test_what_a_masked_block_holds_is_not_read(emulated):
    emulated()
    drawn = _cases.paged_prefill("blocks", [(200, 390)], 2, 1, 64, page_size=128, with_blocks=0.5).build(Make())
    drawn["block_mask"][0, :, :, 1] = 0
    want = call(attention_prefill_paged, drawn, MASKED, "hopper")
    drawn["page_table"][0, 1] = -(2**31)
    assert all(map(torch.equal, call(attention_prefill_paged, drawn, MASKED, "hopper"), want))


def test_rows_of_a_mask_without_a_block(emulated):
    emulated()
    drawn = _cases.paged_prefill("blocks", [(300, 300)], 2, 1, 64, with_blocks=1.0, with_sinks=True).build(Make())
    drawn["block_mask"][0] = 1
    drawn["block_mask"][0, 1, 1] = 0
    # Set behind the diagonal alone.
    drawn["block_mask"][0, 0, 0, 0] = 0
    out, lse = call(attention_prefill_paged, drawn, MASKED, "hopper")
    dead = torch.zeros(300, 2, dtype=torch.bool)
    dead[128:256, 1] = dead[:128, 0] = True
    assert torch.equal(lse == float("-inf"), dead) and torch.equal((out == 0).all(-1), dead)


def test_block_masks_ask_for_tiles_of_128_queries(emulated):
    emulated()
    drawn = _cases.paged_prefill("blocks", [(130, 130)], 2, 1, 64, with_blocks=0.5).build(Make())
    with pytest.raises(ValueError, match=r"must hold 128 queries, .* holds 192"):
        call(attention_prefill_paged, drawn, prefill_hopper.HopperConfig(3, 64, 2, True), "hopper")


def test_codes_are_of_fp8_weights(emulated):
    emulated()
    drawn = _cases.prefill("plain", [(9, 9)], 2, 1, 64).build(Make())
    with pytest.raises(ValueError, match=r"codes are of FP8 weights, got .* for bf16"):
        call(attention_prefill, drawn, prefill_hopper.HopperConfig(2, 128, 2, True, codes=True))


def test_auto_takes_this_kernel_with_and_without_a_block_mask(monkeypatch):
    for feature in ("wgmma", "tma", "triton"):
        monkeypatch.setitem(features.FEATURES, feature, lambda tensors, by_name: None)
    for share in (0.0, 0.5):
        drawn = _cases.paged_prefill("masked", [(130, 130)], 2, 1, 64, with_blocks=share).build(Make())
        given = {"causal": True, "window_left": -1, "window_right": -1, **drawn}
        values = [given.get(name) for name in attention_prefill_paged.contract.names]
        assert attention_prefill_paged.chosen("auto", *values) == "hopper"


@pytest.mark.parametrize(
    "config",
    [
        prefill_hopper.HopperConfig(2, 128, 3, True),
        prefill_hopper.HopperConfig(2, 128, 3, True, codes=True),
        prefill_hopper.HopperConfig(2, 128, 4, False, codes=True, chains=True),
        prefill_hopper.HopperConfig(2, 64, 4, True, chains=True),
    ],
    ids=str,
)
def test_fp8_configs(emulated, config):
    emulated()
    fp8 = {"dtype": FP8, "with_scales": "token", "transposed": True, "page_size": 128}
    drawn = _cases.paged_prefill("fp8", [(9, 9), (200, 330), (0, 20), (3, 0)], 2, 1, 64, **fp8, softcap=5.0).build(Make())
    found = check(attention_prefill_paged, drawn, config)
    if config.block_n == 128 and config.consumers == 2:
        assert torch.equal(found, call(attention_prefill_paged, drawn)[0])


def test_what_the_accelerator_cannot_address_is_refused():
    drawn = _cases.prefill("plain", [(9, 9)], 2, 1, 64).build(Make("meta"))
    assert attention_prefill.chosen("hopper", *positional(drawn)) == "hopper"

    def refused(reason, **changes):
        with pytest.raises(NotSupported, match=reason):
            attention_prefill.pick("hopper", *positional({**drawn, **changes}))

    narrow = _cases.prefill("narrow", [(9, 9)], 2, 1, 32).build(Make("meta"))
    refused("the head dimension 32 of q", q=narrow["q"], k=narrow["k"])
    refused("the head dimension 24 of v", v=drawn["v"][:, :, :24])
    refused("k does not start every row", k=torch.empty(9, 1, 67, dtype=torch.bfloat16, device="meta")[:, :, :64])
    refused("out does not start every row", out=torch.empty(9, 2, 67, dtype=torch.bfloat16, device="meta")[:, :, :64])
    refused("multiplies float16 or bfloat16", **{name: drawn[name].float() for name in ("q", "k", "v")})
    paged = _cases.paged_prefill("small", [(9, 9)], 2, 1, 64, page_size=8).build(Make("meta"))
    with pytest.raises(NotSupported, match="page_size 8 is not a power of two from 16 to 256"):
        attention_prefill_paged(**paged, impl="hopper")


def positional(drawn):
    """The contract's arguments, in its order."""
    given = {"causal": True, "window_left": -1, "window_right": -1, **drawn}
    return [given.get(name) for name in attention_prefill.contract.names]


def test_a_base_that_is_not_aligned_is_refused(monkeypatch):
    monkeypatch.setitem(features.FEATURES, "wgmma", lambda tensors, by_name: None)
    monkeypatch.setitem(features.FEATURES, "tma", lambda tensors, by_name: None)
    drawn = _cases.prefill("shifted", [(9, 9)], 2, 1, 64).build(Make())
    wide = torch.empty(9, 2, 72, dtype=torch.bfloat16)
    assert attention_prefill.chosen("hopper", *positional({**drawn, "q": wide[:, :, 8:]})) == "hopper"
    with pytest.raises(NotSupported, match="q does not start every row on a multiple of 16 bytes"):
        attention_prefill.pick("hopper", *positional({**drawn, "q": wide[:, :, 4:68]}))


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 4])
def test_slices_of_packed_projections(group):
    lengths = [(300, 300), (77, 77)]
    drawn = _cases.prefill("slices", lengths, 2 * group, 2, 128).build(Make("cuda"))
    want = attention_prefill(**drawn, impl="hopper")
    tokens = len(drawn["q"])
    whole = torch.full((tokens, 2 * group + 4, 128), float("nan"), dtype=torch.bfloat16, device="cuda")
    begin = 0
    for name in ("q", "k", "v"):
        end = begin + drawn[name].shape[1]
        whole[:, begin:end] = drawn[name]
        drawn[name], begin = whole[:, begin:end], end
    out = torch.full((tokens, 2 * group, 192), float("nan"), dtype=torch.bfloat16, device="cuda")
    assert torch.equal(attention_prefill(**drawn, out=out[:, :, 64:], impl="hopper"), want)
    assert out[:, :, :64].isnan().all()


@pytest.mark.gpu
def test_paged_equals_packed_bit_for_bit():
    lengths, page_size = [(200, 700), (300, 300)], 64
    paged = _cases.paged_prefill("paged", lengths, 8, 2, 128, page_size=page_size).build(Make("cuda"))
    rows = [
        (paged["page_table"][request, : -(-length // page_size)].long(), length) for request, (_, length) in enumerate(lengths)
    ]
    k, v = (torch.cat([paged[name][pages].flatten(0, 1)[:n] for pages, n in rows]) for name in ("k_cache", "v_cache"))
    cu_seqlens_k = torch.tensor([0, 700, 1000], dtype=torch.int32, device="cuda")
    packed = attention_prefill(
        paged["q"], k, v, paged["cu_seqlens_q"], cu_seqlens_k, max_seqlen_q=300, max_seqlen_k=700, impl="hopper"
    )
    assert torch.equal(attention_prefill_paged(**paged, impl="hopper"), packed)


@pytest.mark.gpu
def test_a_graph_reads_the_lengths_when_it_is_replayed():
    drawn = _cases.prefill("graph", [(500, 500), (12, 12)], 8, 2, 128, return_lse=True).build(Make("cuda"))
    attention_prefill(**drawn, impl="hopper")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = attention_prefill(**drawn, impl="hopper")
    for ends in ([0, 100, 512], [0, 0, 470], [0, 512, 512]):
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            drawn[name].copy_(torch.tensor(ends, dtype=torch.int32))
        graph.replay()
        want = attention_prefill(**{**drawn, "max_seqlen_q": 512, "max_seqlen_k": 512}, impl="hopper")
        assert all(torch.equal(mine, other) for mine, other in zip(found, want, strict=True))


@pytest.mark.gpu
def test_rows_beyond_two_to_the_31_elements():
    tokens = 2**31 // 1024 + 300
    make = Make("cuda")
    q, k, v = (make.randn(1, 8, 128).expand(tokens, 8, 128) * make.randn(tokens, 1, 1) for _ in range(3))
    ends = torch.tensor([0, tokens - 200, tokens], dtype=torch.int32, device="cuda")
    # A query that sees its own key alone returns its value.
    found = attention_prefill(q, k, v, ends, ends, max_seqlen_q=tokens, max_seqlen_k=tokens, window=(0, -1), impl="hopper")
    assert torch.equal(found, v)
