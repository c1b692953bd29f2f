"""sample through the interpreter: every way the kernels can take, against the reference."""

import math

import pytest
import torch

from penstock.core.features import has_triton
from penstock.ops import sample, verify_draft

if not has_triton():
    pytest.skip("Triton is not installed", allow_module_level=True)
from penstock.ops.sampling import sample_triton

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


def agree_on_filters(logits: torch.Tensor, **arguments: object) -> None:
    """The same of a draft's check, which needs the exact cut; q is far from p, so that most drafts leave a rest."""
    B, V = logits.shape
    generator = torch.Generator().manual_seed(V)
    drafts = torch.randint(V, (B, 1), generator=generator).int()
    probs = torch.rand(B, 1, V, generator=generator).softmax(-1)
    target = logits[:, None].expand(B, 2, V).contiguous()
    results = [verify_draft(drafts, probs, target, **arguments, **keys(B), impl=impl) for impl in ("triton", "reference")]
    assert all(torch.equal(got, wanted) for got, wanted in zip(*results, strict=True))


def test_unfiltered_rows():
    agree(normal(12, 700))
    agree(normal(4, 5000, 0.01))


def test_turns():
    agree(normal(24, 300, 1.0), min_p=0.1)
    agree(normal(12, 400, 0.5), top_p=0.3, min_p=0.3)
    agree(normal(12, 300, 3.0).bfloat16(), top_p=0.6)


def test_turns_that_keep_none_end_in_the_exact_cut():
    """One id of 200 is kept: 32 turns find it in a seventh of the rows."""
    agree(torch.zeros(2, 200), top_p=1e-6)
    agree(torch.full((1, 200), 3.0).bfloat16(), top_p=0.01)
    logits = torch.zeros(1, 200)
    logits[:, 77] = 3.0
    agree(logits, min_p=1.0)


@pytest.fixture
def few_candidates(monkeypatch):
    """Room for 64 candidates: rows of a few hundred ids take the ways of long rows."""
    monkeypatch.setattr(sample_triton, "CAPACITY", 64)
    monkeypatch.setattr(sample_triton, "BLOCK", 256)
    monkeypatch.setattr(sample_triton, "FINE_BLOCK", 128)


@pytest.fixture
def small_tiles(monkeypatch, few_candidates):
    """More tiles than top-k asks for; only rows at top-k may be drawn from."""
    monkeypatch.setattr(sample_triton, "TILE", 16)


def test_top_k_with_a_bound(small_tiles):
    agree(normal(6, 600), top_k=9)
    agree(normal(3, 600).bfloat16(), top_k=20, top_p=0.7, min_p=0.01)


def test_top_k_beyond_the_tiles_searches_the_row(small_tiles):
    agree(normal(2, 600), top_k=200)
    agree(normal(2, 600, 0.1).bfloat16(), top_k=300, top_p=0.6)


def test_top_k_of_a_listed_row():
    agree(normal(3, 600), top_k=200)
    agree(normal(2, 600, 0.1).bfloat16(), top_k=300, top_p=0.6, min_p=0.9)


def test_top_k_bound_that_too_many_reach(small_tiles):
    logits = torch.zeros(2, 600)
    logits[:, 5] = 1.0
    agree(logits, top_k=30)


def test_cut_of_top_p_with_bounds(few_candidates):
    agree_on_filters(normal(3, 600), top_p=0.8)
    agree_on_filters(normal(2, 600, 0.1), top_p=0.5)
    agree_on_filters(normal(2, 600, 6.0), top_p=0.9)


def test_cut_of_top_p_of_equal_logits(few_candidates):
    agree_on_filters(torch.zeros(2, 300), top_p=0.4)
    agree_on_filters(torch.full((1, 300), 3.0).bfloat16(), top_p=0.999)


def test_cut_of_top_p_where_the_bounds_are_wrong():
    """Heavy ids that the even sample of the row never meets, but for their tiles' largest: the row is searched."""
    logits = normal(1, 4 * 4096, 0.5)
    heavy = [i for i in range(8 * 128) if i % 4]
    logits[0, heavy] = torch.linspace(11.0, 12.0, len(heavy))
    agree_on_filters(logits, top_p=0.999)


def test_bounds_narrow_once(monkeypatch):
    monkeypatch.setattr(sample_triton, "CAPACITY", 512)
    agree_on_filters(normal(1, 9_000, 1.0), top_p=0.9)


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
