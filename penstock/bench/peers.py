"""Peers: for each operator the public functions that compute the same, each prepared outside the timing.

A peer is a function from a case's arguments to a call without arguments, or to a sentence why it cannot or should not take
the case. Peers are imported when they are prepared; a missing package is a reason like any other.

    PEERS["rms_norm"]["torch F.rms_norm"](arguments)() -> tensor
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.bench.host import recorded
from penstock.bench.timing import Call
from penstock.core.op import Op
from penstock.testing.budget import Arguments

Peer = Callable[[Arguments], Call | str]

# Rooms whose references are a few element-wise passes and reductions, which torch.compile fuses into one kernel. The
# references of the others loop over requests or materialise scores: compiled, they would be a straw man.
COMPILED_ROOMS = ("norm", "activation", "quantization", "rotary")
COMPILED_TOO = ("merge_attention", "apply_penalties", "moe_route")


def peers_of(op: Op) -> dict[str, Peer]:
    """Every peer of an operator by name."""
    from penstock.bench.peers_flashinfer import FLASHINFER
    from penstock.bench.peers_mamba import MAMBA
    from penstock.bench.peers_matmul import MATMUL

    room = op.module.split(".")[2] if op.module.startswith("penstock.ops.") else ""
    found: dict[str, Peer] = {}
    if room in COMPILED_ROOMS or op.name in COMPILED_TOO:
        found["torch.compile"] = compiled_reference(op)
    found.update(PEERS.get(op.name, {}))
    found.update(FLASHINFER.get(op.name, {}))
    found.update(MAMBA.get(op.name, {}))
    found.update(MATMUL.get(op.name, {}))
    return found


def compiled_reference(op: Op) -> Peer:
    """torch.compile of the operator's reference, one static shape after another."""
    compiled: dict[str, Callable[..., Any]] = {}

    def prepare(arguments: Arguments) -> Call | str:
        if op.definition is None:
            return f"{op.name} has no reference to compile"
        if any(argument.is_write and not argument.name.startswith("out") for argument in op.arguments):
            return "the reference changes its arguments in place"
        outs = sum(argument.is_write and argument.name.startswith("out") for argument in op.arguments)
        values = recorded(op, arguments, "reference")[1][outs:]
        if "reference" not in compiled:
            torch._dynamo.reset()
            # Without the limit a fourth shape would silently fall back to eager.
            torch._dynamo.config.recompile_limit = 64
            compiled["reference"] = torch.compile(op.definition, dynamic=False)
        return lambda: compiled["reference"](*values)

    return prepare


# ---- norm, activation


def _plain_norm(arguments: Arguments) -> Call | str:
    x, weight = arguments["x"], arguments["weight"]
    if arguments.get("weight_offset", 0.0):
        return "has no weight offset"
    if weight.dtype != x.dtype:
        return "wants the weight in the dtype of x"
    return lambda: F.rms_norm(x, (x.shape[-1],), weight, arguments.get("eps", 1e-6))


def _add_then_norm(arguments: Arguments) -> Call | str:
    x, residual, weight = arguments["x"], arguments["residual"], arguments["weight"]
    if arguments.get("weight_offset", 0.0) or weight.dtype != x.dtype:
        return "has no weight offset and wants the weight in the dtype of x"

    def call() -> tuple[Tensor, Tensor]:
        summed = x + residual
        return F.rms_norm(summed, (x.shape[-1],), weight, arguments.get("eps", 1e-6)), summed

    return call


def _layer_norm(arguments: Arguments) -> Call | str:
    x = arguments["x"]
    return lambda: F.layer_norm(x, (x.shape[-1],), arguments["weight"], arguments.get("bias"), arguments.get("eps", 1e-5))


def _gated(activation: Callable[[Tensor], Tensor]) -> Peer:
    def prepare(arguments: Arguments) -> Call | str:
        x = arguments["x"]

        def call() -> Tensor:
            gate, up = x.chunk(2, -1)
            return activation(gate) * up

        return call

    return prepare


# ---- attention


def _sdpa(backend: str) -> Peer:
    def prepare(arguments: Arguments) -> Call | str:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        q, k, v = arguments["q"], arguments["k"], arguments["v"]
        cu_q, cu_k = arguments["cu_seqlens_q"], arguments["cu_seqlens_k"]
        lengths_q, lengths_k = cu_q.diff().unique().tolist(), cu_k.diff().unique().tolist()
        causal = arguments.get("causal", True)
        for option in ("softcap", "sinks"):
            if arguments.get(option) is not None:
                return f"has no {option}"
        if arguments.get("window") not in (None, (-1, -1)):
            return "has no window; a mask tensor would be a straw man"
        if arguments.get("return_lse"):
            return "returns no log-sum-exp"
        if len(lengths_q) != 1 or len(lengths_k) != 1:
            return "takes one dense batch; a call for each request, or a padded batch, would be a straw man"
        if causal and lengths_q != lengths_k:
            return "aligns a causal mask top-left, so it computes something else when there are more keys than queries"
        requests = len(cu_q) - 1
        query, key, value = (tensor.view(requests, -1, *tensor.shape[1:]).transpose(1, 2) for tensor in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        kind = getattr(SDPBackend, backend)

        def call() -> Tensor:
            with sdpa_kernel(kind):
                out = F.scaled_dot_product_attention(
                    query, key, value, is_causal=causal, scale=arguments.get("scale"), enable_gqa=grouped
                )
            return out.transpose(1, 2)

        return call

    return prepare


# ---- sampling


def uniform(value: Any) -> float | None:
    """The one value of a scalar or of a tensor whose rows agree."""
    if isinstance(value, Tensor):
        distinct = value.unique().tolist()
        return distinct[0] if len(distinct) == 1 else None
    return value


def _argmax(arguments: Arguments) -> Call | str:
    if uniform(arguments.get("temperature", 1.0)) != 0:
        return "is greedy, this case draws"
    return lambda: arguments["logits"].argmax(-1)


def _multinomial(arguments: Arguments) -> Call | str:
    temperature = uniform(arguments.get("temperature", 1.0))
    plain = uniform(arguments.get("top_k", 0)) == 0 and uniform(arguments.get("top_p", 1.0)) == 1
    if not temperature or not plain or uniform(arguments.get("min_p", 0.0)) != 0:
        return "draws without filters, from one temperature above zero"
    return lambda: torch.multinomial(torch.softmax(arguments["logits"].float() / temperature, -1), 1)[:, 0]


def _sort_and_draw(arguments: Arguments) -> Call | str:
    """Top-k and top-p as many engines write them: one sort of the whole vocabulary."""
    logits = arguments["logits"]
    temperature = uniform(arguments.get("temperature", 1.0))
    top_k, top_p = uniform(arguments.get("top_k", 0)), uniform(arguments.get("top_p", 1.0))
    if not temperature or top_k is None or top_p is None or (top_k == 0 and top_p == 1):
        return "filters by one top_k and one top_p, from one temperature above zero"

    def call() -> Tensor:
        ordered, ids = (logits.float() / temperature).sort(-1, descending=True)
        if top_k:
            ordered[:, int(top_k) :] = -torch.inf
        probabilities = ordered.softmax(-1)
        if top_p < 1:
            above = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.masked_fill(above >= top_p, 0.0)
        return ids.gather(1, torch.multinomial(probabilities, 1))[:, 0]

    return call


def _sum_and_topk(arguments: Arguments) -> Call | str:
    logits, top_n = arguments["logits"], arguments["top_n"]
    ids = arguments["ids"].long().clamp(0, logits.shape[1] - 1)[:, None]

    def call() -> tuple[Tensor, ...]:
        wide = logits.float()
        total = wide.logsumexp(1, keepdim=True)
        chosen = wide.gather(1, ids)
        ranks = (wide > chosen).sum(1) + 1
        top = wide.topk(top_n, dim=1)
        return (chosen - total)[:, 0], ranks, top.indices, top.values - total

    return call


# ---- kvcache: torch indexing with the indices made outside the timing


def _index_copy(arguments: Arguments) -> Call | str:
    k, v, slots = arguments["k"], arguments["v"], arguments["slots"].long()
    caches = arguments["k_cache"], arguments["v_cache"]
    if arguments.get("format") is not None or bool((slots < 0).any()):
        return "stores in the dtype given, and every token"
    if not all(cache.is_contiguous() for cache in caches):
        return "views pages as rows, which HND strides do not allow"
    rows = [cache.view(-1, *cache.shape[2:]) for cache in caches]

    def call() -> tuple[Tensor, Tensor]:
        rows[0].index_copy_(0, slots, k)
        rows[1].index_copy_(0, slots, v)
        return caches

    return call


def _index_select(arguments: Arguments) -> Call | str:
    cache, table, lengths = arguments["cache"], arguments["page_table"], arguments["seqlens"]
    if not cache.is_contiguous():
        return "views pages as rows, which HND strides do not allow"
    if not torch.equal(arguments["cu_seqlens"].diff(), lengths) or arguments.get("total") not in (None, int(lengths.sum())):
        return "leaves no room between requests"
    size = cache.shape[1]
    positions = torch.arange(table.shape[1] * size, device=table.device)
    slots = (table.long() * size).repeat_interleave(size, 1) + positions % size
    wanted = slots[positions[None] < lengths[:, None]]
    rows = cache.view(-1, *cache.shape[2:])
    return lambda: rows.index_select(0, wanted)


def _index_pages(arguments: Arguments) -> Call | str:
    cache, pairs = arguments["cache"], arguments["pairs"].long()
    if bool((pairs < 0).any()):
        return "copies every pair"
    sources, destinations = pairs[:, 0].contiguous(), pairs[:, 1].contiguous()

    def call() -> Tensor:
        cache[destinations] = cache[sources]
        return cache

    return call


# ---- what a fused operator replaces: our own separate kernels


def _ours(name: str) -> Op:
    return vars(importlib.import_module("penstock.ops"))[name]


def _norm_then_quantize(arguments: Arguments) -> Call | str:
    quantize, scale = _ours("quantize"), arguments.get("scale")
    options = {name: arguments[name] for name in ("eps", "weight_offset") if name in arguments}
    x, weight, residual = arguments["x"], arguments["weight"], arguments.get("residual")

    def call() -> tuple[Tensor, ...]:
        if residual is None:
            y, *total = (_ours("rms_norm")(x, weight, **options),)
        else:
            y, *total = _ours("add_rms_norm")(x, residual, weight, **options)
        return (*quantize(y, format=arguments["format"], scale=scale), *total)

    return call


def _gate_then_quantize(arguments: Arguments) -> Call | str:
    silu_and_mul, quantize = _ours("silu_and_mul"), _ours("quantize")
    return lambda: quantize(silu_and_mul(arguments["x"]), format=arguments["format"], scale=arguments.get("scale"))


def _norm_rope_store(arguments: Arguments) -> Call | str:
    norm, rope, hadamard, quantize, store = map(_ours, ("rms_norm", "rope", "hadamard", "quantize", "store_kv"))
    Hkv, D = arguments["k_cache"].shape[2:]
    heads = arguments["qkv"].view(len(arguments["qkv"]), -1, D)
    first, format = arguments.get("norm_first", True), arguments["format"]
    token = None if format is None else importlib.import_module("penstock.core.formats").FP8_TOKEN
    weights = arguments.get("q_norm"), arguments.get("k_norm")

    def normed(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return tuple(x if weight is None else norm(x, weight) for x, weight in zip((q, k), weights, strict=True))

    def call() -> Any:
        q, k, v = heads.split((heads.shape[1] - 2 * Hkv, Hkv, Hkv), 1)
        q, k = normed(q, k) if first else (q, k)
        q, k = rope(q, k, arguments["cos_sin"], arguments["positions"])
        q, k = (q, k) if first else normed(q, k)
        if arguments.get("hadamard"):
            q, k = hadamard(q), hadamard(k)
        scales = {name: arguments.get(name) for name in ("k_scale", "v_scale")}
        store(k, v, arguments["k_cache"], arguments["v_cache"], arguments["slots"], format=format, **scales)
        return q if token is None else quantize(q, format=token)

    return call


PEERS: dict[str, dict[str, Peer]] = {
    "rms_norm": {"torch F.rms_norm": _plain_norm},
    "add_rms_norm": {"torch add, F.rms_norm": _add_then_norm},
    "layer_norm": {"torch F.layer_norm": _layer_norm},
    "silu_and_mul": {"torch silu, mul": _gated(F.silu)},
    "attention_prefill": {"SDPA cuDNN": _sdpa("CUDNN_ATTENTION"), "SDPA flash": _sdpa("FLASH_ATTENTION")},
    "rms_norm_quant": {"separate kernels": _norm_then_quantize},
    "silu_and_mul_quant": {"separate kernels": _gate_then_quantize},
    "rope_norm_store_kv": {"separate kernels": _norm_rope_store},
    "store_kv": {"torch index_copy_": _index_copy},
    "gather_kv": {"torch index_select": _index_select},
    "copy_pages": {"torch indexing": _index_pages},
    "log_probs": {"torch logsumexp, topk": _sum_and_topk},
    "sample": {"torch argmax": _argmax, "torch multinomial": _multinomial, "torch sort": _sort_and_draw},
}
