"""What an option is worth: both engines must agree before anything is timed, and the counts are those of the engine."""

import json

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers")

from penstock.bench.cli import app
from penstock.bench.engine_options import WITH, WITHOUT, engines, shared_prefix, speculation

LIMITS = {"max_model_len": 300, "max_num_seqs": 8}


def test_a_shared_prefix_is_computed_once_for_each_round():
    options = {WITHOUT: {"enable_prefix_caching": False}}
    llms = engines("", "tiny", torch.device("cpu"), torch.float32, options, **LIMITS)
    row = shared_prefix(llms, 128, tail=16, requests=3, rounds=2)
    assert row.facts["hit rate"] == pytest.approx(2 / 3 * 128 / 144)
    assert [len(samples) for samples in row.samples.values()] == [4, 4] and row.ratio > 0
    assert llms[WITHOUT].engine.statistics().prefix_hit_tokens == 0


def test_an_option_that_changes_the_output_is_a_red_gate(monkeypatch):
    llms = engines("", "tiny", torch.device("cpu"), torch.float32, {}, **LIMITS)
    execute = llms[WITH].engine.runner.execute

    def wrong(plan):
        result = execute(plan)
        return type(result)({slot: [token ^ 1 for token in run] for slot, run in result.token_ids.items()})

    monkeypatch.setattr(llms[WITH].engine.runner, "execute", wrong)
    with pytest.raises(ValueError, match="red gate: the option changes the output"):
        shared_prefix(llms, 16, tail=4, requests=2, rounds=1)


def test_guesses_are_counted(monkeypatch):
    monkeypatch.setattr("penstock.bench.engine_options.TEXTS", ("x = 1\n" * 6, "a b a b a b a b"))
    options = {WITH: {"speculative": {"method": "ngram", "num_tokens": 3}}}
    llms = engines("demo", "", torch.device("cpu"), torch.float32, options, **LIMITS)
    row = speculation(llms, 2, 12, rounds=1)
    got = llms[WITH].engine.statistics()
    assert got.draft_tokens == 2 * row.facts["draft tokens"] > 0  # the gate made as many
    assert row.facts["acceptance"] == got.accepted_tokens / got.draft_tokens
    assert "3 n-gram guesses" in row.line


def test_the_command_writes_a_file_for_each(tmp_path):
    options = ["--shared-prefix", "64", "--speculative", "2", "--quick", "--device", "cpu", "--output", str(tmp_path)]
    done = CliRunner().invoke(app, ["engine", *options])
    assert done.exit_code == 0, done.output
    for name, option in (("engine_shared_prefix", "prefix caching"), ("engine_speculative", "speculation")):
        document = json.loads((tmp_path / f"{name}.json").read_text())
        assert [row["option"] for row in document["rows"]] == [option]
