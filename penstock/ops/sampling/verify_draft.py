"""Accept draft id x with probability min(1, p(x)/q(x)); then one id more, from max(0, p - q) after a rejection, else from p."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost, nbytes
from penstock.core.check import DENSE, FLOATS, anything
from penstock.core.op import op
from penstock.ops.sampling._options import OPTION, check_rows, rows_of, split
from penstock.ops.sampling._philox import VERIFY_STREAM, words_of
from penstock.ops.sampling._weights import clean, draw, keep, share
from penstock.ops.sampling.sample import RANGES, draw_id

SPEC = {
    "draft_ids": ("B n", torch.int32),
    "draft_probs?": ("B n V", OPTION, DENSE),
    "target_logits": ("B n+1 V", FLOATS, DENSE),
    "seeds": ("B", torch.int64),
    "offsets": ("B", torch.int64),
    "temperature?": ("B", OPTION),
    "top_k?": ("B", torch.int32),
    "top_p?": ("B", OPTION),
    "min_p?": ("B", OPTION),
    "temperature_value": anything,
    "top_k_value": anything,
    "top_p_value": anything,
    "min_p_value": anything,
}


@op(
    "(Tensor(a!) out_accepted, Tensor(b!) out_ids, Tensor draft_ids, Tensor? draft_probs, Tensor target_logits, Tensor seeds, "
    "Tensor offsets, Tensor? temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p, float temperature_value, "
    "int top_k_value, float top_p_value, float min_p_value) -> ()",
    SPEC,
)
def verify_draft(
    draft_ids: Tensor,
    draft_probs: Tensor | None,
    target_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seeds: Tensor,
    offsets: Tensor,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Speculative decoding's check: how many of a request's n draft ids to keep, and the id that follows them.

    The ids returned are distributed as if each were drawn from the target, p = softmax of a position's logits, filtered as
    `sample` does, whatever the drafter. Position i uses the offset offsets + i, so that a request's next call starts at
    offsets + accepted + 1.

    Without draft_probs the drafter is taken to be certain of its ids. Then position i draws what `sample` draws at (seed,
    offset + i) and accepts a draft id that equals it: the ids are those of decoding one by one, not merely equally distributed,
    and the drafter may use the same seeds and offsets. With draft_probs the ids must have been drawn from them, independently
    of this operator; `sample` with the same seeds and offsets is independent. Position i accepts with probability
    min(1, p/q), else draws from max(0, p - q); after n accepted ids, or at an id outside [0, V), it draws as `sample` does.

    A result depends on the request's own arguments alone and is equal in every implementation, batch and replay, on CPUs and
    GPUs: weights are integers (_weights.py), and q is rounded down to a whole share of their sum. The distribution is exact up
    to that rounding and to the rounding of q itself, whose sum should be 1; q counts as 0 where it is NaN.

    Args:
        draft_ids: [B, n] int32, n may be 0; an id outside [0, V), as -1 past the end of a short draft, is never accepted.
        draft_probs: [B, n, V] float32, the distributions that the ids were drawn from; stride 1 along V; None when certain.
        target_logits: [B, n + 1, V] float32, bfloat16 or float16; position i follows i draft ids; stride 1 along V.
        temperature, top_k, top_p, min_p: of the target, as in `sample`; numbers or [B] tensors.
        seeds, offsets: [B] int64.
        impl: "auto", "triton", "cpu" or "reference".
    Returns:
        accepted: [B] int32, 0 … n.
        ids: [B, n + 1] int32: the accepted ids, the id drawn after them, then -1.
    Raises: ContractError when shapes, dtypes or scalar options disagree; NotSupported when no implementation takes the call.
    Source: Leviathan et al., arXiv:2211.17192.
    """
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    tensors, values = split(verify_draft, RANGES, options, target_logits)
    launch = verify_draft.pick(impl, draft_ids, draft_probs, target_logits, seeds, offsets, *tensors, *values)
    B, positions, V = target_logits.shape
    if V == 0:
        raise verify_draft.contract.error("target_logits", "must have at least one column", {"target_logits": target_logits})
    accepted = torch.empty(B, dtype=torch.int32, device=target_logits.device)
    ids = torch.empty(B, positions, dtype=torch.int32, device=target_logits.device)
    launch(accepted, ids, draft_ids, draft_probs, target_logits, seeds, offsets, *tensors, *values)
    return accepted, ids


@verify_draft.check_values
def _check_values(**arguments: Any) -> None:
    check_rows(verify_draft, RANGES, arguments)


@verify_draft.reference
def _reference(
    draft_ids: Tensor,
    draft_probs: Tensor | None,
    target_logits: Tensor,
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
) -> tuple[Tensor, Tensor]:
    """One position after the other, in Python's integers."""
    B, n = draft_ids.shape
    V = target_logits.shape[2]
    heats = rows_of(temperature, temperature_value, target_logits).cpu()
    ks = rows_of(top_k, top_k_value, target_logits, torch.int32).tolist()
    ps = rows_of(top_p, top_p_value, target_logits).tolist()
    floors = rows_of(min_p, min_p_value, target_logits).tolist()
    drafts = draft_ids.tolist()
    accepted, ids = [0] * B, [[-1] * (n + 1) for _ in range(B)]
    for b, (seed, offset) in enumerate(zip(seeds.tolist(), offsets.tolist(), strict=True)):
        for i in range(n + 1):
            row, filters = clean(target_logits[b, i]).cpu(), (ks[b], ps[b], floors[b])
            weights = keep(row, heats[b], *filters)
            mass = int(weights.sum())
            plain = draw_id(row, seed, offset + i, heats[b], *filters)
            proposed = drafts[b][i] if i < n else -1
            ids[b][i] = plain
            if not 0 <= proposed < V:
                break
            if draft_probs is None:
                if proposed != plain:
                    break
            else:
                bits, coin = words_of(seed, offset + i, VERIFY_STREAM)
                shares = torch.tensor([share(q, mass) for q in draft_probs[b, i].float().tolist()])
                if draw(coin, int(shares[proposed])) >= int(weights[proposed]):
                    rest = (weights - shares).clamp(min=0).cumsum(0)
                    # Nothing rests only where rounding made q at least p everywhere.
                    if rest[-1] > 0:
                        ids[b][i] = int((rest <= draw(bits, int(rest[-1]))).sum())
                    break
                ids[b][i] = proposed
            accepted[b] += 1
    return torch.tensor(accepted, dtype=torch.int32), torch.tensor(ids, dtype=torch.int32).reshape(B, n + 1)


@verify_draft.impl("triton", needs=("triton",), spill_bytes=144)
def _triton(accepted: Tensor, ids: Tensor, *arguments: Any) -> None:
    from penstock.ops.sampling.verify_draft_triton import launch

    launch(accepted, ids, *arguments)


@verify_draft.impl("cpu", needs=("cpu",))
def _cpu(accepted: Tensor, ids: Tensor, *arguments: Any) -> None:
    from penstock.ops.sampling.verify_draft_cpu import launch

    launch(accepted, ids, *arguments)


@verify_draft.cost
def _cost(draft_ids: Tensor, draft_probs: Tensor | None, target_logits: Tensor, **options: object) -> Cost:
    """A request is rejected at most once, so that one position of draft_probs is read whole at most."""
    probs = 0 if draft_probs is None else draft_probs[:, :1].numel() * draft_probs.element_size()
    return Cost(bytes=nbytes(target_logits, draft_ids) + probs + 4 * draft_ids.numel() + 8 * draft_ids.shape[0])


@verify_draft.cases
def cases() -> Iterable[Case]:
    """Drafts that agree and that do not, short drafts, greedy rows, hidden logits; then batches of decoding."""

    def case(
        name: str,
        B: int,
        n: int,
        V: int,
        *,
        probs: bool = True,
        dtype: torch.dtype = torch.float32,
        spread: float = 0.7,
        short: bool = False,
        mask: bool = False,
        bench: bool = False,
        **options: object,
    ) -> Case:
        def build(make: Any) -> dict[str, Any]:
            target = make.randn(B, n + 1, V, dtype=dtype, scale=2.0)
            # A drafter that resembles the target, and ids that it might have drawn.
            draft = target[:, :n].float() + make.randn(B, n, V, dtype=torch.float32, scale=spread)
            noise = make.randn(B, n, V, dtype=torch.float32).abs().clamp(min=1e-6).log().neg()
            draft_ids = (draft + noise).argmax(-1).to(torch.int32) if probs else target[:, :n].argmax(-1).to(torch.int32)
            if short:
                draft_ids = torch.where(make.integers(0, 4, B, n) == 0, make.integers(-1, 2, B, n) * V, draft_ids)
            if mask:
                target = target.masked_fill(make.integers(0, 100, B, n + 1, V) < 90, -math.inf)
            given = {key: make.tensor(*option) if isinstance(option, tuple) else option for key, option in options.items()}
            return {
                "draft_ids": draft_ids,
                "draft_probs": draft.softmax(-1) if probs else None,
                "target_logits": target,
                "seeds": make.integers(-(2**62), 2**62, B, dtype=torch.int64),
                "offsets": make.integers(0, 2**40, B, dtype=torch.int64),
                **given,
            }

        return Case(name, build, bench)

    mixed: dict[str, Any] = {
        "temperature": ([0.0, 0.7, 1.0, 1.3, 1e4, 1.0], torch.float32),
        "top_k": ([5, 0, 1, 40, 0, 0], torch.int32),
        "top_p": ([0.9, 1.0, 0.5, 0.8, 1.0, 0.7], torch.float32),
        "min_p": ([0.0, 0.1, 0.0, 0.0, 0.0, 0.05], torch.float32),
    }
    yield case("mixed_ragged", 6, 3, 301, short=True, **mixed)
    yield case("mixed_ragged_certain", 6, 4, 301, probs=False, short=True, **mixed)
    yield case("plain_bf16", 8, 3, 1000, dtype=torch.bfloat16)
    yield case("masked_padded_float16", 5, 2, 517, dtype=torch.float16, mask=True, top_p=0.9)
    yield case("greedy", 3, 4, 500, temperature=0.0)
    yield case("no_draft", 2, 0, 300, top_k=3)
    yield case("empty", 0, 3, 300)
    yield case("single_column", 2, 2, 1)
    yield case("top_p_32000", 1, 1, 32000, top_p=0.9)
    for B in (1, 64):
        yield case(f"certain_{B}x4x128k", B, 3, 131072, probs=False, top_p=0.9, bench=True)
        yield case(f"probs_{B}x4x128k", B, 3, 131072, top_p=0.9, bench=True)
