"""One token id a row: temperature → top-k → softmax → top-p → min-p → draw; the same id on every machine."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost, nbytes
from penstock.core.check import DENSE, FLOATS, anything
from penstock.core.op import op
from penstock.ops.sampling._options import OPTION, Range, check_rows, rows_of, split
from penstock.ops.sampling._philox import words_of
from penstock.ops.sampling._weights import TILE, TURNS, clean, draw, keep, scales, weigh_tiles

SPEC = {
    "logits": ("B V", FLOATS, DENSE),
    "seeds": ("B", torch.int64),
    "offsets": ("B", torch.int64),
    "temperature?": ("B", OPTION),
    "top_k?": ("B", torch.int32),
    "top_p?": ("B", OPTION),
    "min_p?": ("B", OPTION),
    "out?": ("B", torch.int32),
    "temperature_value": anything,
    "top_k_value": anything,
    "top_p_value": anything,
    "min_p_value": anything,
}
RANGES: dict[str, Range] = {
    "temperature": (lambda x: (x >= 0) & (x < math.inf), "a finite number >= 0"),
    "top_k": (lambda x: x >= 0, "an integer >= 0"),
    "top_p": (lambda x: (x > 0) & (x <= 1), "a number in (0, 1]"),
    "min_p": (lambda x: (x >= 0) & (x <= 1), "a number in [0, 1]"),
}


@op(
    "(Tensor(a!) out, Tensor logits, Tensor seeds, Tensor offsets, Tensor? temperature, Tensor? top_k, Tensor? top_p, "
    "Tensor? min_p, float temperature_value, int top_k_value, float top_p_value, float min_p_value) -> ()",
    SPEC,
)
def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seeds: Tensor,
    offsets: Tensor,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Draws one token id a row from softmax(logits / temperature), filtered.

    The order of a row is by logit, larger first, and by id, smaller first, where logits are equal. Top-k keeps the first k
    ids. Top-p keeps the shortest run from the first on whose share of the mass that top-k left is at least p. Min-p keeps
    what has at least min_p times the probability of the first. The draw inverts the cumulative mass by
    ascending id, at Philox4x32-10 uniforms of 64 bits keyed by the seed, with the offset and the turn as counter. Under top-k
    it inverts the mass of what is kept, at turn 0. Otherwise it inverts the mass of the whole row, over tiles of 128 ids and
    then inside one, until the id is one that top-p and min-p keep, in turns 0 to 31, and what is kept at turn 32.

    Guaranteed: the id depends on the row's logits, options, seed and offset alone, and is equal, not merely equally
    distributed, in every implementation, batch, position and replay, on CPUs and GPUs. Weights are integers, made by float32
    operations that round alike everywhere (_weights.py); sums and comparisons of integers have no rounding and no order.
    What this costs: a weight is off by float32's rounding (relative 2**-22, more where the exponent is large, as in any
    float32 softmax) and by up to 2**-40 of the largest; below 2**-40 of the largest it is zero and never drawn.

    NaN logits count as -inf, +inf as the largest finite number; -inf is never drawn, unless a row holds nothing else: id 0.

    Args:
        logits: [B, V] float32, bfloat16 or float16 (float64 is rounded to float32); stride 1 along V, any V from 1 on.
        temperature: number or [B] float32, at least 0; 0 takes the first id of the order.
        top_k: integer or [B] int32; 0, or V and more, keeps all.
        top_p: number or [B] float32 in (0, 1]; 1 keeps all.
        min_p: number or [B] float32 in [0, 1]; 0 keeps all.
        seeds, offsets: [B] int64; a (seed, offset) used twice draws the same uniform twice.
        out: [B] int32.
        impl: "auto", "triton", "cpu" or "reference".
    Returns: [B] int32.
    Raises: ContractError when shapes, dtypes or scalar options disagree (tensor options are read only with
        PENSTOCK_CHECK=values); NotSupported when no implementation takes the call.
    Source: Holtzman et al., arXiv:1904.09751 (top-p); Nguyen et al., arXiv:2407.01082 (min-p).
    """
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    tensors, values = split(sample, RANGES, options, logits)
    launch = sample.pick(impl, logits, seeds, offsets, *tensors, out, *values)
    if logits.shape[1] == 0:
        raise sample.contract.error("logits", "must have at least one column", {"logits": logits})
    out = torch.empty(logits.shape[0], dtype=torch.int32, device=logits.device) if out is None else out
    launch(out, logits, seeds, offsets, *tensors, *values)
    return out


@sample.check_values
def _check_values(**arguments: Any) -> None:
    check_rows(sample, RANGES, arguments)


def draw_id(row: Tensor, seed: int, offset: int, temperature: Tensor, k: int, p: float, floor: float) -> int:
    """The id that a clean row draws."""
    kept = keep(row, temperature, k, p, floor)
    turn = 0
    if temperature > 0 and row.max() > -math.inf and not 0 < k < len(row):
        masses, weights = weigh_tiles(row[None], row.max()[None], scales(temperature)[None])
        while turn < TURNS:
            bits, more = words_of(seed, offset, turn=turn)
            tile = _invert(masses[0], bits)
            drawn = tile * TILE + _invert(weights[0, tile], more)
            if (p >= 1 and floor == 0) or kept[drawn] > 0:
                return drawn
            turn += 1
    return _invert(kept, words_of(seed, offset, turn=turn)[0])


def _invert(weights: Tensor, bits: int) -> int:
    """The position where the cumulative weights pass a uniform share of their sum."""
    cumulative = weights.cumsum(0)
    return int((cumulative <= draw(bits, int(cumulative[-1]))).sum())


@sample.reference
def _reference(
    logits: Tensor,
    seeds: Tensor,
    offsets: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    temperature_value: float,
    top_k_value: int,
    top_p_value: float,
    min_p_value: float,
) -> Tensor:
    """Sorts every row and inverts its cumulative mass."""
    options = (
        rows_of(temperature, temperature_value, logits).cpu(),
        rows_of(top_k, top_k_value, logits, torch.int32).tolist(),
        rows_of(top_p, top_p_value, logits).tolist(),
        rows_of(min_p, min_p_value, logits).tolist(),
    )
    ids = []
    for row, seed, offset, *filters in zip(clean(logits).cpu(), seeds.tolist(), offsets.tolist(), *options, strict=True):
        ids.append(draw_id(row, seed, offset, *filters))
    return torch.tensor(ids, dtype=torch.int32)


# Triton 3.9 spills in row_kernel: 40 bytes for vocabularies of 2,048 tiles, 8 for some others.
@sample.impl("triton", needs=("triton",), spill_bytes=40)
def _triton(out: Tensor, *arguments: Any) -> None:
    from penstock.ops.sampling.sample_triton import launch

    launch(out, *arguments)


@sample.impl("cpu", needs=("cpu",))
def _cpu(out: Tensor, *arguments: Any) -> None:
    from penstock.ops.sampling.sample_cpu import launch

    launch(out, *arguments)


@sample.cost
def _cost(logits: Tensor, **options: object) -> Cost:
    return Cost(bytes=nbytes(logits) + 4 * logits.shape[0])


@sample.cases
def cases() -> Iterable[Case]:
    """Vocabularies of models, ties, masks and extreme options, then the shapes of decoding steps."""

    def case(
        name: str,
        B: int,
        V: int,
        *,
        dtype: torch.dtype = torch.float32,
        scale: float = 2.0,
        mask: float | None = None,
        bench: bool = False,
        **options: object,
    ) -> Case:
        def build(make: Any) -> dict[str, Any]:
            logits = make.randn(B, V, dtype=dtype, scale=scale)
            if mask is not None:
                hidden = make.integers(0, 100, B, V)
                logits = logits.masked_fill(hidden < mask * 100, -math.inf)
            given = {key: make.tensor(*option) if isinstance(option, tuple) else option for key, option in options.items()}
            return {
                "logits": logits,
                "seeds": make.integers(-(2**62), 2**62, B, dtype=torch.int64),
                "offsets": make.integers(0, 2**40, B, dtype=torch.int64),
                **given,
            }

        return Case(name, build, bench)

    mixed: dict[str, Any] = {
        "temperature": ([0.0, 0.7, 1.0, 1.0, 1.3, 1e-4, 1e4, 1.0], torch.float32),
        "top_k": ([5, 0, 1, 40, 0, 7, 3, 0], torch.int32),
        "top_p": ([0.9, 1.0, 0.5, 0.8, 0.9, 1.0, 0.7, 1e-6], torch.float32),
        "min_p": ([0.0, 0.1, 0.0, 0.0, 0.02, 1.0, 0.0, 0.0], torch.float32),
    }
    yield case("mixed_ragged", 8, 1000, **mixed)
    yield case("mixed_bf16_ties", 8, 3001, dtype=torch.bfloat16, scale=0.2, **mixed)
    yield case("masked_padded_rows", 8, 517, dtype=torch.float16, mask=0.99, **mixed)
    yield case("all_hidden", 3, 300, mask=1.0, top_p=0.9)
    yield case("empty", 0, 512, top_k=3)
    yield case("single_column", 4, 1, temperature=0.5, top_p=0.3)
    yield case("greedy_32000", 2, 32000, temperature=0.0, scale=1.0)
    yield case("plain_32000", 2, 32000)
    yield case("top_k_128256", 1, 128256, top_k=50, top_p=0.95)
    yield case("top_p_flat_32000", 1, 32000, scale=0.5, top_p=0.9)
    yield case("top_p_peaked_128256", 1, 128256, scale=5.0, top_p=0.9, min_p=0.01)
    kinds: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0.0},
        "plain": {},
        "top_k": {"top_k": 50},
        "top_p": {"top_p": 0.9},
        "top_k_top_p": {"top_k": 50, "top_p": 0.9},
    }
    for V, name in ((131072, "128k"), (32768, "32k"), (262144, "256k")):
        for B in (1, 64, 512):
            for kind, chosen in kinds.items():
                if kind != "plain" or V == 131072:
                    yield case(f"{kind}_{B}x{name}", B, V, bench=True, **chosen)
