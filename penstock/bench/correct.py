"""The correctness gate of a benchmark: a contestant that does not agree with the operator's reference gets no number.

`penstock.testing.check_case` compares on the CPU in float64, which takes minutes at benchmark shapes. Here the same reference
runs where the inputs are, widened to float64, and the same budget judges a random million of the values; every value is
still checked for NaN. Where the reference would need more memory than there is, attention is judged on blocks of query rows.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from penstock.bench.inputs import Arguments, copy_arguments, tensors_of
from penstock.core.op import Op
from penstock.testing import judge
from penstock.testing.budget import CODES, judge_bits, poisoned

SAMPLE = 1_000_000
# Float64 scores that one block of an attention reference may hold.
SCORE_BYTES = 4 * 2**30
QUERY_ROWS = 64
# Peers round differently and have no budget of ours: this only catches a peer that computes something else.
PEER_ERROR = 0.03


# Rows of tiles compared at a time.
BAND = 16


# References that loop over rows, each of which depends on its own row alone: judged on a few random rows.
ROWWISE = {
    "sample": ("logits", "seeds", "offsets", "temperature", "top_k", "top_p", "min_p"),
    "log_probs": ("logits", "ids"),
    "apply_penalties": ("logits", "output_counts", "prompt_mask", "repetition", "presence", "frequency"),
}
ROWS = 16


# What a part of a call must give: the rows of the whole that it holds (None: all), exactly, and in the inputs' own dtype.
Expected = list[tuple[Tensor | None, dict[str, Tensor], dict[str, Tensor]]]


def verify(op: Op, impl: str, arguments: Arguments, expected: Expected | None = None) -> str:
    """Why the implementation's results on these arguments are wrong, or "" when they are right.

    Args:
        expected: what `expect` gave for the arguments, where several contestants are judged by it.
    """
    with torch.no_grad():
        with poisoned():
            got = results(op, copy_arguments(arguments), impl)
        for rows, exact, same in expect(op, arguments) if expected is None else expected:
            if not len(got) == len(exact) == len(same):
                return f"{len(got)} results, the reference has {len(exact)}"
            for name, value in got.items():
                mine = value if rows is None else value[rows]
                try:
                    if op.exact:
                        judge_bits(f"{name} of {op.name}, {impl}", mine, exact[name])
                    else:
                        _judge(f"{name} of {op.name}, {impl}", mine, exact[name], same[name], op.tile)
                except AssertionError as error:
                    return str(error)
    return ""


def expect(op: Op, arguments: Arguments) -> Iterator[tuple[Tensor | None, dict[str, Tensor], dict[str, Tensor]]]:
    """The results that the operator's reference gives, part by part."""
    plain = "baseline" if op.has_baseline else "reference"
    with torch.no_grad():
        for part, rows in _parts(op, arguments):
            exact = results(op, copy_arguments(part) if op.exact else _widen(copy_arguments(part)), "reference")
            yield rows, exact, results(op, copy_arguments(part), plain)


def results(op: Op, arguments: Arguments, impl: str) -> dict[str, Tensor]:
    """What a call returns and what it changes in place, by name."""
    returned = op(**arguments, impl=impl)
    returned = returned if isinstance(returned, tuple) else (returned,)
    found = {f"result {i}": value for i, value in enumerate(returned) if isinstance(value, Tensor)}
    for argument in op.arguments:
        value = arguments.get(argument.name)
        if argument.is_write and not argument.name.startswith("out") and isinstance(value, Tensor):
            found[argument.name] = value
    return found


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


def _judge(name: str, got: Tensor, exact: Tensor, same: Tensor, tile: int | None = None) -> None:
    count = got.numel()
    if tile is not None and got.dim() == 2 and got.shape == exact.shape:
        # In bands, which bounds the memory of the comparison; a band is a row of tiles.
        for first in range(0, max(len(got), 1), BAND * tile):
            band = slice(first, first + BAND * tile)
            judge(f"{name}, rows from {first}", got[band], exact[band], same[band], tile)
        return
    if count > SAMPLE and got.shape == exact.shape:
        countable = got.dtype.is_floating_point and got.dtype not in CODES
        wrong = got.isfinite() != exact.isfinite() if countable else None
        if wrong is not None and bool(wrong.any()):
            raise AssertionError(
                f"{name}: {int(wrong.sum())} of {count} values are finite where the reference's are not, or not"
            )
        chosen = torch.randint(0, count, (SAMPLE,), device=got.device)
        got, exact, same = (values.reshape(-1)[chosen] for values in (got, exact, same))
    judge(name, got, exact, same)


def _widen(arguments: Arguments) -> Arguments:
    def widen(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.dtype.is_floating_point else value

    return {name: widen(value) for name, value in arguments.items()}


def _parts(op: Op, arguments: Arguments) -> Iterator[tuple[Arguments, Tensor | None]]:
    """The calls to compare, each with the rows of the whole result that it computes; None: all of them."""
    if op.name in ROWWISE and len(arguments["logits"]) > ROWS:
        logits = arguments["logits"]
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
    if isinstance(part.get("q_scale"), Tensor) and part["q_scale"].shape[:1] == arguments["q"].shape[:1]:
        part["q_scale"] = part["q_scale"][start:stop]
    return part
