"""The budget accepts what rounding explains and nothing else; a poisoned, unwritten or unstable output is found."""

import pytest
import torch

from penstock.core.cases import Case
from penstock.core.check import FLOATS
from penstock.core.op import op
from penstock.testing.budget import check_case, judge, poisoned


@op("(Tensor(a!) out, Tensor x, Tensor(b!) total) -> ()", {"x": ("M N", FLOATS), "total": ("N", "x"), "out?": ("M N", "x")})
def halve_for_tests(x, total, *, out=None, impl="auto"):
    """y = x / 2; total += Σ x."""
    launch = halve_for_tests.pick(impl, x, total, out)
    out = torch.empty_like(x) if out is None else out
    launch(out, x, total)
    return out


@halve_for_tests.reference
def _reference(x, total):
    total += x.sum(0)
    return x / 2


def declare(name):
    def wrap(function):
        return halve_for_tests.impl(name, needs=("cpu",))(function)

    return wrap


@declare("good")
def _good(out, x, total):
    total += x.sum(0)
    torch.mul(x, 0.5, out=out)


@declare("one_row_unwritten")
def _unwritten(out, x, total):
    total += x.sum(0)
    out[1:] = x[1:] / 2


@declare("one_value_wrong")
def _wrong(out, x, total):
    _good(out, x, total)
    out[-1, -1] *= 1.02


@declare("forgets_the_total")
def _forgets(out, x, total):
    torch.mul(x, 0.5, out=out)


@declare("unstable")
def _unstable(out, x, total):
    _good(out, x, total)
    out.mul_(1 + torch.rand(()))


CASE = Case("ragged", lambda make: {"x": make.randn(5, 7), "total": make.randn(7)})


def test_a_good_implementation_passes():
    check_case(halve_for_tests, "good", CASE)


@pytest.mark.parametrize(
    ("impl", "message"),
    [
        ("one_row_unwritten", "7 values are not finite, first at \\[0, 0\\]"),
        ("one_value_wrong", "1 of 35 values over budget; at \\[4, 6\\]"),
        ("forgets_the_total", "total of halve_for_tests, forgets_the_total, case ragged"),
        ("unstable", "two runs on the same inputs differ"),
    ],
)
def test_a_bad_implementation_is_found(impl, message):
    with pytest.raises(AssertionError, match=message):
        check_case(halve_for_tests, impl, CASE)


def test_one_wrong_tile_cannot_hide_behind_another():
    exact = torch.randn(256, 256, dtype=torch.float64)
    same = exact.clone()
    same[:128, :128] += 1.0
    got = exact.clone()
    got[200, 200] += 0.5
    judge("whole", got.float(), exact, same)
    with pytest.raises(AssertionError, match=r"at \[200, 200\]"):
        judge("tiled", got.float(), exact, same, tile=128)


def test_infinities_must_agree():
    exact = torch.tensor([1.0, -float("inf")], dtype=torch.float64)
    judge("lse", exact.float(), exact, exact)
    for bad in (torch.tensor([1.0, 0.0]), torch.tensor([-float("inf"), -float("inf")]), torch.tensor([1.0, float("inf")])):
        with pytest.raises(AssertionError):
            judge("lse", bad, exact, exact)


def test_integers_must_be_equal():
    with pytest.raises(AssertionError, match="1 integers differ, first at \\[1\\]"):
        judge("ids", torch.tensor([1, 2]), torch.tensor([1, 3]), torch.tensor([1, 3]))


def test_shapes_must_agree():
    with pytest.raises(AssertionError, match="shape \\[2\\], wanted \\[3\\]"):
        judge("x", torch.zeros(2), torch.zeros(3), torch.zeros(3))


def test_poison_fills_new_memory_and_goes_away():
    with poisoned():
        assert torch.empty(3).isnan().all()
        assert (torch.empty(3, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
    assert not torch.are_deterministic_algorithms_enabled()
