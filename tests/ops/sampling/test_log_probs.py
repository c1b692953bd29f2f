"""log_probs: against torch's log_softmax, with ties, padding and hidden ids."""

import math

import pytest
import torch

from penstock.core.check import ContractError
from penstock.ops import log_probs

IMPLEMENTATIONS = ["cpu", "reference"] + ([] if torch.cuda.is_available() else ["triton"])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_against_log_softmax(impl):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 300, generator=generator) * 3
    ids = torch.randint(0, 300, (5,), generator=generator, dtype=torch.int32)
    chosen, ranks, top_ids, top = log_probs(logits, ids, top_n=7, impl=impl)
    exact = logits.double().log_softmax(1)
    own = exact.gather(1, ids.long()[:, None])
    torch.testing.assert_close(chosen.double(), own[:, 0], rtol=1e-6, atol=1e-6)
    assert ranks.tolist() == ((exact > own).sum(1) + 1).tolist()
    values, best = exact.topk(7)
    assert torch.equal(top_ids.long(), best)
    torch.testing.assert_close(top.double(), values, rtol=1e-6, atol=1e-6)
    assert (chosen.dtype, ranks.dtype, top_ids.dtype) == (torch.float32, torch.int32, torch.int32)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_ties_go_to_the_smaller_id(impl):
    logits = torch.tensor([[1.0, 2.0, -0.0, 2.0, 0.0, math.nan, -math.inf]])
    ids = torch.arange(7, dtype=torch.int32)
    _, ranks, _, _ = log_probs(logits.expand(7, 7), ids, top_n=0, impl=impl)
    assert ranks.tolist() == [3, 1, 4, 2, 5, 6, 7]
    _, _, best, top = log_probs(logits, ids[:1], top_n=7, impl=impl)
    assert best.tolist() == [[1, 3, 0, 2, 4, 5, 6]]
    assert top[0, 5:].tolist() == [-math.inf, -math.inf]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_padding_and_hidden_rows(impl):
    logits = torch.tensor([[1.0, 2.0], [-math.inf, -math.inf], [0.0, 0.0]])
    chosen, ranks, _, top = log_probs(logits, torch.tensor([-1, 1, 5], dtype=torch.int32), top_n=1, impl=impl)
    assert chosen.tolist() == [-math.inf] * 3
    assert ranks.tolist() == [0, 2, 0]
    assert top[1].item() == -math.inf


def test_contract_errors_name_the_argument():
    logits, ids = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ContractError, match="log_probs: `top_n` must be at most V=4, got 5"):
        log_probs(logits, ids, top_n=5)
    with pytest.raises(ContractError, match="log_probs: `top_n` must be an integer >= 0"):
        log_probs(logits, ids, top_n=-1)
    with pytest.raises(ContractError, match="log_probs: `ids` must"):
        log_probs(logits, ids[:1], top_n=0)
