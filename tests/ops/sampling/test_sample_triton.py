"""sample through the interpreter: every way the kernels can take, against the reference."""

import math

import pytest
import torch

from penstock.core.features import has_triton
from penstock.ops import sample

if not has_triton():
    pytest.skip("Triton is not installed", allow_module_level=True)
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines with no GPU")


def keys(B: int) -> dict[str, torch.Tensor]:
    """Seeds and offsets of both signs."""
    generator = torch.Generator().manual_seed(B)
    seeds, offsets = torch.randint(-(2**63), 2**63 - 1, (2, B), generator=generator)
    return {"seeds": seeds, "offsets": offsets}


def agree(logits: torch.Tensor, **arguments: object) -> None:
    """The kernels and the reference draw the same ids."""
    drawn = sample(logits, **arguments, **keys(len(logits)), impl="triton")
    wanted = sample(logits, **arguments, **keys(len(logits)), impl="reference")
    assert drawn.tolist() == wanted.tolist()


def normal(B: int, V: int, scale: float = 2.0, seed: int = 0) -> torch.Tensor:
    """Normal logits."""
    return torch.randn(B, V, generator=torch.Generator().manual_seed(seed)) * scale


def test_unfiltered_rows():
    agree(normal(60, 700))
    agree(normal(20, 5000, 0.01), min_p=0.98)


@pytest.fixture
def few_candidates(monkeypatch):
    """Room for 64 candidates: rows of a few hundred ids take the ways of long rows."""
    import penstock.ops.sampling.sample_triton as launches

    monkeypatch.setattr(launches, "CAPACITY", 64)
    monkeypatch.setattr(launches, "TILE", 16)
    monkeypatch.setattr(launches, "BLOCK", 128)


def test_top_k_with_a_bound(few_candidates):
    agree(normal(6, 600), top_k=9)
    agree(normal(3, 600).bfloat16(), top_k=20, top_p=0.7, min_p=0.01)


def test_top_k_beyond_the_tiles_searches_the_row(few_candidates):
    agree(normal(2, 600), top_k=200)
    agree(normal(2, 600, 0.1).bfloat16(), top_k=300, top_p=0.6)


def test_top_k_bound_that_too_many_reach(few_candidates):
    logits = torch.zeros(2, 600)
    logits[:, 5] = 1.0
    agree(logits, top_k=30)


def test_top_p_with_bounds(few_candidates):
    agree(normal(4, 600), top_p=0.8)
    agree(normal(2, 600, 0.1), top_p=0.5)
    agree(normal(2, 600, 6.0), top_p=0.9)


def test_top_p_of_equal_logits(few_candidates):
    agree(torch.zeros(2, 300), top_p=0.4)
    agree(torch.full((1, 300), 3.0).bfloat16(), top_p=0.999)


def test_top_p_where_the_bounds_are_wrong():
    """Heavy ids that the even sample of the row never meets, but for their tiles' largest: the row is searched."""
    logits = normal(1, 4 * 4096, 0.5)
    heavy = [i for i in range(8 * 128) if i % 4]
    logits[0, heavy] = torch.linspace(11.0, 12.0, len(heavy))
    agree(logits, top_p=0.999)


def test_bounds_narrow_once(monkeypatch):
    import penstock.ops.sampling.sample_triton as launches

    monkeypatch.setattr(launches, "CAPACITY", 512)
    agree(normal(1, 20_000, 1.0), top_p=0.9)


def test_greedy_ties_and_hidden_rows():
    logits = normal(4, 1000)
    logits[0, [3, 500, 999]] = 50.0
    logits[1] = -math.inf
    logits[2] = math.nan
    logits[3, 7] = math.inf
    heats = torch.tensor([0.0, 0.0, 1.0, 0.0])
    agree(logits, temperature=heats)
    agree(logits, temperature=heats, top_p=torch.tensor([0.5, 1.0, 0.1, 0.9]))


def test_padded_rows_and_one_column():
    agree(normal(5, 70)[:, :65], temperature=0.7, top_k=4)
    agree(normal(3, 1), temperature=1.0, top_k=1, top_p=0.5)
    agree(normal(3, 2), top_k=torch.tensor([1, 2, 0], dtype=torch.int32), top_p=torch.tensor([0.3, 0.6, 1.0]))
