"""The exact cut of top-p through the interpreter, seen by a draft's check, against the reference."""

import pytest
import torch

from penstock.core.features import has_triton
from penstock.ops import verify_draft

if not has_triton():
    pytest.skip("Triton is not installed", allow_module_level=True)
from penstock.ops.sampling import filter_triton, sample_triton

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines with no GPU")


def keys(B: int) -> dict[str, torch.Tensor]:
    """Seeds and offsets of both signs."""
    generator = torch.Generator().manual_seed(B)
    seeds, offsets = torch.randint(-(2**63), 2**63 - 1, (2, B), generator=generator)
    return {"seeds": seeds, "offsets": offsets}


def normal(B: int, V: int, scale: float = 2.0, seed: int = 0) -> torch.Tensor:
    """Normal logits."""
    return torch.randn(B, V, generator=torch.Generator().manual_seed(seed)) * scale


def agree_on_filters(logits: torch.Tensor, **arguments: object) -> None:
    """The kernels and the reference check drafts alike; q is far from p, so that most drafts leave a rest."""
    B, V = logits.shape
    generator = torch.Generator().manual_seed(V)
    drafts = torch.randint(V, (B, 1), generator=generator).int()
    probs = torch.rand(B, 1, V, generator=generator).softmax(-1)
    target = logits[:, None].expand(B, 2, V).contiguous()
    results = [verify_draft(drafts, probs, target, **arguments, **keys(B), impl=impl) for impl in ("triton", "reference")]
    assert all(torch.equal(got, wanted) for got, wanted in zip(*results, strict=True))


@pytest.fixture
def few_candidates(monkeypatch):
    """Room for 64 candidates: rows of a few hundred ids take the ways of long rows."""
    monkeypatch.setattr(sample_triton, "CAPACITY", 64)
    monkeypatch.setattr(sample_triton, "BLOCK", 256)
    monkeypatch.setattr(filter_triton, "FINE_BLOCK", 128)


def test_cut_of_top_k():
    agree_on_filters(normal(3, 600), top_k=7)
    agree_on_filters(normal(3, 600).bfloat16(), top_k=40, top_p=0.8, min_p=0.01)
    agree_on_filters(torch.zeros(2, 300), top_k=9)
    equal = torch.full((6, 100), -9.0)
    equal[:, 3::5] = 3.0
    agree_on_filters(equal, top_k=9)
    agree_on_filters(normal(2, 600, 0.1).bfloat16(), top_k=300, top_p=0.6)
    ks = torch.tensor([0, 5, 0], dtype=torch.int32)
    agree_on_filters(normal(3, 500), top_k=ks, top_p=torch.tensor([1.0, 0.7, 0.6]), temperature=torch.tensor([1.0, 0.9, 0.0]))


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
