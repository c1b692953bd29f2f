"""The gate's slices: an attention call too large for its reference is judged on blocks of query rows, in every alignment."""

from types import SimpleNamespace

import pytest
import torch

from penstock.bench import correct
from penstock.bench.run import catalogue
from penstock.core.cases import Make
from penstock.testing.budget import Expected, results

OPERATORS = catalogue()


def attention_cases():
    for name in ("attention_prefill", "attention_prefill_paged"):
        if name not in OPERATORS:
            continue
        for case in OPERATORS[name].all_cases():
            if not case.bench and "empty" not in case.name and "lse" not in case.name:
                yield pytest.param(name, case, id=f"{name}-{case.name}")


@pytest.mark.parametrize(("name", "case"), list(attention_cases()))
def test_blocks_of_rows_agree_with_the_whole_call(monkeypatch, name, case):
    monkeypatch.setattr(correct, "SCORE_BYTES", 0)
    monkeypatch.setattr(correct, "QUERY_ROWS", 4)
    arguments = case.build(Make("cpu"))
    parts = list(correct._parts(OPERATORS[name], arguments))
    assert len(parts) > 1 or parts[0][1] is not None
    whole = results(OPERATORS[name], arguments, "reference")[f"{name}[0]"].float()
    for part, rows in parts:
        sliced = results(OPERATORS[name], part, "reference")[f"{name}[0]"].float()
        torch.testing.assert_close(sliced, whole[rows], rtol=1e-2, atol=1e-2)


def test_rows_of_a_sampler_are_judged_on_a_few():
    if "sample" not in OPERATORS:
        pytest.skip("no sampler")
    generator = torch.Generator().manual_seed(0)
    arguments = {
        "logits": torch.randn(40, 50, generator=generator),
        "seeds": torch.arange(40),
        "offsets": torch.zeros(40, dtype=torch.int64),
        "top_k": torch.full((40,), 5, dtype=torch.int32),
    }
    (part, rows), *others = list(correct._parts(OPERATORS["sample"], arguments))
    assert others == [] and len(rows) == correct.ROWS
    assert torch.equal(part["logits"], arguments["logits"][rows]) and torch.equal(part["seeds"], rows)
    assert correct.verify(OPERATORS["sample"], "cpu", arguments) == ""


def test_one_wrong_value_among_millions_of_right_ones_that_is_not_finite_is_found():
    exact = torch.zeros(3_000_000, dtype=torch.float64)
    got = torch.zeros(3_000_000)
    correct._judge("x", OPERATORS["rms_norm"], got, Expected(exact, got))
    got[1_234_567] = torch.nan
    with pytest.raises(AssertionError, match="1 of 3000000 values are finite where"):
        correct._judge("x", OPERATORS["rms_norm"], got, Expected(exact, exact.float()))


def test_peers_are_held_to_a_few_hundredths():
    ours = torch.randn(100)
    assert correct.disagreement(ours.double() * 1.01, ours) == ""
    assert "in norm" in correct.disagreement(ours * 1.1, ours)
    assert "shape" in correct.disagreement(ours[:50], ours)
    assert correct.disagreement(torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.int32)) == ""


def test_a_wrong_tile_in_a_later_band_is_found(monkeypatch):
    monkeypatch.setattr(correct, "BAND", 2)
    whole, tiled = (SimpleNamespace(exact=False, tile=tile) for tile in (None, 8))
    exact = torch.randn(40, 24, dtype=torch.float64)
    exact[32:, 16:] /= 300
    right = exact.bfloat16()
    correct._judge("y", tiled, right, Expected(exact, right))
    wrong = right.clone()
    wrong[33, 17] = 0
    correct._judge("y", whole, wrong, Expected(exact, right))
    with pytest.raises(AssertionError, match="rows from 32"):
        correct._judge("y", tiled, wrong, Expected(exact, right))
