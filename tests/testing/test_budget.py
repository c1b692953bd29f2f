"""The budget accepts what rounding explains and nothing else; a poisoned, unwritten or unstable output is found."""

import pytest
import torch

from penstock.core.cases import Case
from penstock.core.check import FLOATS
from penstock.core.op import op
from penstock.testing.budget import CODES, check_case, judge, judge_bits, poisoned


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


@pytest.mark.parametrize("dtype", CODES)
def test_codes_may_be_one_off_where_a_tie_was(dtype):
    exact = torch.arange(-126, 127, dtype=torch.int8).view(dtype)
    exact = exact if dtype is torch.int8 else torch.where(exact.float().isnan(), 1.0, exact.float()).to(dtype)
    judge("q", exact.clone(), exact, exact)
    for steps, count, message in (
        (1, 2, None),
        (1, 9, "9 of 253 codes .* explains 3"),
        (2, 1, "more than one off"),
    ):
        got = exact.clone().view(torch.int8)
        got[150 : 150 + count] += steps
        got = got.view(dtype)
        if message is None:
            judge("q", got, exact, exact)
        else:
            with pytest.raises(AssertionError, match=message):
                judge("q", got, exact, exact)


def test_zero_has_two_codes_and_nan_must_agree():
    exact = torch.tensor([0.0, 1.0, float("nan")]).to(torch.float8_e4m3fn)
    judge("q", torch.tensor([-0.0, 1.0, float("nan")]).to(torch.float8_e4m3fn), exact, exact)
    for bad in ([0.0, float("nan"), float("nan")], [0.0, 1.0, 448.0]):
        with pytest.raises(AssertionError, match="more than one off"):
            judge("q", torch.tensor(bad).to(torch.float8_e4m3fn), exact, exact)


def test_bits_must_agree_where_an_operator_is_exact():
    judge_bits("q", torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")]))
    with pytest.raises(AssertionError, match="1 of 8 bytes differ"):
        judge_bits("q", torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))
    with pytest.raises(AssertionError, match="float32, wanted int8"):
        judge_bits("q", torch.zeros(2), torch.zeros(2, dtype=torch.int8))


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
