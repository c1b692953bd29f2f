"""The recurrent mixers beyond the shared cases: pieces equal the whole, steps equal the scan, slots, refusals, compilation."""

import pytest
import torch

from penstock.core.check import ContractError
from penstock.core.op import NotSupported
from penstock.ops import causal_conv1d, causal_conv1d_update, selective_scan, ssd_prefill, ssm_state_update
from penstock.ops.recurrent.ssd_prefill_triton import MOST_SEGMENTS, segment_length

GPU = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = pytest.mark.parametrize(("impl", "device"), [("cpu", "cpu"), ("triton", GPU)])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def cumulative(*lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()


def mamba2(tokens, H=2, P=16, G=1, N=16):
    return {
        "x": torch.randn(tokens, H, P),
        "dt": torch.randn(tokens, H),
        "A": -torch.rand(H) - 0.1,
        "B": torch.randn(tokens, G, N),
        "C": torch.randn(tokens, G, N),
        "D": torch.randn(H),
        "dt_bias": torch.randn(H) - 2,
    }


PACKED = ("x", "dt", "B", "C", "z")


def rows(arguments, first, last):
    return {name: value[first:last] if name in PACKED else value for name, value in arguments.items()}


def on(device, arguments):
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def close(got, wanted):
    torch.testing.assert_close(got.cpu(), wanted.cpu(), rtol=2e-5, atol=2e-5)


@RUNS
def test_a_prompt_in_pieces_is_the_prompt(impl, device):
    whole = on(device, mamba2(70) | {"z": torch.randn(70, 2, 16)})
    cu = cumulative(70).to(device)
    y, final = ssd_prefill(**whole, cu_seqlens=cu, impl=impl)
    states, pieces = torch.zeros_like(final), []
    for first, last in ((0, 1), (1, 67), (67, 70)):
        part = rows(whole, first, last)
        piece, states = ssd_prefill(**part, cu_seqlens=cumulative(last - first).to(device), initial_states=states, impl=impl)
        pieces.append(piece)
    close(torch.cat(pieces), y)
    close(states, final)


@RUNS
def test_steps_are_the_scan(impl, device):
    whole = on(device, mamba2(5, H=4, G=2) | {"z": torch.randn(5, 4, 16)})
    y, final = ssd_prefill(**whole, cu_seqlens=cumulative(5).to(device), dt_limit=(0.05, 0.2), impl="reference")
    state = torch.zeros(3, 4, 16, 16, device=device)
    slot = torch.tensor([2], dtype=torch.int32, device=device)
    for t in range(5):
        step = ssm_state_update(state, **rows(whole, t, t + 1), dt_limit=(0.05, 0.2), state_indices=slot, impl=impl)
        close(step[0], y[t])
    close(state[2], final[0])
    assert (state[:2] == 0).all()


@RUNS
def test_convolution_in_pieces_and_by_steps(impl, device):
    x, weight, bias = torch.randn(9, 20, device=device), torch.randn(20, 4, device=device), torch.randn(20, device=device)
    wanted = causal_conv1d(x, weight, bias, cumulative(9).to(device), impl="reference")
    state = torch.zeros(2, 20, 3, device=device)
    slot = torch.tensor([1], dtype=torch.int32, device=device)
    pieces = [
        causal_conv1d(x[a:b], weight, bias, cumulative(b - a).to(device), state=state, state_indices=slot, impl=impl)
        for a, b in ((0, 2), (2, 3), (3, 7))
    ]
    pieces += [causal_conv1d_update(x[t : t + 1], weight, bias, state, state_indices=slot, impl=impl) for t in (7, 8)]
    close(torch.cat(pieces), wanted)
    close(state[1], x[6:].T)
    assert (state[0] == 0).all()


@RUNS
def test_convolution_is_torchs(impl, device):
    x, weight = torch.randn(11, 8, device=device), torch.randn(8, 3, device=device)
    y = causal_conv1d(x, weight, None, cumulative(11).to(device), activation=None, impl=impl)
    wanted = torch.nn.functional.conv1d(x.T[None], weight[:, None], padding=2, groups=8)[0, :, :11].T
    close(y, wanted)


@RUNS
def test_a_constant_step_is_a_geometric_sum(impl, device):
    # With step · A = -ln 2 and x = B = C = 1 every token adds one to half of what there is.
    T, step = 6, 0.5
    ones = torch.ones(T, 1, 16, device=device)
    wanted = torch.tensor([step * sum(0.5**k for k in range(t + 1)) for t in range(T)])
    A = torch.full((1,), -2 * 0.6931471805599453, device=device)
    B = torch.zeros(T, 1, 16, device=device)
    B[..., 0] = 1
    y, final = ssd_prefill(ones, torch.full((T, 1), step, device=device), A, B, B, cumulative(T).to(device), impl=impl)
    close(y[:, 0, 0], wanted)
    close(final[0, 0, :, 0], wanted[-1].expand(16))
    x, dt = torch.ones(T, 16, device=device), torch.full((T, 16), step, device=device)
    y, _ = selective_scan(x, dt, A.expand(16, 16).contiguous(), B, B, cumulative(T).to(device), impl=impl)
    close(y[:, 3], wanted)


@RUNS
def test_tiny_steps_are_not_lost(impl, device):
    # softplus(-30) = 9.4e-14, which log(1 + exp(-30)) in float32 makes 0
    x, B = torch.ones(1, 1, 16, device=device), torch.ones(1, 1, 16, device=device)
    dt = torch.full((1, 1), -30.0, device=device)
    y, _ = ssd_prefill(x, dt, -torch.ones(1, device=device), B, B, cumulative(1).to(device), dt_softplus=True, impl=impl)
    torch.testing.assert_close(y.cpu(), torch.full((1, 1, 16), 16 * 9.357623e-14), rtol=1e-5, atol=0)


@RUNS
def test_padding_may_hold_anything(impl, device):
    arguments = on(device, mamba2(9))
    y, final = ssd_prefill(**arguments, cu_seqlens=cumulative(4, 3).to(device), impl=impl)
    for name in ("x", "dt", "B", "C"):
        arguments[name][7:] = float("nan")
    again, states = ssd_prefill(**arguments, cu_seqlens=cumulative(4, 3).to(device), impl=impl)
    assert torch.equal(again, y) and torch.equal(states, final)
    assert (y[7:] == 0).all()


def test_dt_softplus_follows_the_bias_unless_told():
    whole, cu = mamba2(4), cumulative(4)
    told, _ = ssd_prefill(**whole, cu_seqlens=cu, dt_softplus=True)
    silent, _ = ssd_prefill(**whole, cu_seqlens=cu)
    without, _ = ssd_prefill(**whole, cu_seqlens=cu, dt_softplus=False)
    assert torch.equal(told, silent) and not torch.equal(told, without)


def test_segments_fill_the_device_and_are_whole_chunks():
    for total, programs, slots in ((8192, 80, 264), (8192, 5000, 264), (100, 2, 8), (1 << 20, 1, 4000), (0, 3, 9)):
        length = segment_length(total, programs, slots, 64)
        assert length % 64 == 0 and length >= 64
        assert -(-total // length) <= max(1, min(slots // programs, MOST_SEGMENTS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": torch.ones(3)}, "`A` must be"),
        ({"B": torch.ones(4, 1, 8)}, "`C` must be"),
        ({"B": torch.ones(4, 3, 16), "C": torch.ones(4, 3, 16)}, "`B` must have a number of groups that divides H=2, got 3"),
        ({"initial_states": torch.ones(2, 2, 16, 16)}, "`initial_states` must be"),
        ({"dt_limit": (0.2, 0.1)}, "`dt_max` must be at least dt_min=0.2, got 0.1"),
        ({"dt_limit": (-1.0, 0.1)}, "`dt_min` must be a number >= 0"),
        ({"dt_softplus": "yes"}, "`dt_softplus` must be True or False"),
    ],
)
def test_errors_of_ssd_prefill_name_the_argument(change, message):
    with pytest.raises(ContractError, match=message):
        ssd_prefill(**mamba2(4) | {"cu_seqlens": cumulative(4)} | change)


def test_errors_of_states_name_the_argument():
    x, weight = torch.ones(2, 8), torch.ones(8, 4)
    with pytest.raises(ContractError, match=r"`state` must be \[S, C, W-1=3\], got \[2, 8, 4\]"):
        causal_conv1d_update(x, weight, None, torch.ones(2, 8, 4))
    with pytest.raises(ContractError, match="`state` must have a slot for each of 2 requests"):
        causal_conv1d_update(x, weight, None, torch.ones(1, 8, 3))
    with pytest.raises(ContractError, match="`state_indices` must be None without `state`"):
        causal_conv1d(x, weight, None, cumulative(2), state_indices=torch.zeros(1, dtype=torch.int32))
    with pytest.raises(ContractError, match="`activation` must be 'silu' or None, got 'gelu'"):
        causal_conv1d(x, weight, None, cumulative(2), activation="gelu")
    with pytest.raises(ContractError, match="`state` must have a slot for each of 4 requests"):
        ssm_state_update(torch.ones(3, 2, 16, 16), **mamba2(4))
    with pytest.raises(ContractError, match="`B` must have a number of groups that divides Ch=8, got 3"):
        wide = torch.ones(2, 3, 4)
        selective_scan(x, x, -torch.ones(8, 4), wide, wide, cumulative(2))


def test_what_a_program_cannot_hold_is_refused_with_a_reason():
    with pytest.raises(NotSupported, match=r"P up to 128, even above 64, .* these are 144 and 16"):
        ssd_prefill(**mamba2(4, P=144), cu_seqlens=cumulative(4), impl="triton")


def test_compiled_function_agrees():
    def function(x, dt, A, B, C, cu, state, conv_state, weight):
        mixed = causal_conv1d(x * 2, weight, None, cu, state=conv_state)
        heads = mixed.view(-1, 2, 16)
        y, final = ssd_prefill(heads, dt, A, B, C, cu)
        step = ssm_state_update(state, heads[:1], dt[:1], A, B[:1], C[:1])
        return y + 1, final, step, state * 2, conv_state + 1

    def inputs():
        torch.manual_seed(1)
        own = mamba2(5)
        states = torch.randn(1, 2, 16, 16), torch.randn(1, 32, 3)
        return [torch.randn(5, 32), own["dt"], own["A"], own["B"], own["C"], cumulative(5), *states, torch.randn(32, 4)]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*inputs()), function(*inputs()), strict=True):
        assert torch.equal(got, want)
