"""sample: who may be drawn, how often, and that nothing but the row decides."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import penstock.core.op as core_op
from penstock.core.check import ContractError
from penstock.ops import sample
from penstock.ops.sampling._philox import philox, words, words_of
from penstock.ops.sampling._weights import ONE, scales, weigh

HEATS = (0.0, 1e-4, 0.7, 1.0, 1.5, 1e4)
KS = (0, 1, 2, 5, 50, 10_000)
PS = (1.0, 0.95, 0.5, 0.1, 1e-6)
FLOORS = (0.0, 0.02, 0.5, 1.0)


def keys(B: int, start: int = 0) -> dict[str, torch.Tensor]:
    """Distinct seeds and offsets."""
    return {"seeds": torch.arange(B) * 0x9E3779B97F4A + start, "offsets": torch.arange(B) + 7 * start}


def options(B: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random options, one a row."""

    def choose(values: tuple, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype)[torch.randint(len(values), (B,), generator=generator)]

    return {
        "temperature": choose(HEATS, torch.float32),
        "top_k": choose(KS, torch.int32),
        "top_p": choose(PS, torch.float32),
        "min_p": choose(FLOORS, torch.float32),
    }


def random_logits(B: int, V: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal logits of random width; some rows masked, some with NaN, infinities, or nothing but ties."""
    width = torch.tensor([0.01, 1.0, 6.0])[torch.randint(3, (B, 1), generator=generator)]
    logits = (torch.randn(B, V, generator=generator) * width).to(dtype)
    kind = torch.randint(8, (B,), generator=generator)
    hidden = torch.rand(B, V, generator=generator) < 0.7
    logits[(kind == 1)[:, None] & hidden] = -math.inf
    logits[(kind == 2)[:, None] & hidden] = math.nan
    logits[(kind == 3)[:, None] & hidden] = math.inf
    logits[kind == 4] = 0.5
    logits[kind == 5] = -math.inf
    return logits


def support(row: torch.Tensor, heat: float, k: int, p: float, floor: float) -> set[int]:
    """The ids that may be drawn, computed in float64 with Python's sort."""
    values = row.double().tolist()
    order = sorted((i for i in range(len(values)) if values[i] > -math.inf), key=lambda i: (-values[i], i))
    if heat == 0:
        return {order[0]}
    order = order[:k] if k else order
    weights = [math.exp((values[i] - values[order[0]]) / heat) for i in order]
    needed, mass, kept = p * sum(weights), 0.0, set()
    for i, weight in zip(order, weights, strict=True):
        if mass >= needed:
            break
        mass += weight
        if weight >= floor:
            kept.add(i)
    return kept


def test_philox_answers_known_questions():
    counters = [[0] * 4, [0xFFFFFFFF] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]]
    asked = [[0] * 2, [0xFFFFFFFF] * 2, [0xA4093822, 0x299F31D0]]
    wanted = [
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ]
    assert philox(torch.tensor(counters), torch.tensor(asked)).tolist() == wanted


def test_philox_of_tensors_and_of_integers_agree():
    generator = torch.Generator().manual_seed(0)
    seeds, offsets = torch.randint(-(2**63), 2**63 - 1, (2, 500), generator=generator)
    pairs = [words_of(*pair) for pair in zip(seeds.tolist(), offsets.tolist(), strict=True)]
    assert list(zip(*words(seeds, offsets), strict=True)) == pairs


def test_weights_are_exponentials():
    x = torch.linspace(-27.0, 0.0, 200_001)
    weights = weigh(x, 0.0, float(scales(torch.tensor(1.0))))
    error = (weights.double() / 2.0**ONE - x.double().exp()).abs()
    assert bool((error <= 1e-6 * x.double().exp() + 2.0**-ONE).all())
    assert bool((weights.diff() >= 0).all())
    assert weigh(torch.tensor([0.0, -29.0, -math.inf]), 0.0, 1.5).tolist() == [2**ONE, 0, 0]


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_supports_are_exact(impl):
    generator = torch.Generator().manual_seed(3)
    for trial in range(25):
        V, draws = (4, 9, 16)[trial % 3], 600
        row = (torch.randn(V, generator=generator) * 1.2).to((torch.float32, torch.bfloat16)[trial % 2])
        heat, k, p, floor = (
            (0.0, 0.8, 1.3)[trial % 3],
            (0, 3, 5)[trial // 3 % 3],
            (1.0, 0.7, 0.45)[trial // 2 % 3],
            (0.0, 0.2)[trial % 2],
        )
        arguments = {"temperature": heat, "top_k": k, "top_p": p, "min_p": floor}
        drawn = set(sample(row.expand(draws, V).contiguous(), **arguments, **keys(draws, trial), impl=impl).tolist())
        allowed = support(row, heat, k, p, floor)
        weights = {i: math.exp((row[i].item() - row.max().item()) / (heat or 1)) for i in allowed}
        likely = {i for i in allowed if weights[i] / sum(weights.values()) > 0.03}
        assert likely <= drawn <= allowed, (trial, arguments)


def test_ties_keep_the_smaller_ids():
    flat = torch.zeros(500, 8)
    assert set(sample(flat, top_k=3, **keys(500)).tolist()) == {0, 1, 2}
    assert set(sample(flat, top_p=0.5, **keys(500)).tolist()) == {0, 1, 2, 3}
    assert set(sample(flat, top_k=6, top_p=0.5, **keys(500)).tolist()) == {0, 1, 2}
    assert sample(flat[:3], temperature=0.0, **keys(3)).tolist() == [0, 0, 0]
    assert set(sample(flat, min_p=1.0, **keys(500)).tolist()) == set(range(8))
    signed = torch.tensor([[-0.0, 0.0]]).expand(50, 2).contiguous()
    assert set(sample(signed, top_k=1, **keys(50)).tolist()) == {0}


def test_awkward_logits():
    nan, inf = math.nan, math.inf
    logits = torch.tensor([[nan, 1.0, 0.0], [-inf, -inf, -inf], [nan, nan, nan], [inf, 0.0, inf], [-inf, -1e30, -inf]])
    for impl in ("cpu", "reference"):
        assert sample(logits, temperature=0.0, **keys(5), impl=impl).tolist() == [1, 0, 0, 0, 1]
        for start in range(20):
            ids = sample(logits, **keys(5, start), impl=impl).tolist()
            assert ids[0] in (1, 2) and ids[1] == ids[2] == 0 and ids[3] in (0, 2) and ids[4] == 1


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Fails when counts as far from the probabilities have a chance below 1e-3 (Wilson and Hilferty's approximation)."""
    expected = probabilities * counts.sum()
    statistic, freedom = float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1
    spread = 2 / (9 * freedom)
    deviate = ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    assert math.erfc(deviate / math.sqrt(2)) / 2 > 1e-3, (statistic, freedom)


@pytest.mark.parametrize(
    ("V", "draws", "arguments"),
    [
        (16, 200_000, {"temperature": 0.9}),
        (50, 200_000, {"min_p": 0.05}),
        (300, 100_000, {}),
        (300, 100_000, {"top_p": 0.7}),
        (24, 100_000, {"top_k": 9, "top_p": 0.9, "temperature": 1.4}),
    ],
)
def test_draws_follow_the_distribution(V, draws, arguments):
    row = torch.randn(V, generator=torch.Generator().manual_seed(V))
    ids = sample(row.expand(draws, V), **arguments, seeds=torch.full((draws,), 17), offsets=torch.arange(draws))
    heat = arguments.get("temperature", 1.0)
    kept = sorted(support(row, heat, arguments.get("top_k", 0), arguments.get("top_p", 1.0), arguments.get("min_p", 0.0)))
    weights = (row.double() / heat).softmax(0).numpy()[kept]
    counts = np.bincount(ids.numpy(), minlength=V)
    assert counts[kept].sum() == draws
    chi_square(counts[kept], weights / weights.sum())


def test_seeds_are_as_good_as_offsets():
    row = torch.randn(12, generator=torch.Generator().manual_seed(1))
    ids = sample(row.expand(100_000, 12), seeds=torch.arange(100_000), offsets=torch.full((100_000,), 3))
    chi_square(np.bincount(ids.numpy(), minlength=12), row.double().softmax(0).numpy())


def test_cpu_path_equals_the_reference_on_thousands_of_rows():
    generator = torch.Generator().manual_seed(11)
    for trial in range(60):
        V = (1, 2, 7, 64, 257, 1000)[trial % 6]
        dtype = (torch.float32, torch.bfloat16, torch.float16)[trial % 3]
        logits, chosen = random_logits(40, V, generator, dtype), options(40, generator)
        ids = sample(logits, **chosen, **keys(40, trial), impl="cpu")
        assert torch.equal(ids, sample(logits, **chosen, **keys(40, trial), impl="reference"))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 9), st.integers(1, 300), st.integers(0, 2**31), st.sampled_from([torch.float32, torch.bfloat16]))
def test_cpu_path_equals_the_reference_on_any_shape(B, V, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    padded = random_logits(B, V + 5, generator, dtype)[:, :V]
    chosen = options(B, generator)
    ids = sample(padded, **chosen, **keys(B, seed), impl="cpu")
    assert torch.equal(ids, sample(padded, **chosen, **keys(B, seed), impl="reference"))


def test_a_row_draws_the_same_in_any_batch_and_position():
    generator = torch.Generator().manual_seed(5)
    logits, chosen, key = random_logits(48, 333, generator), options(48, generator), keys(48)
    ids = sample(logits, **chosen, **key)
    order = torch.randperm(48, generator=generator)
    moved = sample(logits[order], **{k: v[order] for k, v in (chosen | key).items()})
    assert torch.equal(moved, ids[order])
    for row in range(0, 48, 5):
        one = slice(row, row + 1)
        assert sample(logits[one], **{k: v[one] for k, v in (chosen | key).items()}).item() == ids[row]


def test_scalars_and_tensors_agree():
    logits = random_logits(16, 200, torch.Generator().manual_seed(2))
    scalars = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01}
    tensors = {
        name: torch.full((16,), value, dtype=torch.int32 if name == "top_k" else torch.float32)
        for name, value in scalars.items()
    }
    wanted = sample(logits, **scalars, **keys(16))
    assert torch.equal(wanted, sample(logits, **tensors, **keys(16)))
    out = torch.empty(16, dtype=torch.int32)
    assert sample(logits, **scalars, **keys(16), out=out) is out and torch.equal(out, wanted)
    assert torch.equal(wanted, sample(logits, **scalars | {"top_k": tensors["top_k"]}, **keys(16)))


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("top_p", 0.0),
        ("top_p", 2),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("temperature", -1.0),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_k", 2.0),
        ("top_k", True),
        ("top_k", torch.zeros(4, dtype=torch.int64)),
        ("temperature", torch.ones(3)),
        ("seeds", torch.zeros(4, dtype=torch.int32)),
        ("offsets", torch.zeros(5, dtype=torch.int64)),
        ("logits", torch.zeros(4, 0)),
        ("logits", torch.zeros(4, 8, dtype=torch.int32)),
        ("logits", torch.zeros(8, 4).T),
        ("out", torch.zeros(4, dtype=torch.int64)),
    ],
)
def test_contract_errors_name_the_argument(name, bad):
    arguments = {"logits": torch.zeros(4, 8), **keys(4)} | {name: bad}
    with pytest.raises(ContractError, match=f"sample: `{name}` must"):
        sample(**arguments)


def test_values_of_tensors_are_checked_on_request(monkeypatch):
    bad = torch.tensor([0.5, 0.0])
    sample(torch.zeros(2, 4), top_p=bad, **keys(2))
    monkeypatch.setattr(core_op, "_VALUES", True)
    with pytest.raises(ContractError, match=r"sample: `top_p` must hold a number in \(0, 1\] in every row, got 0.0"):
        sample(torch.zeros(2, 4), top_p=bad, **keys(2))


def test_works_under_torch_compile():
    logits = torch.randn(3, 50)
    compiled = torch.compile(lambda x: sample(x * 2, top_k=5, **keys(3)), backend="eager", fullgraph=True)
    assert torch.equal(compiled(logits), sample(logits * 2, top_k=5, **keys(3)))
