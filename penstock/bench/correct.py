"""The correctness gate of a benchmark: a contestant that does not agree with the operator's reference gets no number.

The same budget as in `penstock.testing.check_case` judges a random million of the values; every value is
still checked for NaN. Where the reference would need more memory than there is, attention is judged on blocks of query rows.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from penstock.bench.inputs import tensors_of
from penstock.core.op import Op
from penstock.testing.budget import (
    CODES,
    Arguments,
    Expected,
    copy_arguments,
    expect,
    judge_result,
    poisoned,
    results,
)

SAMPLE = 1_000_000
# Float64 scores that one block of an attention reference may hold.
SCORE_BYTES = 4 * 2**30
QUERY_ROWS = 64
# Queries that one element of attention's block mask stands for.
MASK_BLOCK = 128
# Peers round differently and have no budget of ours: this only catches a peer that computes something else.
PEER_ERROR = 0.03


# Rows of tiles compared at a time.
BAND = 16


# References that loop over rows, each of which depends on its own row alone: judged on a few random rows, counted by the first.
ROWWISE = {
    "sample": ("logits", "seeds", "offsets", "temperature", "top_k", "top_p", "min_p"),
    "verify_draft": (
        "target_logits",
        "draft_ids",
        "draft_probs",
        "seeds",
        "offsets",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
    ),
    "log_probs": ("logits", "ids"),
    "apply_penalties": ("logits", "output_counts", "prompt_mask", "repetition", "presence", "frequency"),
}
ROWS = 16


# What each part of a call must give, and the rows of the whole that it holds (None: all).
Parts = list[tuple[Tensor | None, dict[str, Expected]]]


def verify(op: Op, impl: str, arguments: Arguments, expected: Parts | None = None) -> str:
    """Why the implementation's results on these arguments are wrong, or "" when they are right.

    Args:
        expected: what `expect_parts` gave for the arguments, where several contestants are judged by it.
    """
    with torch.no_grad():
        with poisoned():
            got = results(op, copy_arguments(arguments), impl)
        for rows, wanted in expect_parts(op, arguments) if expected is None else expected:
            if list(got) != list(wanted):
                return f"results {list(got)}, the reference has {list(wanted)}"
            for name, value in got.items():
                try:
                    _judge(f"{name} of {op.name}, {impl}", op, value if rows is None else value[rows], wanted[name])
                except AssertionError as error:
                    return str(error)
    return ""


def expect_parts(op: Op, arguments: Arguments) -> Iterator[tuple[Tensor | None, dict[str, Expected]]]:
    """The results that the operator's reference gives, part by part."""
    with torch.no_grad():
        for part, rows in _parts(op, arguments):
            yield rows, expect(op, part)


def disagreement(peer: Any, ours: Any) -> str:
    """Why a peer's results are not those of ours, or ""; indices (sampled tokens) are compared by shape alone.

    A peer may return fewer results than ours, in our order.
    """
    mine, theirs = tensors_of(ours), tensors_of(peer)
    if not theirs:
        return "returns no tensor"
    for first, other in zip(mine, theirs, strict=False):
        if first.numel() != other.numel():
            return f"returns shape {list(other.shape)}, ours {list(first.shape)}"
        if not first.dtype.is_floating_point:
            continue
        # Pages that nobody wrote may hold NaN on both sides.
        wide, narrow = first.reshape(-1).float().nan_to_num(), other.reshape(-1).float().nan_to_num()
        error = float((narrow - wide).norm() / wide.norm().clamp_min(1e-30))
        if error > PEER_ERROR:
            return f"differs from ours by {error:.2g} in norm, at most {PEER_ERROR} passes"
    return ""


def _judge(name: str, op: Op, got: Tensor, expected: Expected) -> None:
    count = got.numel()
    if op.tile is not None and got.dim() == 2 and got.shape == expected.exact.shape and expected.single is None:
        # In bands, which bounds the memory of the comparison; a band is a row of tiles.
        for first in range(0, max(len(got), 1), BAND * op.tile):
            band = slice(first, first + BAND * op.tile)
            part = Expected(expected.exact[band], expected.same[band])
            judge_result(f"{name}, rows from {first}", op, got[band], part)
        return
    if count > SAMPLE and got.shape == expected.exact.shape and not op.exact:
        countable = got.dtype.is_floating_point and got.dtype not in CODES
        wrong = got.isfinite() != expected.exact.isfinite() if countable else None
        if wrong is not None and bool(wrong.any()):
            raise AssertionError(
                f"{name}: {int(wrong.sum())} of {count} values are finite where the reference's are not, or not"
            )
        chosen = torch.randint(0, count, (SAMPLE,), device=got.device)
        single = None if expected.single is None else expected.single.reshape(-1)[chosen]
        expected = Expected(expected.exact.reshape(-1)[chosen], expected.same.reshape(-1)[chosen], single)
        got = got.reshape(-1)[chosen]
    judge_result(name, op, got, expected)


def _parts(op: Op, arguments: Arguments) -> Iterator[tuple[Arguments, Tensor | None]]:
    """The calls to compare, each with the rows of the whole result that it computes; None: all of them."""
    if op.name in ROWWISE and len(arguments[ROWWISE[op.name][0]]) > ROWS:
        logits = arguments[ROWWISE[op.name][0]]
        chosen = torch.randperm(len(logits), device=logits.device)[:ROWS]
        rows = {name: arguments[name] for name in ROWWISE[op.name] if isinstance(arguments.get(name), Tensor)}
        yield {**arguments, **{name: value[chosen] for name, value in rows.items()}}, chosen
        return
    q, cu = arguments.get("q"), arguments.get("cu_seqlens_q")
    if q is None or cu is None or "causal" not in {argument.name for argument in op.arguments}:
        yield arguments, None
        return
    bounds = cu.tolist()
    paged = "seqlens_k" in arguments
    starts_k: list[int] | None = None if paged else arguments["cu_seqlens_k"].tolist()
    lengths_k = arguments["seqlens_k"].tolist() if starts_k is None else [b - a for a, b in pairwise(starts_k)]
    requests = [(begin, end, length) for (begin, end), length in zip(pairwise(bounds), lengths_k, strict=True)]
    scores = sum((end - begin) * length for begin, end, length in requests) * q.shape[1] * 8
    if scores <= SCORE_BYTES:
        yield arguments, None
        return
    causal = arguments.get("causal", True)
    for request, (begin, end, length) in enumerate(requests):
        for stop in sorted({begin + QUERY_ROWS, begin + (end - begin) // 2, end}):
            stop = min(stop, end)
            start = max(begin, stop - QUERY_ROWS)
            if arguments.get("block_mask") is not None and begin < stop:
                # The rows of a part lie in one block of the mask, from its first row on.
                start = begin + (stop - 1 - begin) // MASK_BLOCK * MASK_BLOCK
            if start == stop:
                continue
            # Aligned bottom-right, the first `seen` keys make row stop - 1 the last row of a shorter request.
            seen = length - (end - stop) if causal else length
            if seen <= 0 or (not causal and arguments.get("window") not in (None, (-1, -1)) and stop != end):
                continue
            yield _rows(arguments, request, start, stop, seen, starts_k), torch.arange(start, stop, device=q.device)


def _rows(arguments: Arguments, request: int, start: int, stop: int, seen: int, starts_k: list[int] | None) -> Arguments:
    """A call of one request: query rows start … stop - 1 against its first `seen` keys."""
    device = arguments["q"].device

    def ends(count: int) -> Tensor:
        return torch.tensor([0, count], dtype=torch.int32, device=device)

    part = dict(arguments, q=arguments["q"][start:stop], cu_seqlens_q=ends(stop - start), max_seqlen_q=stop - start)
    if starts_k is None:
        part["seqlens_k"] = torch.tensor([seen], dtype=torch.int32, device=device)
        part["page_table"] = arguments["page_table"][request : request + 1]
    else:
        first = starts_k[request]
        part.update(k=arguments["k"][first : first + seen], v=arguments["v"][first : first + seen])
        part.update(cu_seqlens_k=ends(seen), max_seqlen_k=seen)
    if isinstance(part.get("block_mask"), Tensor):
        block = (start - int(arguments["cu_seqlens_q"][request])) // MASK_BLOCK
        part["block_mask"] = part["block_mask"][request : request + 1, :, block : block + 1]
    if isinstance(part.get("q_scale"), Tensor) and part["q_scale"].shape[:1] == arguments["q"].shape[:1]:
        part["q_scale"] = part["q_scale"][start:stop]
    return part
