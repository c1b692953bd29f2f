"""Contracts: what passes, and what each failure says."""

import pytest
import torch

from penstock.core.check import DENSE, FLOATS, Contract, ContractError, boolean, count, one_of, optional, positive

SPEC = {
    "x": ("* N", FLOATS),
    "weight": ("N", ("x", torch.float32)),
    "offsets?": ("B+1", torch.int32),
    "gate?": ("B 2*N", "x", DENSE),
    "eps": positive,
}


def check(**changes):
    values = {"x": torch.ones(2, 3, 8), "weight": torch.ones(8), "offsets": None, "gate": None, "eps": 1e-6, **changes}
    return Contract("norm", SPEC).check(list(values.values()))


def test_good_calls_pass_and_come_back_by_name():
    named = check(offsets=torch.zeros(5, dtype=torch.int32), gate=torch.ones(4, 16))
    assert named["weight"].shape == (8,)
    check(x=torch.ones(8, dtype=torch.bfloat16), weight=torch.ones(8, dtype=torch.bfloat16))
    check(x=torch.ones(0, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(7)}, "`weight` must be [N=8], got [7]"),
        ({"weight": torch.ones(1, 8)}, "`weight` must be [N=8], got [1, 8]"),
        ({"weight": torch.ones(8, dtype=torch.float16)}, "`weight` must be float32, got float16"),
        ({"x": torch.ones(2, 8, dtype=torch.int32)}, "`x` must be bfloat16 or float16 or float32 or float64, got int32"),
        ({"x": torch.tensor(1.0)}, "`x` must be [*, N], got []"),
        ({"x": [1.0]}, "`x` must be a tensor, got list"),
        ({"weight": None}, "`weight` must be a tensor, got NoneType"),
        ({"offsets": torch.zeros(0, dtype=torch.int32)}, "`offsets` must be [B+1], got [0]"),
        ({"gate": torch.ones(4, 15)}, "`gate` must be [B, 2*N=16], got [4, 15]"),
        ({"gate": torch.ones(16, 4).t()}, "`gate` must have stride 1 in its last dimension, got strides [1, 4]"),
        ({"weight": torch.ones(8, device="meta")}, "`weight` must be on cpu like the other tensors, got meta"),
        ({"eps": 0.0}, "`eps` must be a positive number, got 0.0"),
        ({"eps": float("nan")}, "`eps` must be a positive number, got nan"),
    ],
)
def test_bad_calls_name_the_argument_the_wanted_and_the_got(changes, message):
    with pytest.raises(ContractError) as failure:
        check(**changes)
    assert str(failure.value).startswith(f"norm: {message}")


def test_the_error_lists_every_tensor():
    with pytest.raises(ContractError) as failure:
        check(x=torch.ones(4, 8).t().contiguous().t(), weight=torch.ones(9))
    assert str(failure.value).splitlines()[1:] == [
        "  x       float32[4, 8] on cpu, strides [1, 4]",
        "  weight  float32[9] on cpu",
    ]


def test_leading_dimensions_agree():
    contract = Contract("add", {"x": ("* N", FLOATS), "residual": ("* N", "x")})
    with pytest.raises(ContractError, match=r"`residual` must be \[2, 3, N=8\], got \[3, 2, 8\]"):
        contract.check([torch.ones(2, 3, 8), torch.ones(3, 2, 8)])


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        (boolean, [True, False], [1, None, "yes"]),
        (count, [0, 7], [-1, 1.0, True, None]),
        (positive, [1, 0.5], [0, -1, float("inf"), True, None]),
        (one_of("tanh", "none"), ["tanh"], ["erf", None]),
        (optional(positive), [None, 2.0], [0]),
    ],
)
def test_option_rules(rule, good, bad):
    assert all(rule(value) is None for value in good)
    assert all(isinstance(rule(value), str) for value in bad)


def test_a_contract_that_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match="cannot read the dimension 'N-1'"):
        Contract("norm", {"x": ("N-1", FLOATS)})
