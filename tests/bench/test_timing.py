"""Alternation and ratios on contestants whose times are known: they sleep."""

import time

import pytest
import torch

from penstock.bench.timing import MIN_ROUNDS, Series, measure, percentile, ratio

CPU = torch.device("cpu")


def sleeper(milliseconds, log=None, name=""):
    def call():
        if log is not None:
            log.append(name)
        time.sleep(milliseconds / 1e3)

    return call


def test_a_contestant_that_takes_twice_as_long_has_ratio_two():
    series = measure({"fast": [sleeper(20)], "slow": [sleeper(40)]}, CPU, budget=0.9)
    assert ratio(series["slow"], series["fast"]) == pytest.approx(2, rel=0.15)
    assert ratio(series["fast"], series["slow"]) == pytest.approx(0.5, rel=0.15)
    assert 20000 <= series["fast"].median_us < 26000
    assert series["fast"].p10_us <= series["fast"].median_us <= series["fast"].p90_us
    assert series["fast"].method == "wall clock"


def test_contestants_alternate_and_the_first_one_moves_on():
    log = []
    series = measure({"a": [sleeper(2, log, "a")], "b": [sleeper(2, log, "b")]}, CPU, budget=0.01)
    rounds = len(series["a"].samples_us)
    assert rounds == len(series["b"].samples_us) == MIN_ROUNDS
    timed = log[-2 * rounds :]
    assert timed == ["a", "b", "b", "a", "a", "b", "b", "a", "a", "b"]


def test_every_input_set_is_used_in_turn():
    used = []
    calls = [lambda i=i: (used.append(i), time.sleep(1e-4)) for i in range(5)]
    series = measure({"a": calls}, CPU, budget=0.05)["a"]
    assert series.calls >= 5 and series.calls % 5 == 0
    assert used == [i % 5 for i in range(len(used))]


def test_long_calls_still_have_five_rounds():
    series = measure({"a": [sleeper(20)]}, CPU, budget=0.001)["a"]
    assert len(series.samples_us) == MIN_ROUNDS
    assert series.calls == 1


def test_contestants_need_the_same_input_sets():
    with pytest.raises(ValueError, match=r"every contestant needs a call for every input set, got \{'a': 1, 'b': 2\}"):
        measure({"a": [sleeper(1)], "b": [sleeper(1)] * 2}, CPU)
    with pytest.raises(ValueError, match=r"got \{\}"):
        measure({}, CPU)


def test_statistics():
    series = Series("a", tuple(range(1, 12)), "wall clock", 1)
    assert (series.median_us, series.p10_us, series.p90_us) == (6, 2, 10)
    assert percentile([1.0, 2.0], 0.25) == 1.25
    peer = Series("b", tuple(3 * value for value in range(1, 12)), "wall clock", 1)
    assert ratio(peer, series) == 3


@pytest.mark.gpu
def test_graph_replay_on_a_gpu_and_events_where_a_call_synchronises():
    device = torch.device("cuda")
    x = [torch.randn(1024, 1024, device=device) for _ in range(64)]
    series = measure(
        {"captured": [lambda t=t: t * 2 for t in x], "read back": [lambda t=t: (t * 2).sum().item() for t in x]},
        device,
        budget=0.2,
    )
    assert series["captured"].method == "cuda graph"
    assert series["read back"].method == "events"
    assert "not captured" in series["read back"].note
    assert 1 < series["captured"].median_us < 1000
