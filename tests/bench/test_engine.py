"""Both engines around one set of weights, and the gate that compares their greedy tokens."""

import pytest
import torch

pytest.importorskip("transformers")

from penstock.bench.engine import Workload, bench_engine, pair_of_shape, streamed_bytes
from penstock.bench.engine_peer import divergence, generate_batch, generate_each
from penstock.bench.roofline import Ceilings
from penstock.bench.shapes import SHAPES, config_of

CPU = torch.device("cpu")
PROMPTS = [[1, 2, 3, 4, 5], [7, 8, 9]]


@pytest.fixture(scope="module")
def pair():
    return pair_of_shape("tiny", CPU, torch.float32, max_num_seqs=4, max_model_len=64)


def test_both_engines_hold_the_same_memory(pair):
    own = {}
    for parameter in pair.peer.parameters():
        own[parameter.untyped_storage().data_ptr()] = parameter.untyped_storage().nbytes()
    # Seven projections and four norms a layer lie in eight packed tensors; the head is the embedding.
    assert len(own) == 2 + 8 * SHAPES["tiny"]["num_hidden_layers"]
    assert pair.weight_bytes == sum(own.values())


def test_padding_does_not_change_what_transformers_makes(pair):
    assert generate_batch(pair.peer, PROMPTS, 6) == generate_each(pair.peer, PROMPTS, 6)


def test_wrong_tokens_are_a_red_gate(pair):
    theirs = generate_each(pair.peer, PROMPTS, 6)
    assert divergence(pair.peer, PROMPTS, theirs, theirs) == ""
    wrong = [theirs[0], [*theirs[1][:3], (theirs[1][3] + 1) % 512, *theirs[1][4:]]]
    assert divergence(pair.peer, PROMPTS, wrong, theirs).startswith("prompt 1, token 3: ")
    assert divergence(pair.peer, PROMPTS, [theirs[0], theirs[1][:-1]], theirs) == "prompt 1: 5 tokens, transformers made 6"


def test_a_red_gate_yields_no_row(pair, monkeypatch):
    monkeypatch.setattr("penstock.bench.engine._ours", lambda llm: lambda prompts, count: [[0] * count for _ in prompts])
    rows, without = bench_engine(pair, [Workload(1, 8, 6)], CPU, rounds=1)
    assert rows == [] and without["1 requests"].startswith("red gate: prompt 0, token ")


def test_rows_and_ratios(pair):
    rows, without = bench_engine(pair, [Workload(2, 8, 6)], CPU, rounds=2, ceilings=Ceilings(1e9, {}))
    assert without == {}
    ours, batch, each = rows
    assert (ours.contestant, ours.ratios) == ("penstock", {})
    assert batch.contestant == "transformers, one padded batch" and each.contestant == "transformers, one after another"
    assert all(list(row.samples) == [1, 2, 6] and len(row.samples[6]) == 2 for row in rows)
    assert each.ratios["tokens per second"] > 0 and 0 < abs(ours.of_floor) < 100


def test_weights_that_a_step_reads():
    embedding, head, other = torch.empty(10, 4), torch.empty(10, 4), torch.empty(8)
    assert streamed_bytes([embedding, head, other], embedding, head) == 4 * (40 + 8)
    assert streamed_bytes([embedding, other], embedding, embedding) == 4 * (40 + 8)


def test_shapes_by_name():
    assert config_of("llama-3.1-8b").num_hidden_layers == 32
    with pytest.raises(ValueError, match=r"shape must be one of llama-3\.1-8b, .*got 'llama-4'"):
        config_of("llama-4")
