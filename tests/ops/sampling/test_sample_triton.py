"""sample through the interpreter: every way its kernels can take, against the reference."""

import math

import pytest
import torch

from penstock.core.features import has_triton
from penstock.ops import sample

if not has_triton():
    pytest.skip("Triton is not installed", allow_module_level=True)
import triton
import triton.language as tl

from penstock.ops.sampling import sample_check_triton, sample_triton
from penstock.ops.sampling._state_triton import PENDING

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines with no GPU")


@triton.jit
def _hopeless(before, terms, V):
    return tl.zeros_like(before) + 288230376151711744


def agree(logits: torch.Tensor, **arguments: object) -> None:
    """The kernels and the reference draw the same ids."""
    B = len(logits)
    seeds, offsets = torch.randint(-(2**63), 2**63 - 1, (2, B), generator=torch.Generator().manual_seed(B))
    keys = {"seeds": seeds, "offsets": offsets}
    drawn = sample(logits, **arguments, **keys, impl="triton")
    assert drawn.tolist() == sample(logits, **arguments, **keys, impl="reference").tolist()


def normal(B: int, V: int, scale: float = 2.0, seed: int = 0) -> torch.Tensor:
    """Normal logits."""
    return torch.randn(B, V, generator=torch.Generator().manual_seed(seed)) * scale


def test_unfiltered_rows():
    agree(normal(12, 700))
    agree(normal(4, 5000, 0.01))


def test_records():
    agree(normal(16, 300, 1.0), min_p=0.1)
    agree(normal(4, 400, 0.5), top_p=0.3, min_p=0.3)
    agree(normal(8, 300, 3.0).bfloat16(), top_p=0.6)
    agree(normal(4, 2500, 0.2).bfloat16(), top_p=0.9)


def test_flat_rows_of_the_whole_vocabulary():
    agree(torch.zeros(4, 2500), top_p=0.99)
    agree(normal(4, 2500, 0.001), top_p=0.99)


def test_peaked_rows_are_decided_by_tiles(monkeypatch):
    """Nothing is left for the pass over the logits."""
    opened = []
    check = sample_triton.check_kernel

    class Spy:
        def __getitem__(self, grid):
            def run(floats, ints, *arguments, **options):
                opened.append(ints[:, PENDING.value].tolist())
                check[grid](floats, ints, *arguments, **options)

            return run

    monkeypatch.setattr(sample_triton, "check_kernel", Spy())
    logits = normal(6, 1500, 0.5)
    logits[:, 700] = 18.0
    agree(logits, top_p=0.9)
    assert opened == [[0] * 6]
    agree(normal(6, 1500, 0.5), top_p=0.9)
    assert sum(opened[1]) > 0


def test_logits_around_zero_and_at_the_ends():
    logits = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3.4028234e38, -3.4028234e38, math.inf])
    agree(logits[:4].repeat(12, 100), top_p=0.4)
    agree(logits[:6].repeat(6, 70), top_p=0.5, temperature=1e38)
    agree(logits.repeat(6, 70), top_p=0.5, temperature=1e38)
    agree(logits.repeat(6, 70), top_p=0.5)


def test_turns_that_keep_none_end_in_the_exact_cut():
    agree(torch.zeros(2, 200), top_p=1e-6)
    agree(torch.full((1, 200), 3.0).bfloat16(), top_p=0.01)
    logits = torch.zeros(1, 200)
    logits[:, 77] = 3.0
    agree(logits, min_p=1.0)


def test_sums_with_an_error_leave_it_to_integers(monkeypatch):
    """With a large error nothing is decided by sums, and the ids are the same."""
    monkeypatch.setattr(sample_check_triton, "_error", _hopeless)
    agree(normal(6, 600, 0.5), top_p=0.7)


@pytest.fixture
def small_tiles(monkeypatch):
    """Room for 64 candidates, tiles of 16: rows of a few hundred ids take the ways of long rows."""
    monkeypatch.setattr(sample_triton, "CAPACITY", 64)
    monkeypatch.setattr(sample_triton, "BLOCK", 256)
    monkeypatch.setattr(sample_triton, "TILE", 16)


def test_top_k_with_a_bound(small_tiles):
    agree(normal(6, 600), top_k=9)
    agree(normal(3, 600).bfloat16(), top_k=20, top_p=0.7, min_p=0.01)


def test_top_k_beyond_the_tiles_searches_the_row(small_tiles):
    agree(normal(2, 600), top_k=200)
    agree(normal(2, 600, 0.1).bfloat16(), top_k=300, top_p=0.6)


def test_top_k_of_few_and_of_many_candidates():
    agree(normal(6, 3000), top_k=20)
    agree(normal(6, 9000), top_k=65, top_p=0.9)
    agree(normal(3, 600), top_k=200)
    agree(normal(2, 600, 0.1).bfloat16(), top_k=300, top_p=0.6, min_p=0.9)


def test_top_k_bound_that_too_many_reach(small_tiles):
    logits = torch.zeros(2, 600)
    logits[:, 5] = 1.0
    agree(logits, top_k=30)
    outlier = normal(2, 600)
    outlier[:, :590] = -1e30
    agree(outlier, top_k=5)


def test_greedy_ties_and_hidden_rows():
    logits = normal(4, 1000)
    logits[0, [3, 500, 999]] = 50.0
    logits[1] = -math.inf
    logits[2] = math.nan
    logits[3, 7] = math.inf
    heats = torch.tensor([0.0, 0.0, 1.0, 0.0])
    agree(logits, temperature=heats)
    agree(logits, temperature=heats, top_p=torch.tensor([0.5, 1.0, 0.1, 0.9]))
    logits[:, ::3] = math.nan
    agree(logits, temperature=0.9, top_p=0.6)
    agree(logits, top_k=7)


def test_padded_rows_and_one_column():
    agree(normal(5, 70)[:, :65], temperature=0.7, top_k=4)
    agree(normal(3, 1), temperature=1.0, top_k=1, top_p=0.5)
    agree(normal(3, 2), top_k=torch.tensor([1, 2, 0], dtype=torch.int32), top_p=torch.tensor([0.3, 0.6, 1.0]))
