"""Latency against load: arrivals, numbers from times, and a run against a server."""

import asyncio
import itertools
import json
import math

import pytest
import typer
from typer.testing import CliRunner

from penstock.bench import serve_command
from penstock.bench.serve import Measured, Objectives, Workload, as_json, run, summarise
from penstock.serve.config import EngineConfig
from penstock.serve.engine import Engine
from tests.serve.server.servers import around
from tests.serve.simulated import SimulatedRunner
from tests.serve.small_tokenizer import byte_level


def test_arrivals_are_poisson():
    """Independent of the server, ascending, the same for the same seed; gaps with the mean and spread of a rate."""
    load = Workload(rate=5.0, requests=4000, prompt_tokens=3, output_tokens=2, seed=1)
    arrivals = load.arrivals()
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert min(gaps) >= 0 and arrivals == load.arrivals()
    assert mean == pytest.approx(0.2, rel=0.05) and deviation == pytest.approx(0.2, rel=0.08)
    assert Workload(math.inf, 3, 1, 1).arrivals() == [0, 0, 0]
    assert {len(prompt) for prompt in load.prompts()} == {3}


def test_numbers_from_times():
    load = Workload(rate=2.0, requests=3, prompt_tokens=10, output_tokens=3)
    quick = Measured(0.0, [0.1, 0.2, 0.4], 3)
    slow = Measured(1.0, [2.0, 2.5, 4.0], 3)
    failed = Measured(1.5, [], 0, "HTTP 429")
    row = summarise(load, [quick, slow, failed], Objectives(ttft=0.5, tpot=0.2))
    assert (row.requests, row.failed, row.faults) == (3, 1, ["HTTP 429"])
    assert row.seconds == 4.0 and row.requests_per_second == 0.5 and row.output_tokens_per_second == 1.5
    assert row.total_tokens_per_second == (6 + 20) / 4 and row.goodput == 0.25
    assert row.ttft["mean"] == pytest.approx(0.55) and row.e2e["mean"] == pytest.approx(1.7)
    assert row.tpot["mean"] == pytest.approx((0.15 + 1.0) / 2)
    assert row.itl["p50"] == pytest.approx(0.35) and row.itl["mean"] == pytest.approx((0.1 + 0.2 + 0.5 + 1.5) / 4)
    assert Objectives(e2e=1.0).kept(quick) and not Objectives(e2e=1.0).kept(slow)


def test_options_that_cannot_be():
    assert serve_command.parse_rates("1,2.5,inf") == [1.0, 2.5, math.inf]
    assert serve_command.parse_objectives("ttft:200,e2e:1500.5") == Objectives(ttft=0.2, e2e=1.5005)
    assert serve_command.parse_objectives("") == Objectives()
    for wrong in ("1,x", "0", "nan"):
        with pytest.raises(typer.BadParameter, match="--rates must be"):
            serve_command.parse_rates(wrong)
    with pytest.raises(typer.BadParameter, match="--goodput must be like"):
        serve_command.parse_objectives("ttft=5")


def build():
    """A quick engine."""
    return Engine(EngineConfig("demo"), SimulatedRunner(num_pages=512, vocab_size=1000), byte_level())


def test_against_a_server(tmp_path):
    """The command writes the rows and the plot; what a server refuses is counted and named."""
    with around(build) as (url, _):
        arguments = ["demo", "--url", url, "--rates", "40,inf", "--requests", "8", "--prompt-tokens", "5"]
        arguments += ["--output-tokens", "4", "--output", str(tmp_path), "--note", "a test"]
        done = CliRunner().invoke(serve_command.app, arguments)
        assert done.exit_code == 0, done.output
        arguments[4] = "inf"
        alone = CliRunner().invoke(serve_command.app, [*arguments[:-4], "--output", str(tmp_path / "alone")])
        assert alone.exit_code == 0 and "there is no rate to plot against" in alone.output
        failing = asyncio.run(run(url, "other", Workload(math.inf, 2, 5, 4), Objectives()))
    document = json.loads((tmp_path / "serve.json").read_text())
    assert [row["rate"] for row in document["rows"]] == [40.0, None] and document["note"] == "a test"
    for row in document["rows"]:
        assert (row["requests"], row["failed"]) == (8, 0)
        assert 0 < row["ttft"]["p50"] <= row["ttft"]["p99"] < row["e2e"]["p99"] + 1e-9
        assert row["output_tokens_per_second"] == pytest.approx(32 / row["seconds"], rel=1e-3)
    assert (tmp_path / "serve.png").read_bytes().startswith(b"\x89PNG")
    assert failing.failed == 2 and failing.faults[0].startswith("HTTP 404")
    assert "failed" in failing.line and as_json(failing)["ttft"]["p50"] is None
