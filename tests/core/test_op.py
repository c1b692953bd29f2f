"""Op: choice, refusals, memory of both, torch.compile, and the cost of a call."""

import statistics
import time

import pytest
import torch

import penstock.ops as catalogue
from penstock.core import op as op_module
from penstock.core.cases import Make
from penstock.core.check import FLOATS, ContractError, positive
from penstock.core.op import NotSupported, Op, op
from penstock.ops import rms_norm

SPEC = {"x": ("* N", FLOATS), "out?": ("* N", "x"), "factor": positive}


@op("(Tensor(a!) out, Tensor x, float factor) -> ()", SPEC)
def scaled_for_tests(x, *, factor=2.0, out=None, impl="auto"):
    """y = x · factor."""
    launch = scaled_for_tests.pick(impl, x, out, factor)
    out = torch.empty_like(x) if out is None else out
    launch(out, x, factor)
    return out


@scaled_for_tests.reference
def _reference(x, factor):
    return x * factor


@scaled_for_tests.impl("never", needs=("triton",))
def _never(out, x, factor):
    raise AssertionError("must not be launched on this machine")


@scaled_for_tests.impl("even", needs=("cpu",), supports=lambda x, **_: "N is odd" if x.shape[-1] % 2 else None)
def _even(out, x, factor):
    torch.mul(x, factor, out=out)


def test_auto_takes_the_first_that_supports_the_call():
    x = torch.randn(3, 4)
    assert scaled_for_tests.chosen("auto", x, None, 2.0) == "even"
    assert torch.equal(scaled_for_tests(x), x * 2)
    assert scaled_for_tests.chosen("auto", x[:, :3], None, 2.0) == "reference"
    assert torch.equal(scaled_for_tests(x[:, :3], factor=3.0), x[:, :3] * 3)


def test_a_named_implementation_never_falls_back():
    with pytest.raises(NotSupported) as refusal:
        scaled_for_tests(torch.randn(3, 3), impl="even")
    assert str(refusal.value).splitlines()[:2] == [
        "scaled_for_tests: no implementation takes this call",
        "  even       N is odd",
    ]


def test_an_unknown_implementation_lists_the_known():
    with pytest.raises(ContractError, match="`impl` must be one of auto, never, even, reference, got 'fast'"):
        scaled_for_tests(torch.randn(2, 2), impl="fast")


def test_on_a_gpu_the_reference_must_be_named_and_every_reason_is_printed():
    x = torch.empty(2, 3, device="meta", dtype=torch.float64)
    with pytest.raises(NotSupported) as refusal:
        scaled_for_tests(x)
    text = str(refusal.value)
    assert "never      float64 is for the reference" in text
    assert "even       needs CPU tensors, these are on meta" in text
    assert "reference  on a GPU it must be asked for by name" in text


def test_a_refused_call_is_not_remembered():
    before = len(scaled_for_tests._picked)
    for _ in range(2):
        with pytest.raises(ContractError):
            scaled_for_tests(torch.randn(2, 2), factor=-1.0)
    assert len(scaled_for_tests._picked) == before


def test_a_list_where_a_tensor_belongs_is_named():
    with pytest.raises(ContractError, match="`x` must be a tensor, got list"):
        scaled_for_tests.pick("auto", [1.0], None, 2.0)


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(op_module, "MEMO_LIMIT", 8)
    for n in range(1, 40):
        scaled_for_tests(torch.randn(n, 2))
    assert len(scaled_for_tests._picked) <= 8


def test_strides_and_dtype_are_part_of_the_signature():
    x = torch.randn(4, 4)
    scaled_for_tests(x)
    count = len(scaled_for_tests._picked)
    scaled_for_tests(x.t())
    scaled_for_tests(x.double())
    assert len(scaled_for_tests._picked) == count + 2


def test_alignment_is_part_of_the_signature_where_it_is_asked_for():
    def aligned_for_tests(x, *, out=None, impl="auto"):
        """y = x."""

    aligned = op("(Tensor(a!) out, Tensor x) -> ()", {"x": ("N", FLOATS)}, alignment=("x",))(aligned_for_tests)

    @aligned.impl("first", needs=("cpu",), supports=lambda x: "is not aligned" if x.data_ptr() % 16 else None)
    def first(out, x):
        raise AssertionError("never launched")

    x = torch.randn(33)
    assert aligned.pick("first", x[:32]) is first
    assert aligned.pick("first", x[:32].clone()) is first
    assert len(aligned._picked) == 1
    with pytest.raises(NotSupported, match="is not aligned"):
        aligned.pick("first", x[1:])


def test_a_schema_without_a_contract_argument_is_refused():
    def shortened_for_tests(x, *, out=None, impl="auto"):
        """y = x."""

    with pytest.raises(ValueError, match=r"the schema lacks the contract's arguments \['factor'\]"):
        op("(Tensor(a!) out, Tensor x) -> ()", SPEC)(shortened_for_tests)


def test_an_implementation_with_an_unknown_need_is_refused():
    with pytest.raises(ValueError, match="unknown features"):
        scaled_for_tests.impl("other", needs=("warp_drive",))
    with pytest.raises(ValueError, match="'even' is taken"):
        scaled_for_tests.impl("even", needs=("cpu",))


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_sees_one_operator_that_mutates_its_output(dynamic):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def function(x, weight):
        return rms_norm(x * 2, weight, eps=1e-5) + 1

    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    for rows in (3, 5):
        x, weight = torch.randn(rows, 64), torch.randn(64)
        assert torch.equal(compiled(x, weight), function(x, weight))
    assert any("penstock.rms_norm" in str(node.target) for node in graphs[0].graph.nodes)


def test_torch_compile_of_a_bad_call_still_raises_the_contract_error():
    compiled = torch.compile(lambda x, weight: rms_norm(x, weight), fullgraph=True, backend="eager")
    with pytest.raises(ContractError, match=r"`weight` must be \[N=64\], got \[63\]"):
        compiled(torch.randn(2, 64), torch.randn(63))


def test_the_library_operator_passes_torchs_own_checks():
    x, weight = torch.randn(3, 32), torch.randn(32)
    torch.library.opcheck(
        rms_norm.library_op,
        ("cpu", torch.empty_like(x), x, weight, 1e-6, 0.0),
        test_utils=("test_schema", "test_faketensor"),
    )


def operators():
    return [value for value in vars(catalogue).values() if isinstance(value, Op)]


@pytest.mark.parametrize("operator", operators(), ids=lambda operator: operator.name)
def test_contract_and_choice_cost_at_most_five_microseconds(operator, monkeypatch, capsys):
    case = next(case for case in operator.all_cases() if not case.bench and "empty" not in case.name)
    calls = []
    pick = operator.pick
    monkeypatch.setattr(operator, "pick", lambda *arguments: (calls.append(arguments), pick(*arguments))[1])
    operator(**case.build(Make("cpu")))
    monkeypatch.undo()
    samples = []
    # The least of many short rounds: what the call costs when nobody else has the core, which may take a while to see.
    end = time.monotonic() + 5
    while len(samples) < 200 or (min(samples) > 5.0 and time.monotonic() < end):
        start = time.perf_counter()
        for _ in range(50):
            operator.pick(*calls[0])
        samples.append((time.perf_counter() - start) / 50 * 1e6)
    with capsys.disabled():
        print(f"\n{operator.name}: contract and choice {min(samples):.2f} µs, median {statistics.median(samples):.2f}", end="")
    assert min(samples) <= 5.0


def test_availability_gives_a_reason_for_what_does_not_run():
    reasons = rms_norm.availability(torch.device("cpu"))
    assert reasons["cpu"] == ""
    assert "TRITON_INTERPRET" in reasons["triton"] or "CUDA" in reasons["triton"]


def test_the_operator_keeps_the_functions_name_and_docstring():
    assert rms_norm.__name__ == "rms_norm"
    assert rms_norm.__doc__.startswith("Root-mean-square normalisation")
