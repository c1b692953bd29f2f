"""ids = the top_k experts by score (+ bias), within the best groups of experts; weights = their scores, summing to one."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost, nbytes
from penstock.core.check import DENSE, FLOATS, anything, boolean, one_of, optional
from penstock.core.op import op

MAX_EXPERTS = 4096
# Keeps the division finite where every chosen score has underflowed; it changes no sum above 1e-13.
LEAST_SUM = 1e-20


def _several(value: object) -> str | None:
    good = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    return None if good else "an integer >= 1"


SPEC = {
    "logits": ("T E", FLOATS, DENSE),
    "bias?": ("E", (torch.float32, torch.float64), DENSE),
    "top_k": _several,
    "scoring": one_of("softmax", "sigmoid"),
    "renormalize": boolean,
    "num_groups": optional(_several),
    "top_groups": optional(_several),
    "scale": anything,
}


@op(
    "(Tensor(a!) out_ids, Tensor(b!) out_weights, Tensor logits, Tensor? bias, int top_k, str scoring, bool renormalize,"
    " int? num_groups, int? top_groups, float scale) -> ()",
    SPEC,
)
def moe_route(
    logits: Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    renormalize: bool = True,
    bias: Tensor | None = None,
    num_groups: int | None = None,
    top_groups: int | None = None,
    scale: float = 1.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Chooses the experts of each token and their weights, in one kernel.

    score = softmax(logits) over all experts, or sigmoid(logits). Without a bias the experts with the largest logits are chosen:
    both functions rise, so that is the order of the scores, before they are rounded. With a bias the order is that of
    score + bias, and the weights are still the scores (DeepSeek-V3). With groups, expert e belongs to group
    e // (E / num_groups); only the top_groups best groups take part. A group is worth the sum of its two largest score + bias
    when there is a bias (DeepSeek-V3), and its largest score otherwise (DeepSeek-V2). Equal ones: the smaller id goes first,
    among experts and among groups. NaN logits count as -inf.

    Mixtral, Qwen3-MoE with norm_topk_prob, Hunyuan: the defaults. Qwen3-MoE without: renormalize=False. DeepSeek-V2:
    renormalize=False, num_groups, top_groups, scale. DeepSeek-V3, GLM-4.5, Kimi-K2: scoring="sigmoid", bias, num_groups,
    top_groups, scale.

    Args:
        logits: [T, E] float32 (or narrower, computed in float32); E up to 4,096; stride 1 along E.
        top_k: experts of a token, at most E, and at most those of top_groups groups.
        scoring: "softmax" or "sigmoid".
        renormalize: divide the chosen scores by their sum plus 1e-20.
        bias: [E] float32, added for the choice alone.
        num_groups: groups of E / num_groups neighbouring experts; None for no groups.
        top_groups: groups that take part; given with num_groups.
        scale: multiplies the weights last.
        impl: "auto", "triton", "cpu" or "reference".
    Returns: (ids, weights): ids [T, top_k] int32, best first; weights [T, top_k] float32 (float64 for float64 logits).
    Raises: ContractError when shapes, dtypes or options disagree; NotSupported when no implementation takes the call.
    Source: Shazeer et al., arXiv:1701.06538; DeepSeek-AI, arXiv:2405.04434 (groups), arXiv:2412.19437 (bias); the routers of
        transformers' models of these names.
    """
    launch = moe_route.pick(impl, logits, bias, top_k, scoring, renormalize, num_groups, top_groups, scale)
    T = logits.shape[0]
    ids = torch.empty(T, top_k, dtype=torch.int32, device=logits.device)
    wide = torch.promote_types(logits.dtype, torch.float32)
    weights = torch.empty(T, top_k, dtype=wide, device=logits.device)
    launch(ids, weights, logits, bias, top_k, scoring, renormalize, num_groups, top_groups, scale)
    return ids, weights


@moe_route.relation
def _relation(
    logits: Tensor, top_k: int, num_groups: int | None, top_groups: int | None, **others: object
) -> tuple[str, str] | None:
    E = logits.shape[1]
    if E > MAX_EXPERTS:
        return "logits", f"must have at most {MAX_EXPERTS} experts, got {E}"
    if (num_groups is None) != (top_groups is None):
        return "top_groups", f"must be given with num_groups, got num_groups={num_groups}, top_groups={top_groups}"
    eligible = E
    if num_groups is not None and top_groups is not None:
        if E % num_groups:
            return "num_groups", f"must divide E={E}, got {num_groups}"
        if top_groups > num_groups:
            return "top_groups", f"must be at most num_groups={num_groups}, got {top_groups}"
        eligible = E // num_groups * top_groups
    if top_k > eligible:
        return "top_k", f"must be at most the {eligible} experts that take part, got {top_k}"
    return None


@moe_route.reference
def _reference(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scoring: str,
    renormalize: bool,
    num_groups: int | None,
    top_groups: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wide = torch.where(wide.isnan(), -math.inf, wide)
    if scoring == "sigmoid":
        scores = torch.sigmoid(wide)
    else:
        # A row of -inf alone gives zeros.
        scores = torch.softmax(wide, -1).nan_to_num(nan=0.0)
    order = wide if bias is None else scores + bias.to(wide.dtype)
    if num_groups is not None:
        # An open expert at -inf still goes before those of closed groups.
        members = order.clamp(min=torch.finfo(order.dtype).min).unflatten(1, (num_groups, -1))
        worth = members.sort(dim=2, descending=True).values[..., : 1 if bias is None else 2].sum(2)
        best = worth.sort(dim=1, descending=True, stable=True).indices[:, :top_groups]
        outside = torch.ones_like(worth, dtype=torch.bool).scatter(1, best, False)
        order = members.masked_fill(outside[..., None], -math.inf).flatten(1)
    ids = order.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(1, keepdim=True) + LEAST_SUM)
    return ids.to(torch.int32), weights * scale


@moe_route.impl("triton", needs=("triton",))
def _triton(ids: Tensor, weights: Tensor, logits: Tensor, bias: Tensor | None, *options: Any) -> None:
    from penstock.ops.moe.route_triton import launch

    launch(ids, weights, logits, bias, *options)


@moe_route.impl("cpu", needs=("cpu",))
def _cpu(ids: Tensor, weights: Tensor, *arguments: Any) -> None:
    chosen, found = _reference(*arguments)
    ids.copy_(chosen)
    weights.copy_(found)


@moe_route.cost
def _cost(logits: Tensor, top_k: int, bias: Tensor | None = None, **options: object) -> Cost:
    return Cost(bytes=nbytes(logits, bias) + 8 * logits.shape[0] * top_k)


@moe_route.cases
def cases() -> Iterable[Case]:
    """The routers of published models, then the awkward shapes."""

    def case(
        name: str, T: int, E: int, top_k: int, *, dtype=torch.float32, biased: bool = False, bench: bool = False, **options: Any
    ) -> Case:
        def build(make):
            arguments = {"logits": make.randn(T, E, dtype=dtype), "top_k": top_k, **options}
            if biased:
                arguments["bias"] = make.randn(E, dtype=torch.float32, scale=0.05)
            return arguments

        return Case(name, build, bench)

    v2: dict[str, Any] = {"renormalize": False, "num_groups": 8, "top_groups": 3, "scale": 16.0}
    v3: dict[str, Any] = {"scoring": "sigmoid", "biased": True, "num_groups": 8, "top_groups": 4, "scale": 2.5}
    yield case("mixtral", 3, 8, 2)
    yield case("qwen3", 5, 128, 8)
    yield case("qwen3_not_renormalized", 5, 128, 8, renormalize=False)
    yield case("deepseek_v2", 7, 160, 6, **v2)
    yield case("deepseek_v3", 5, 256, 8, **v3)
    yield case("sigmoid_without_bias", 4, 64, 4, scoring="sigmoid")
    yield case("softmax_with_bias", 4, 64, 4, biased=True)
    yield case("bfloat16_ragged", 3, 60, 4, dtype=torch.bfloat16)
    yield case("groups_ragged", 3, 36, 5, scoring="sigmoid", biased=True, num_groups=3, top_groups=2)
    yield case("groups_of_one", 3, 6, 2, scoring="sigmoid", biased=True, num_groups=6, top_groups=3)
    yield case("every_expert", 2, 9, 9)
    yield case("single_expert", 3, 1, 1)
    yield case("empty", 0, 128, 8)
    for T in (1, 64, 4096):
        yield case(f"qwen3_{T}", T, 128, 8, bench=True)
        yield case(f"deepseek_v3_{T}", T, 256, 8, bench=True, **v3)
