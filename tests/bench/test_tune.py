"""The tuner on CPU: kernels run through the interpreter, so its numbers mean nothing and its path is the real one."""

import pytest
import torch

from penstock.bench.run import catalogue
from penstock.bench.tune import tune_operator, write_choices
from penstock.core.cases import Case
from penstock.core.features import interpreting
from penstock.core.tuning import read_table
from penstock.ops.attention import _cases

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _interpreter():
    if not interpreting():
        pytest.skip("the interpreter is for machines without a GPU")


def case(name, *shape):
    return Case(name, lambda make: {"x": make.randn(*shape), "weight": make.randn(shape[-1])})


def test_rms_norm_is_tuned_and_its_table_is_looked_up(tmp_path):
    from penstock.ops.norm.rms_norm_triton import Launch, configure

    op = catalogue()["rms_norm"]
    cases = [case("one", 1, 256), case("three", 3, 256), case("other", 2, 512)]
    choices = tune_operator(op, cases, device=CPU, impls=["triton"], budget=0.01)
    assert [(choice.key, choice.cases) for choice in choices] == [("N=256", ("one", "three")), ("N=512", ("other",))]
    assert all(choice.timed >= 3 and isinstance(choice.config, Launch) for choice in choices)
    assert all(choice.refused == {} for choice in choices)
    path = write_choices(choices, CPU, tmp_path)[0]
    assert path.name == "rms_norm_tuned.json"
    assert read_table(path)["Triton interpreter"].keys() == {"N=256", "N=512"}
    assert not configure.table.exists() or "Triton interpreter" not in read_table(configure.table)


def attention_case(op):
    if op == "attention_decode":
        return _cases.decode("tiny", [70, 300], 2, 1, 16)
    return _cases.prefill("tiny", [(9, 20)], 2, 1, 16)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("attention_decode", "itemsize=2 width=16 rows=16 pages=small"),
        ("attention_prefill", "itemsize=2 width=16 pages=none queries=short causal=True window=False"),
    ],
)
def test_attention_is_tuned(tmp_path, name, key):
    choices = tune_operator(catalogue()[name], [attention_case(name)], device=CPU, impls=["triton"], budget=0.001, limit=1)
    assert [choice.key for choice in choices] == [key]
    assert choices[0].refused == {} and choices[0].timed == 2
    assert write_choices(choices, CPU, tmp_path) == [tmp_path / f"{name.removeprefix('attention_')}_tuned.json"]


def test_a_wrong_candidate_is_refused(monkeypatch):
    from penstock.ops.norm.rms_norm_triton import Launch, configure

    # A tile of three rows is no power of two.
    broken = Launch(rows=3, block=256, num_warps=4)
    monkeypatch.setattr(configure, "candidates", lambda N: [Launch(1, 256, 4), broken])
    choice = tune_operator(catalogue()["rms_norm"], [case("one", 2, 256)], device=CPU, impls=["triton"], budget=0.01)[0]
    assert list(choice.refused) == [str(broken)]
    assert choice.config != broken


def test_an_operator_without_launch_configs_has_nothing_to_tune(double):
    assert tune_operator(double, device=CPU, impls=["right"], budget=0.01) == []
