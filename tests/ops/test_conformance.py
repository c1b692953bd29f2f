"""Every implementation of every operator on every case, against the operator's own reference.

A new operator is covered as soon as it stands in the catalogue. CPU: the reference, the CPU path, and Triton through the
interpreter. GPU (`pytest -m gpu`): every implementation, benchmark shapes included.
"""

import pytest
import torch

import penstock.ops as catalogue
from penstock.core.op import NotSupported, Op
from penstock.testing import check_case

OPERATORS = [value for value in vars(catalogue).values() if isinstance(value, Op)]
RUNS = [
    pytest.param(op, impl, case, id=f"{op.name}-{impl}-{case.name}")
    for op in OPERATORS
    for impl in op.implementations
    for case in op.all_cases()
]


def test_every_operator_has_the_awkward_cases():
    for op in OPERATORS:
        names = " ".join(case.name for case in op.all_cases())
        for kind in ("ragged", "empty"):
            assert kind in names, f"{op.name} has no {kind} case: {names}"


@pytest.mark.parametrize(("op", "impl", "case"), RUNS)
def test_case_on_cpu(op, impl, case):
    if case.bench:
        pytest.skip("a benchmark shape, for the GPU")
    if "wgmma" in op.implementations[impl].needs or "tma" in op.implementations[impl].needs:
        pytest.skip("needs Hopper instructions; compiled by the gate, run by pytest -m gpu")
    try:
        check_case(op, impl, case)
    except NotSupported as refusal:
        pytest.skip(str(refusal).splitlines()[1].strip())


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "impl", "case"), RUNS)
def test_case_on_gpu(op, impl, case):
    if op.implementations[impl].needs == ("cpu",):
        pytest.skip("the CPU path")
    try:
        check_case(op, impl, case, device="cuda")
        torch.cuda.synchronize()
    except NotSupported as refusal:
        pytest.skip(str(refusal).splitlines()[1].strip())
    finally:
        # A benchmark shape's reference in float64 takes gigabytes, which the other workers' tests need too.
        torch.cuda.empty_cache()
