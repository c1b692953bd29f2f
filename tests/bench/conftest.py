"""A small operator with one right and one wrong implementation, for the gate and the files."""

import pytest
import torch

from penstock.core.cases import Case, Cost, nbytes
from penstock.core.check import FLOATS
from penstock.core.op import Op, op

SPEC = {"x": ("* N", FLOATS), "out?": ("* N", "x")}


@op("(Tensor(a!) out, Tensor x) -> ()", SPEC)
def bench_test_double(x, *, out=None, impl="auto"):
    """Twice x."""
    launch = bench_test_double.pick(impl, x, out)
    out = torch.empty_like(x) if out is None else out
    launch(out, x)
    return out


@bench_test_double.reference
def _reference(x):
    return x * 2


@bench_test_double.impl("right", needs=("cpu",))
def _right(out, x):
    torch.add(x, x, out=out)


@bench_test_double.impl("wrong", needs=("cpu",))
def _wrong(out, x):
    torch.add(x, x, out=out)
    out[..., -1] = 0


@bench_test_double.impl("lazy", needs=("cpu",))
def _lazy(out, x):
    """Leaves the last row unwritten."""
    torch.add(x[:-1], x[:-1], out=out[:-1])


@bench_test_double.impl("narrow", needs=("cpu",), supports=lambda x, out: "N is above 4" if x.shape[-1] > 4 else None)
def _narrow(out, x):
    torch.add(x, x, out=out)


@bench_test_double.impl("broken", needs=("cpu",))
def _broken(out, x):
    raise RuntimeError("the device said no")


@bench_test_double.cost
def _cost(x, **options):
    return Cost(bytes=2 * nbytes(x))


@bench_test_double.cases
def _cases():
    yield Case("small", lambda make: {"x": make.randn(3, 5)})
    yield Case("timed", lambda make: {"x": make.randn(256, 512, dtype=torch.float32)}, bench=True)


@pytest.fixture
def double() -> Op:
    return bench_test_double
