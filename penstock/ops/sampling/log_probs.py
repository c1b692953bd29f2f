"""log softmax of the chosen ids, their ranks, and the best ids of each row."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost, nbytes
from penstock.core.check import DENSE, FLOATS, count
from penstock.core.op import op

SPEC = {
    "logits": ("B V", FLOATS, DENSE),
    "ids": ("B", torch.int32),
    "top_n": count,
}


@op(
    "(Tensor(a!) out_chosen, Tensor(b!) out_ranks, Tensor(c!) out_ids, Tensor(d!) out_top, Tensor logits, Tensor ids, "
    "int top_n) -> ()",
    SPEC,
)
def log_probs(logits: Tensor, ids: Tensor, *, top_n: int, impl: str = "auto") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Natural-log softmax of the logits as given, at the chosen ids and at the top_n best.

    A row is ordered by logit, larger first, and by id, smaller first, where logits are equal. NaN logits count as -inf, and
    a row that holds nothing above -inf has log-probabilities of -inf.

    Args:
        logits: [B, V] float32, bfloat16 or float16; stride 1 along V.
        ids: [B] int32, the chosen ids; an id outside [0, V), as in a padding row, gets -inf and rank 0.
        top_n: how many best ids, 0 … V.
        impl: "auto", "triton", "cpu" or "reference".
    Returns:
        chosen: [B] float32 (float64 for float64 logits), the log-probabilities of ids.
        ranks: [B] int32, 1 for the best id of the row.
        top_ids: [B, top_n] int32, best first.
        top_logprobs: [B, top_n], dtype of chosen.
    Raises: ContractError when shapes, dtypes or top_n disagree; NotSupported when no implementation takes the call.
    """
    launch = log_probs.pick(impl, logits, ids, top_n)
    B, V = logits.shape
    if top_n > V:
        raise log_probs.contract.error("top_n", f"must be at most V={V}, got {top_n}", {"logits": logits})
    dtype = torch.promote_types(logits.dtype, torch.float32)
    chosen = torch.empty(B, dtype=dtype, device=logits.device)
    ranks = torch.empty(B, dtype=torch.int32, device=logits.device)
    top_ids = torch.empty(B, top_n, dtype=torch.int32, device=logits.device)
    top = torch.empty(B, top_n, dtype=dtype, device=logits.device)
    launch(chosen, ranks, top_ids, top, logits, ids, top_n)
    return chosen, ranks, top_ids, top


def widen(logits: Tensor) -> Tensor:
    """At least float32, NaN replaced by -inf."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.where(wide.isnan(), -math.inf, wide)


def at_ids(wide: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(inside, logits of the ids): -inf for an id outside the vocabulary."""
    V = wide.shape[1]
    inside = (ids >= 0) & (ids < V)
    if V == 0:
        return inside, wide.new_full(ids.shape, -math.inf)
    gathered = wide.gather(1, torch.where(inside, ids, 0).to(torch.int64)[:, None])[:, 0]
    return inside, torch.where(inside, gathered, -math.inf)


@log_probs.reference
def _reference(logits: Tensor, ids: Tensor, top_n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = widen(logits)
    total = wide.logsumexp(1)
    inside, logit = at_ids(wide, ids)
    # A row of -inf alone has a total of -inf, and -inf - (-inf) would be NaN.
    total = torch.where(total.isneginf(), 0.0, total)
    columns = torch.arange(wide.shape[1], device=ids.device)
    better = (wide > logit[:, None]) | ((wide == logit[:, None]) & (columns < ids[:, None]))
    ranks = torch.where(inside, better.sum(1) + 1, 0).to(torch.int32)
    ordered, order = wide.sort(dim=1, descending=True, stable=True)
    return logit - total, ranks, order[:, :top_n].to(torch.int32), ordered[:, :top_n] - total[:, None]


def best_ids(logits: Tensor, top_n: int) -> Tensor:
    """[B, top_n] int64, the first ids of each row's order, by torch.topk over keys that no two ids share.

    The high half of a key orders float32 logits as integers, the low half the ids, so that topk has no ties to break.
    """
    wide = widen(logits).to(torch.float32) + 0.0
    bits = wide.view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    columns = torch.arange(logits.shape[1], device=logits.device)
    keys = (ordered.to(torch.int64) << 32) + (0x7FFFFFFF - columns)
    return 0x7FFFFFFF - (keys.topk(top_n, dim=1).values & 0x7FFFFFFF)


# 32 and 40 bytes with Triton 3.9, none with 3.6.
@log_probs.impl("triton", needs=("triton",), spill_bytes=40)
def _triton(chosen: Tensor, ranks: Tensor, top_ids: Tensor, top: Tensor, logits: Tensor, ids: Tensor, top_n: int) -> None:
    """The best ids are torch.topk's, on the same device, where there are many."""
    from penstock.ops.sampling.log_probs_triton import MOST, launch

    best = best_ids(logits, top_n) if top_n > MOST else None
    launch(chosen, ranks, top_ids, top, logits, ids, best)


@log_probs.impl("cpu", needs=("cpu",))
def _cpu(chosen: Tensor, ranks: Tensor, top_ids: Tensor, top: Tensor, logits: Tensor, ids: Tensor, top_n: int) -> None:
    wide = widen(logits)
    total = wide.logsumexp(1)
    total = torch.where(total.isneginf(), 0.0, total)
    inside, logit = at_ids(wide, ids)
    chosen.copy_(logit - total)
    for row, (own, token) in enumerate(zip(logit.tolist(), ids.tolist(), strict=True)):
        before = int((wide[row] > own).sum()) + int((wide[row, : max(token, 0)] == own).sum())
        ranks[row] = before + 1 if bool(inside[row]) else 0
    if top_n:
        # float64 logits may differ where float32 keys agree.
        best = (
            best_ids(wide, top_n)
            if wide.dtype == torch.float32
            else wide.argsort(dim=1, descending=True, stable=True)[:, :top_n]
        )
        top_ids.copy_(best)
        top.copy_(wide.gather(1, best) - total[:, None])


@log_probs.cost
def _cost(logits: Tensor, ids: Tensor, top_n: int) -> Cost:
    return Cost(bytes=nbytes(logits) + logits.shape[0] * (12 + 8 * top_n))


@log_probs.cases
def cases() -> Iterable[Case]:
    """Vocabularies, ties, masked rows and padding ids."""

    def case(
        name: str,
        B: int,
        V: int,
        top_n: int,
        *,
        dtype: torch.dtype = torch.float32,
        hidden: int = 0,
        padded: bool = False,
        bench: bool = False,
    ) -> Case:
        def build(make: Any) -> dict[str, Any]:
            logits = make.randn(B, V, dtype=dtype, scale=3.0)
            if hidden:
                logits = logits.masked_fill(make.integers(0, 100, B, V) < hidden, -math.inf)
            ids = make.integers(-1 if padded else 0, V, B)
            return {"logits": logits, "ids": ids, "top_n": top_n}

        return Case(name, build, bench)

    yield case("ragged_no_top", 5, 1003, 0)
    yield case("bf16_ties", 4, 3000, 20, dtype=torch.bfloat16)
    yield case("float16_hidden", 3, 515, 5, dtype=torch.float16, hidden=80)
    yield case("all_hidden", 2, 260, 3, hidden=100)
    yield case("padded_ids", 9, 3, 3, padded=True)
    yield case("single_column", 3, 1, 1)
    yield case("empty", 0, 100, 5)
    yield case("vocabulary_128256", 2, 128256, 8)
    for B in (1, 64, 512):
        yield case(f"decode_{B}x128k", B, 131072, 0, bench=True)
        yield case(f"decode_{B}x128k_top_20", B, 131072, 20, bench=True)
