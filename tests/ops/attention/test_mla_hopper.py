"""The Hopper kernel of latent attention: its source on CPU threads against the reference, its configs, what it refuses."""

from contextlib import nullcontext

import pytest
import torch

from penstock.core import features
from penstock.core.cases import Make
from penstock.core.op import NotSupported
from penstock.ops import attention_decode_plan, mla_decode
from penstock.ops.attention import mla
from penstock.testing.budget import judge

pytest.importorskip("triton")

from penstock.core.device import H200
from penstock.ops.attention import _load_hopper, _softmax_hopper, _tiles_hopper, decode_plan, mla_hopper
from tests.ops.attention import gluon_on_threads

CASES = {case.name: case for case in mla_decode.all_cases() if not case.bench}


class Kernel:
    """Stands in for the compiled kernel: a launch runs its source."""

    def __init__(self):
        tiles = gluon_on_threads.functions_of(_tiles_hopper)
        softmax = gluon_on_threads.functions_of(_softmax_hopper)
        load = gluon_on_threads.functions_of(_load_hopper, tiles=tiles)
        others = {"tiles": tiles, "softmax": softmax, "load": load, "gdc_launch_dependents": lambda: None}
        self.source = gluon_on_threads.functions_of(mla_hopper, **others)
        self.launches = []

    def __getitem__(self, grid):
        def launch(*arguments, C, num_warps, maxnreg):
            self.launches.append((grid, C.tile))
            arguments = [gluon_on_threads.as_argument(value) for value in arguments]
            gluon_on_threads.run(self.source._mla_kernel, grid, (*arguments, C.tile))

        return launch


@pytest.fixture
def emulated(monkeypatch):
    torch.manual_seed(0)
    kernel = Kernel()
    monkeypatch.setattr(mla_hopper, "_mla_kernel", kernel)
    return kernel


def call(drawn, config=None):
    """(out, lse) of one call through the emulated kernel."""
    given = {"scale": None, "plan": None, **drawn}
    out = torch.full_like(drawn["q_latent"], float("nan"), memory_format=torch.contiguous_format)
    lse = torch.full(drawn["q_latent"].shape[:2], float("nan"))
    with nullcontext() if config is None else mla_hopper.configure.forced(config):
        mla_decode.implementations["hopper"].launch(out, lse, *[given.get(each.name) for each in mla_decode.arguments[2:]])
    return out, lse


def check(drawn, config=None):
    """One call through the emulated kernel against the reference, by the budget of the conformance tests."""
    drawn = {**drawn, "return_lse": True}
    wide = {n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in drawn.items()}
    exact, same = mla_decode(**wide, impl="reference"), mla_decode(**drawn, impl="baseline")
    found = call(drawn, config)
    for name, *results in zip(("out", "lse"), found, exact, same, strict=True):
        judge(name, *results)
    return found


def case(seqlens, heads, **options):
    return mla._case("drawn", seqlens, heads, **options).build(Make())


ACCEPTED = ["ragged", "ragged_128_heads", "ragged_24_heads_float16", "ragged_32_heads_q_len_3"]


def test_it_takes_every_case_of_its_widths():
    wide = [n for n, each in CASES.items() if each.build(Make("meta"))["cache"].shape[2] == 576]
    taken = [n for n, each in CASES.items() if mla._hopper_supports(**each.build(Make("meta"))) is None]
    assert taken == wide == ACCEPTED


@pytest.mark.parametrize("name", ACCEPTED)
def test_cases(emulated, name):
    check(CASES[name].build(Make()))
    (grid, tile), *_ = emulated.launches
    heads, q_len = CASES[name].build(Make("meta"))["q_latent"].shape[1], 3 if "q_len_3" in name else 1
    assert grid == (-(-heads * q_len // 64), max(1, 4 // -(-heads * q_len // 64))) and tile.group == (32 if q_len == 3 else 64)


@pytest.mark.parametrize("config", list(mla_hopper.candidates(1)), ids=str)
def test_configs(emulated, config):
    check(case([300, 65], 4, page_size=32), config)
    assert emulated.launches[0][1].scores_first == config.scores_first


def test_configs_fit_in_shared_memory():
    for config in mla_hopper.candidates(1):
        tile = mla_hopper.shape_of(config, 128, 1, 64)
        assert tile.shared + 8 * (2 * tile.arrivals + 8) + 1024 <= H200.shared_memory


@pytest.mark.parametrize("programs", [1, 30])
def test_schedules(emulated, monkeypatch, programs):
    """All requests in one program, and programs with nothing to do."""
    monkeypatch.setattr(decode_plan, "num_programs", lambda *shape: programs)
    check(case([64, 0, 129, 1, 200], 2))
    assert emulated.launches[0][0] == (1, programs)


def test_a_plan_of_other_lengths_reads_no_page_that_is_not_there(emulated):
    """Lengths may shrink after the plan was made; entries of the table beyond them hold anything."""
    drawn = case([300, 70], 2)
    shape = {"num_heads_q": 2, "num_heads_kv": 1, "head_dim": 576, "page_size": 64, "q_len": 1}
    plan = attention_decode_plan(drawn["seqlens_k"], **shape, impl="triton")
    drawn["seqlens_k"] = torch.tensor([250, 70], dtype=torch.int32)
    drawn["cache"][drawn["page_table"][0, 3], 250 - 192 :] = float("nan")
    drawn["page_table"][0, 4:] = drawn["page_table"][1, 2:] = -(2**31)
    check({**drawn, "plan": plan})


def test_strides(emulated):
    drawn = case([70, 3], 2)
    want = call(drawn)[0]
    joined = torch.full((2, 2, 600), float("nan"), dtype=torch.bfloat16)
    joined[..., :576] = torch.cat([drawn["q_latent"], drawn["q_rope"]], -1)
    latent = drawn["q_latent"].transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(call({**drawn, "q_latent": joined[..., :512], "q_rope": joined[..., 512:576]})[0], want)
    assert torch.equal(call({**drawn, "q_latent": latent})[0], want)


def test_keys_that_overtake_each_other(emulated):
    """The maximum grows from tile to tile by more than float16 can hold the quotient of, and then falls."""
    drawn = case([330], 2, scale=1.0)
    sizes = torch.tensor([0.05, 0.3, 1.0, 2.0, 0.5]).repeat_interleave(64)
    cells = drawn["cache"][drawn["page_table"][0].long()].flatten(0, 1)[:320]
    drawn["cache"][drawn["page_table"][0, :5].long()] = (cells * sizes[:, None].bfloat16()).view(5, 64, 576)
    check(drawn)


@pytest.mark.parametrize(("heads", "q_len", "taken"), [(16, 1, "triton"), (16, 4, "hopper"), (128, 1, "hopper")])
def test_auto_takes_this_kernel_where_its_64_rows_are_filled(monkeypatch, heads, q_len, taken):
    drawn = mla._case("filled", [9, 9, 9], heads, q_len=q_len).build(Make("meta"))
    for need in ("wgmma", "tma", "triton"):
        monkeypatch.setitem(features.FEATURES, need, lambda tensors, by_name: None)
    given = {"q_len": q_len, **drawn}
    assert mla_decode.chosen("auto", *[given.get(name) for name in mla_decode.contract.names]) == taken
    assert mla_decode.chosen("hopper", *[given.get(name) for name in mla_decode.contract.names]) == "hopper"


def test_what_it_does_not_take_is_refused(monkeypatch):
    drawn = mla._case("plain", [9, 9], 16).build(Make("meta"))

    def positional(changes):
        given = {"q_len": 1, **drawn, **changes}
        return [given.get(name) for name in mla_decode.contract.names]

    def refused(reason, **changes):
        with pytest.raises(NotSupported, match=reason):
            mla_decode.pick("hopper", *positional(changes))

    def of(heads, Dc=512, Dr=64, **options):
        return mla._case("other", [9, 9], heads, Dc, Dr, **options).build(Make("meta"))

    assert mla_decode.chosen("hopper", *positional({})) == "hopper"
    assert mla_decode.chosen("hopper", *positional(of(128, q_len=3))) == "hopper"
    refused("q_latent is float32; the kernel multiplies float16 or bfloat16", **of(16, dtype=torch.float32))
    refused(r"Dc \+ Dr = 256 \+ 64 is not 512 \+ 64", **of(16, 256))
    refused(r"Dc \+ Dr = 512 \+ 32 is not 512 \+ 64", **of(16, 512, 32))
    refused("24 heads of q_len 2 do not fill blocks of 64 rows", **of(24, q_len=2))
    refused("page_size 8 is not a power of two from 16 to 256", **of(16, page_size=8))
    wide = torch.empty(2, 16, 580, dtype=torch.bfloat16, device="meta")
    refused("q_latent does not start every row on a multiple of 16 bytes", q_latent=wide[:, :, :512])
    monkeypatch.setitem(features.FEATURES, "wgmma", lambda tensors, by_name: None)
    monkeypatch.setitem(features.FEATURES, "tma", lambda tensors, by_name: None)
    drawn = mla._case("plain", [9, 9], 16).build(Make())
    wide = torch.empty(2, 16, 584, dtype=torch.bfloat16)
    assert mla_decode.chosen("hopper", *positional({"q_latent": wide[:, :, 8:520]})) == "hopper"
    refused("q_latent does not start every row on a multiple of 16 bytes", q_latent=wide[:, :, 4:516])


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 128])
def test_the_same_bits_every_time(heads):
    drawn = mla._case("bits", [4096, 777, 20000], heads, return_lse=True).build(Make("cuda"))
    want = mla_decode(**drawn, impl="hopper")
    for _ in range(20):
        assert all(torch.equal(mine, other) for mine, other in zip(mla_decode(**drawn, impl="hopper"), want, strict=True))
