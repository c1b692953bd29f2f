"""verify_draft: the ids are distributed as the target says, whatever the drafter, and the acceptance is the best there is."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.check import ContractError
from penstock.core.features import has_triton
from penstock.ops import sample, verify_draft
from penstock.ops.sampling import verify_draft_cpu
from penstock.ops.sampling._weights import draw, share

DRAWS = 100_000


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Fails when counts as far from the probabilities have a chance below 1e-3 (Wilson and Hilferty's approximation)."""
    expected = probabilities * counts.sum()
    assert expected.min() > 5, "too few draws for so rare an outcome"
    statistic, freedom = float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1
    spread = 2 / (9 * freedom)
    deviate = ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    assert math.erfc(deviate / math.sqrt(2)) / 2 > 1e-3, (statistic, freedom)


def keys(B: int, step: int = 4) -> dict[str, torch.Tensor]:
    """One seed, offsets far enough apart."""
    return {"seeds": torch.full((B,), 11), "offsets": torch.arange(B) * step}


def filtered(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """softmax in float64, its nucleus only."""
    p = logits.double().softmax(-1)
    ordered, order = p.sort(descending=True, stable=True)
    kept = torch.zeros_like(p).scatter(0, order, ordered * (ordered.cumsum(0) - ordered < top_p))
    return kept / kept.sum()


def draws_of_a_drafter(V: int, n: int, seed: int, top_p: float) -> tuple[torch.Tensor, ...]:
    """(draft distributions, target logits, draft ids, accepted, ids) of DRAWS requests; each context has its own distributions.

    Position 1 depends on the id at position 0, as in decoding, so that a joint distribution has something to be wrong about.
    """
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(n + 1, V, V, generator=generator)
    draft = (target[:n] + 0.8 * torch.randn(n, V, V, generator=generator)).softmax(-1)
    ids, q, logits = [], [], [target[0, 0].expand(DRAWS, V)]
    context = torch.zeros(DRAWS, dtype=torch.int64)
    for i in range(n):
        q.append(draft[i, context])
        context = torch.multinomial(q[-1], 1, generator=generator)[:, 0]
        ids.append(context)
        logits.append(target[i + 1, context])
    draft_ids, probs, stacked = torch.stack(ids, 1).to(torch.int32), torch.stack(q, 1), torch.stack(logits, 1)
    accepted, drawn = verify_draft(draft_ids, probs, stacked, top_p=top_p, **keys(DRAWS))
    return draft, target, draft_ids, accepted, drawn


@pytest.mark.parametrize("top_p", [1.0, 0.85])
def test_the_joint_distribution_is_the_targets(top_p):
    V, n = 5, 2
    _, target, _, accepted, ids = draws_of_a_drafter(V, n, 3, top_p)
    # What a request of two ids emits: pairs where the first was accepted, single ids otherwise; both must follow the target.
    first = filtered(target[0, 0], top_p)
    kept = first > 0
    counts = np.bincount(ids[:, 0].numpy(), minlength=V)
    assert counts[~kept.numpy()].sum() == 0
    chi_square(counts[kept.numpy()], first[kept].numpy())
    for depth in range(1, n + 1):
        for context in range(V):
            rows = (accepted >= depth) & (ids[:, depth - 1] == context)
            if int(rows.sum()) < 500:
                continue
            wanted = filtered(target[depth, context], top_p)
            seen = np.bincount(ids[rows, depth].numpy(), minlength=V)
            possible = wanted.numpy() > 0
            assert seen[~possible].sum() == 0
            chi_square(seen[possible], wanted.numpy()[possible])


def test_pairs_follow_the_target_when_decoding_goes_on():
    """Two ids of each request, the second drawn by a second call where the first call returned but one."""
    V = 4
    _, target, _, accepted, ids = draws_of_a_drafter(V, 1, 9, 1.0)
    alone = accepted == 0
    more = sample(
        target[1, ids[alone, 0].long()], seeds=torch.full((int(alone.sum()),), 11), offsets=torch.arange(DRAWS)[alone] * 4 + 1
    )
    second = ids[:, 1].clone()
    second[alone] = more
    joint = target[0, 0].double().softmax(0)[:, None] * target[1].double().softmax(-1)
    chi_square(np.bincount((ids[:, 0] * V + second).numpy(), minlength=V * V), joint.flatten().numpy())


def test_acceptance_is_the_overlap_of_the_distributions():
    draft, target, _, accepted, _ = draws_of_a_drafter(6, 1, 5, 0.9)
    wanted = float(torch.minimum(draft[0, 0].double(), filtered(target[0, 0], 0.9)).sum())
    deviation = math.sqrt(wanted * (1 - wanted) / DRAWS)
    assert abs(float(accepted.double().mean()) - wanted) < 4 * deviation


def test_a_certain_drafter_gives_the_ids_of_sample():
    generator = torch.Generator().manual_seed(4)
    target = torch.randn(400, 4, 9, generator=generator)
    drafts = target[:, :3].argmax(-1).to(torch.int32)
    key = keys(400)
    accepted, ids = verify_draft(drafts, None, target, top_k=5, temperature=0.8, **key)
    for i in range(4):
        one_by_one = sample(target[:, i], top_k=5, temperature=0.8, seeds=key["seeds"], offsets=key["offsets"] + i)
        reached = accepted >= i
        assert torch.equal(ids[reached, i], one_by_one[reached])
        if i < 3:
            assert torch.equal(accepted[reached] > i, (one_by_one == drafts[:, i])[reached])
    past = torch.arange(4) > accepted[:, None]
    assert bool((ids[past] == -1).all()) and bool((ids[~past] >= 0).all())
    assert 0 < float(accepted.double().mean()) < 3


def test_a_certain_drafter_is_the_one_hot_one():
    """One-hot probabilities accept as often, and leave the same rest."""
    row = torch.randn(6, generator=torch.Generator().manual_seed(2))
    drafts = torch.full((DRAWS, 1), int(row.argmax()), dtype=torch.int32)
    target = row.expand(DRAWS, 2, 6)
    one_hot = torch.zeros(6).index_fill(0, row.argmax(), 1.0).expand(DRAWS, 1, 6)
    p = row.double().softmax(0).numpy()
    for probs in (None, one_hot):
        accepted, ids = verify_draft(drafts, probs, target, **keys(DRAWS))
        chi_square(np.bincount(accepted.numpy()), np.array([1 - p.max(), p.max()]))
        chi_square(np.bincount(ids[:, 0].numpy(), minlength=6), p)
        assert torch.equal(accepted == 1, ids[:, 0] == drafts[:, 0])


@pytest.mark.parametrize("certain", [True, False])
def test_greedy_accepts_the_chain_of_largest(certain):
    generator = torch.Generator().manual_seed(8)
    target = torch.randn(300, 4, 7, generator=generator)
    best = target.argmax(-1).to(torch.int32)
    drafts = torch.where(
        torch.rand(300, 3, generator=generator) < 0.7, best[:, :3], torch.randint(7, (300, 3), generator=generator).int()
    )
    probs = None if certain else torch.rand(300, 3, 7, generator=generator).softmax(-1)
    accepted, ids = verify_draft(drafts, probs, target, temperature=0.0, **keys(300))
    chain = (drafts == best[:, :3]).int().cumprod(1).sum(1)
    assert torch.equal(accepted.long(), chain)
    wanted = torch.where(torch.arange(4) <= chain[:, None], best, -1)
    assert torch.equal(ids, wanted)


IMPLEMENTATIONS = ["reference", "cpu"] + (["triton"] if has_triton() and not torch.cuda.is_available() else [])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_ids_out_of_the_vocabulary_are_rejected(impl):
    target = torch.zeros(4, 3, 5)
    drafts = torch.tensor([[-1, 0], [5, 0], [2**31 - 1, 0], [-(2**31), 1]], dtype=torch.int32)
    for probs in (None, torch.full((4, 2, 5), 0.2)):
        accepted, ids = verify_draft(drafts, probs, target, **keys(4), impl=impl)
        assert accepted.tolist() == [0] * 4 and ids[:, 1:].tolist() == [[-1, -1]] * 4
        assert torch.equal(ids[:, 0], sample(target[:, 0], **keys(4)))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_probabilities_that_are_none(impl):
    """NaN, negative and too large probabilities: the support stays the target's."""
    target = torch.full((6, 2, 4), -math.inf)
    target[:, :, 1:3] = 0.0
    drafts = torch.tensor([[0], [1], [1], [1], [3], [2]], dtype=torch.int32)
    probs = torch.tensor([[math.nan] * 4, [math.nan] * 4, [-1.0] * 4, [math.inf] * 4, [0.0] * 4, [7.0] * 4])[:, None]
    accepted, ids = verify_draft(drafts, probs, target, **keys(6), impl=impl)
    assert set(ids[:, 0].tolist()) <= {1, 2}
    assert accepted.tolist()[:3] == [0, 1, 1] and accepted[4] == 0


def test_shares_are_floors_of_products():
    generator = torch.Generator().manual_seed(0)
    fractions = torch.cat([torch.rand(300, generator=generator) ** 9, torch.tensor([0.0, 1.0, 2.0, -1.0, math.nan, 2.0**-40])])
    for mass in (1, 2**40, 3 * 2**40 + 12345, 2**61 + 987654321):
        wanted = [share(fraction, mass) for fraction in fractions.tolist()]
        assert verify_draft_cpu.shares(fractions[None], torch.tensor([mass]))[0].tolist() == wanted
        assert all(0 <= each <= mass for each in wanted)
    assert share(0.75, 1000) == 750 and draw(2**64 - 1, 0) == 0


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 5), st.integers(0, 4), st.integers(1, 60), st.integers(0, 2**31), st.booleans(), st.booleans())
def test_cpu_path_equals_the_reference_on_any_shape(B, n, V, seed, certain, long):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(B, n + 1, V + 3, generator=generator)[:, :, :V] * 2
    probs = (target[:, :n] + torch.randn(B, n, V, generator=generator)).softmax(-1)
    drafts = torch.randint(-1, V + 1, (B, n), generator=generator).int()

    def choose(*values: float) -> torch.Tensor:
        return torch.tensor(values)[torch.randint(len(values), (B,), generator=generator)]

    options = {
        "temperature": choose(0.0, 0.5, 1.0, 1e4),
        "top_k": choose(0, 1, 3, 50).int(),
        "top_p": choose(1.0, 0.9, 0.3),
        "min_p": choose(0.0, 0.2),
    }
    given_probs = None if certain else probs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify_draft_cpu, "SORTED", 0 if long else 1024)
        results = [verify_draft(drafts, given_probs, target, **options, **keys(B), impl=impl) for impl in ("cpu", "reference")]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    for b in range(B):
        one = slice(b, b + 1)
        alone = verify_draft(
            drafts[one],
            None if certain else probs[one],
            target[one],
            **{name: value[one] for name, value in (options | keys(B)).items()},
        )
        assert torch.equal(alone[0], results[0][0][one]) and torch.equal(alone[1], results[0][1][one])


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("draft_ids", torch.zeros(2, 3, dtype=torch.int64)),
        ("draft_probs", torch.zeros(2, 3, 6)),
        ("draft_probs", torch.zeros(2, 2, 8)),
        ("target_logits", torch.zeros(2, 3, 8)),
        ("target_logits", torch.zeros(2, 4, 0)),
        ("seeds", torch.zeros(3, dtype=torch.int64)),
        ("top_p", 0.0),
        ("temperature", torch.ones(3)),
    ],
)
def test_contract_errors_name_the_argument(name, bad):
    arguments = {"draft_ids": torch.zeros(2, 3, dtype=torch.int32), "draft_probs": None, "target_logits": torch.zeros(2, 4, 8)}
    if name == "draft_probs" and bad.shape[2] == 6:
        name = "target_logits"
        arguments["draft_probs"] = bad
    else:
        arguments[name] = bad
    with pytest.raises(ContractError, match=f"verify_draft: `{name}` must"):
        verify_draft(**{**keys(2), **arguments})


def test_works_under_torch_compile():
    target, drafts = torch.randn(3, 3, 50), torch.zeros(3, 2, dtype=torch.int32)
    compiled = torch.compile(lambda x: verify_draft(drafts, None, x * 2, top_k=5, **keys(3)), backend="eager", fullgraph=True)
    wanted = verify_draft(drafts, None, target * 2, top_k=5, **keys(3))
    assert all(torch.equal(a, b) for a, b in zip(compiled(target), wanted, strict=True))
