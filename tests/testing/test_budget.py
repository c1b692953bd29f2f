"""The budget accepts what rounding explains and nothing else; a poisoned, unwritten or unstable output is found."""

import pytest
import torch

from penstock.core.cases import Case
from penstock.core.check import FLOATS, anything
from penstock.core.formats import FORMATS, FP8_TENSOR
from penstock.core.op import op
from penstock.testing.budget import CODES, check_case, judge, judge_bits, judge_codes, poisoned

FP8 = torch.float8_e4m3fn


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
def test_a_code_may_differ_only_next_to_a_boundary(dtype):
    """Values from 8 to 15 have codes a whole number apart in both dtypes; 9.5 lies in the middle of two."""
    exact = torch.tensor([8.2, 9.5 - 1e-6, 9.5 + 6e-6, 12.4, 0.0], dtype=torch.float64)
    single = exact.clone()
    single[0] += 1e-6
    right = torch.tensor([8, 9, 10, 12, 0]).to(dtype)
    judge_codes("q", right, exact, exact, single)
    other = torch.tensor([8, 10, 10, 12, 0]).to(dtype)
    judge_codes("q", other, exact, exact, single)
    for at, code in ((0, 9), (0, 7), (2, 9), (3, 11), (3, 13), (1, 11), (4, 1)):
        wrong = right.float()
        wrong[at] = code
        with pytest.raises(AssertionError, match=f"1 of 5 codes .* at .{at}. got {code}, "):
            judge_codes("q", wrong.to(dtype), exact, exact, single)


def test_what_is_rounded_on_the_way_is_allowed_where_it_was_rounded():
    exact = torch.tensor([9.4, 9.4], dtype=torch.float64)
    same = torch.tensor([9.46, 9.4], dtype=torch.float64)
    judge_codes("q", torch.tensor([10, 9], dtype=torch.int8), exact, same, exact)
    with pytest.raises(AssertionError, match="1 of 2 codes"):
        judge_codes("q", torch.tensor([9, 10], dtype=torch.int8), exact, same, exact)


def test_zero_has_two_codes_nan_must_agree_and_codes_saturate():
    exact = torch.tensor([0.0, 448.0, float("nan")], dtype=torch.float64)
    judge_codes("q", torch.tensor([-0.0, 448.0, float("nan")]).to(FP8), exact, exact, exact)
    for bad in ([0.0, float("nan"), float("nan")], [0.0, 448.0, 448.0], [0.0, 416.0, float("nan")]):
        with pytest.raises(AssertionError, match="1 of 3 codes"):
            judge_codes("q", torch.tensor(bad).to(FP8), exact, exact, exact)


@op(
    "(Tensor(a!) out, Tensor x, Tensor(b!) held, str format) -> ()",
    {"x": ("M N", FLOATS), "held": ("M N", (*FLOATS, FP8)), "format": anything, "out?": ("M N", (FP8, torch.int8))},
)
def code_for_tests(x, held, *, format, out=None, impl="auto"):
    """Codes of x / 3, returned and held."""
    launch = code_for_tests.pick(impl, x, held, format.name, out)
    out = torch.empty(x.shape, dtype=format.dtype) if out is None else out
    launch(out, x, held, format.name)
    return out


@code_for_tests.reference
def _codes(x, held, format):
    codes = FORMATS[format].encode(x.to(torch.promote_types(x.dtype, torch.float32)) / 3)
    held.copy_(codes)
    return codes


def _off(name, change):
    @code_for_tests.impl(name, needs=("cpu",))
    def _run(out, x, held, format):
        codes = (x.float() / 3).to(FP8)
        held.copy_(codes)
        out.copy_(codes)
        change(out.view(torch.int8), held.view(torch.int8))


_off("right", lambda out, held: None)
_off("one_code_off", lambda out, held: out[2, 1].add_(1))
_off("one_held_code_off", lambda out, held: held[2, 1].add_(1))


def test_returned_and_held_codes_are_judged_before_rounding():
    def build(make):
        return {"x": make.randn(4, 5), "held": make.randn(4, 5).to(FP8), "format": FP8_TENSOR}

    case = Case("ragged", build)
    before = dict(FORMATS)
    check_case(code_for_tests, "right", case)
    for impl, name in (("one_code_off", "code_for_tests.0."), ("one_held_code_off", "held")):
        with pytest.raises(AssertionError, match=f"{name} of code_for_tests.* 1 of 20 codes .* at .2, 1."):
            check_case(code_for_tests, impl, case)
    assert before == FORMATS


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
