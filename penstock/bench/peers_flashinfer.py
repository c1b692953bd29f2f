"""FlashInfer as a peer (0.6): norm, activation, sampling, ragged prefill, paged prefill, paged decode and its XQA kernels.

Plans are made outside the timing. Nothing is imported before a peer is prepared.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from penstock.bench.peers import uniform
from penstock.bench.timing import Call
from penstock.core.check import short
from penstock.testing.budget import Arguments

Prepare = Callable[[Any, Arguments], Call | str]
WORKSPACE_BYTES = 256 * 2**20


def _peer(prepare: Prepare) -> Callable[[Arguments], Call | str]:
    """Gives `prepare` the imported package, or answers why there is none."""

    def guarded(arguments: Arguments) -> Call | str:
        if importlib.util.find_spec("flashinfer") is None:
            return "flashinfer is not installed"
        if not any(isinstance(value, Tensor) and value.is_cuda for value in arguments.values()):
            return "needs a CUDA device"
        return prepare(importlib.import_module("flashinfer"), arguments)

    return guarded


@functools.cache
def _workspace(device: torch.device, user: str) -> Tensor:
    """Scratch shared by the input sets of one peer, which run one after another; XQA wants it zeroed at first."""
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


# ---- norm, activation


def _rmsnorm(package: Any, arguments: Arguments) -> Call | str:
    x, weight = arguments["x"], arguments["weight"]
    offset = arguments.get("weight_offset", 0.0)
    if x.dim() not in (2, 3) or weight.dtype != x.dtype or offset not in (0.0, 1.0):
        return "takes 2 or 3 dimensions, a weight in the dtype of x and an offset of 0 or 1"
    norm = package.gemma_rmsnorm if offset else package.rmsnorm
    return lambda: norm(x, weight, arguments.get("eps", 1e-6))


def _fused_add_rmsnorm(package: Any, arguments: Arguments) -> Call | str:
    # It works in place: every call adds to the same residual again, which changes no byte count.
    x, residual, weight = arguments["x"].clone(), arguments["residual"].clone(), arguments["weight"]
    offset = arguments.get("weight_offset", 0.0)
    if x.dim() != 2 or weight.dtype != x.dtype or offset not in (0.0, 1.0):
        return "takes 2 dimensions, a weight in the dtype of x and an offset of 0 or 1"
    norm = package.gemma_fused_add_rmsnorm if offset else package.fused_add_rmsnorm

    def call() -> Tensor:
        norm(x, residual, weight, arguments.get("eps", 1e-6))
        return x

    return call


def _activation(name: str) -> Prepare:
    def prepare(package: Any, arguments: Arguments) -> Call | str:
        x = arguments["x"]
        if not x.is_contiguous():
            return "takes contiguous rows"
        kind = name
        if name == "gelu_and_mul":
            kind = "gelu_tanh_and_mul" if arguments.get("approximate", "tanh") == "tanh" else "gelu_and_mul"
        return lambda: getattr(package, kind)(x)

    return prepare


# ---- rotary


def _rope(package: Any, arguments: Arguments) -> Call | str:
    q, k, table, positions = (arguments[name] for name in ("q", "k", "cos_sin", "positions"))
    if table.dtype != torch.float32:
        return f"takes a float32 table, this one is {short(table.dtype)}"
    head_dim = q.shape[-1]
    flat_q, flat_k = q.reshape(q.shape[0], -1), k.reshape(k.shape[0], -1)
    neox = not arguments.get("interleaved", False)
    return lambda: package.apply_rope_with_cos_sin_cache(positions, flat_q, flat_k, head_dim, table, neox)


# ---- attention


def _options(arguments: Arguments) -> dict[str, Any] | str:
    """The plan's options, or why FlashInfer has not this one."""
    if arguments.get("sinks") is not None:
        return "needs another wrapper for sinks"
    if arguments.get("return_lse"):
        return "returns its log-sum-exp to base 2"
    left, right = arguments.get("window") or (-1, -1)
    if right not in (-1, 0):
        return "has no window to the right"
    q = arguments["q"]
    scale = arguments.get("scale")
    return {
        "window_left": left,
        "logits_soft_cap": arguments.get("softcap"),
        "sm_scale": q.shape[-1] ** -0.5 if scale is None else scale,
    }


def _pages(arguments: Arguments) -> tuple[str, Tensor, Tensor]:
    """(layout, k pages, v pages): caches come as [P, S, H, D] with the strides of either layout."""
    k, v = arguments["k_cache"], arguments["v_cache"]
    if k.stride(1) >= k.stride(2):
        return "NHD", k, v
    return "HND", k.transpose(1, 2), v.transpose(1, 2)


def _page_lists(arguments: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """(indptr, indices, last_page_len) of the page table."""
    table, lengths = arguments["page_table"], arguments["seqlens_k"]
    size = arguments["k_cache"].shape[1]
    counts = (lengths + size - 1) // size
    indptr = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=lengths.device)
    indptr[1:] = counts.cumsum(0)
    used = torch.arange(table.shape[1], device=table.device)[None] < counts[:, None]
    return indptr, table[used], (lengths - (counts - 1) * size).to(torch.int32)


def _same_halves(arguments: Arguments) -> str:
    names = [name for name in ("q", "k", "v", "k_cache", "v_cache") if name in arguments]
    dtypes = {arguments[name].dtype for name in names}
    if len(dtypes) == 1 and dtypes <= {torch.bfloat16, torch.float16}:
        return ""
    return f"scales FP8 in another way; compared in bfloat16 and float16 alone, got {', '.join(map(short, dtypes))}"


def _prefill_ragged(package: Any, arguments: Arguments) -> Call | str:
    options, unfit = _options(arguments), _same_halves(arguments)
    if unfit or isinstance(options, str):
        return unfit or str(options)
    q, k, v = arguments["q"], arguments["k"], arguments["v"]
    wrapper = package.BatchPrefillWithRaggedKVCacheWrapper(_workspace(q.device, "prefill"), "NHD")
    wrapper.plan(
        arguments["cu_seqlens_q"],
        arguments["cu_seqlens_k"],
        q.shape[1],
        k.shape[1],
        q.shape[2],
        v.shape[2],
        causal=arguments.get("causal", True),
        q_data_type=q.dtype,
        kv_data_type=k.dtype,
        **options,
    )
    return lambda: wrapper.run(q, k, v)


def _prefill_paged(package: Any, arguments: Arguments) -> Call | str:
    options, unfit = _options(arguments), _same_halves(arguments)
    if unfit or isinstance(options, str):
        return unfit or str(options)
    q = arguments["q"]
    layout, k, v = _pages(arguments)
    wrapper = package.BatchPrefillWithPagedKVCacheWrapper(_workspace(q.device, "prefill"), layout)
    wrapper.plan(
        arguments["cu_seqlens_q"],
        *_page_lists(arguments),
        q.shape[1],
        arguments["k_cache"].shape[2],
        q.shape[2],
        arguments["k_cache"].shape[1],
        causal=arguments.get("causal", True),
        q_data_type=q.dtype,
        kv_data_type=k.dtype,
        **options,
    )
    return lambda: wrapper.run(q, (k, v))


def _decode(package: Any, arguments: Arguments) -> Call | str:
    options, unfit = _options(arguments), _same_halves(arguments)
    if unfit or isinstance(options, str):
        return unfit or str(options)
    if arguments.get("q_len", 1) != 1:
        return "decodes one query token for each request"
    q = arguments["q"]
    layout, k, v = _pages(arguments)
    wrapper = package.BatchDecodeWithPagedKVCacheWrapper(_workspace(q.device, "decode"), layout, use_tensor_cores=True)
    wrapper.plan(
        *_page_lists(arguments),
        q.shape[1],
        arguments["k_cache"].shape[2],
        q.shape[2],
        arguments["k_cache"].shape[1],
        q_data_type=q.dtype,
        kv_data_type=k.dtype,
        **options,
    )
    return lambda: wrapper.run(q, (k, v))


def _xqa(package: Any, arguments: Arguments) -> Call | str:
    options, unfit = _options(arguments), _same_halves(arguments)
    if unfit or isinstance(options, str):
        return unfit or str(options)
    q, size = arguments["q"], arguments["k_cache"].shape[1]
    if arguments.get("q_len", 1) != 1 or options["logits_soft_cap"] is not None:
        return "takes one query token for each request and no softcap here"
    if size not in (16, 32, 64, 128):
        return f"takes pages of 16, 32, 64 or 128 tokens, these have {size}"
    layout, k, v = _pages(arguments)
    decode = importlib.import_module("flashinfer.decode").xqa_batch_decode_with_kv_cache
    lengths = arguments["seqlens_k"]
    longest = int(lengths.max())
    return lambda: decode(
        q,
        (k, v),
        _workspace(q.device, "xqa"),
        arguments["page_table"],
        lengths.view(torch.uint32),
        longest,
        bmm1_scale=options["sm_scale"],
        window_left=options["window_left"],
        kv_layout=layout,
    )


def _mla(package: Any, arguments: Arguments) -> Call | str:
    if arguments.get("q_len", 1) != 1 or arguments.get("return_lse"):
        return "compared for one query token and without a log-sum-exp"
    latent, rope, cache = arguments["q_latent"], arguments["q_rope"], arguments["cache"]
    B, Hq, Dc = latent.shape
    Dr, lengths = rope.shape[2], arguments["seqlens_k"]
    indptr, indices, _ = _page_lists({**arguments, "k_cache": cache})
    wrapper = package.mla.BatchMLAPagedAttentionWrapper(_workspace(latent.device, "mla"))
    scale = arguments.get("scale") or (Dc + Dr) ** -0.5
    rows = torch.arange(B + 1, dtype=torch.int32, device=latent.device)
    page_size = cache.shape[1]
    wrapper.plan(rows, indptr, indices, lengths, Hq, Dc, Dr, page_size, False, scale, latent.dtype, cache.dtype)
    return lambda: wrapper.run(latent, rope, cache[..., :Dc], cache[..., Dc:])


def _merge_states(package: Any, arguments: Arguments) -> Call | str:
    # Its states lie along the second dimension and its LSE is to base 2; the bytes moved are the same.
    outs, lses = arguments["outs"].transpose(0, 1).contiguous(), arguments["lses"].transpose(0, 1) * 1.4426950408889634
    lses = lses.contiguous().float()
    return lambda: package.merge_states(outs, lses)[0]


# ---- sampling


def _sampling_inputs(arguments: Arguments) -> tuple[Tensor, Any, Any, Any] | str:
    """(logits, temperature, top_k, top_p) with filters that are off written as FlashInfer wants them."""
    logits = arguments["logits"].float()
    temperature = arguments.get("temperature", 1.0)
    if bool((torch.as_tensor(temperature) == 0).any()):
        return "has no greedy rows"
    if bool((torch.as_tensor(arguments.get("min_p", 0.0)) != 0).any()):
        return "has min-p only as a kernel of its own"
    top_k, top_p = arguments.get("top_k", 0), arguments.get("top_p", 1.0)
    if isinstance(top_k, Tensor):
        top_k = torch.where(top_k == 0, logits.shape[1], top_k).to(torch.int32)
    elif top_k == 0:
        top_k = logits.shape[1]
    return logits, temperature, top_k, top_p


def _sample_from_probs(package: Any, arguments: Arguments) -> Call | str:
    inputs = _sampling_inputs(arguments)
    if isinstance(inputs, str):
        return inputs
    logits, temperature, top_k, top_p = inputs
    sampling = package.sampling

    def call() -> Tensor:
        probabilities = sampling.softmax(logits, temperature)
        return sampling.top_k_top_p_sampling_from_probs(probabilities, top_k, top_p, seed=1, offset=0)

    return call


def _sample_from_logits(package: Any, arguments: Arguments) -> Call | str:
    inputs = _sampling_inputs(arguments)
    if isinstance(inputs, str):
        return inputs
    logits, temperature, top_k, top_p = inputs
    if uniform(temperature) != 1.0:
        return "takes logits already divided by the temperature"
    sampling = package.sampling
    if uniform(top_k) == logits.shape[1] and uniform(top_p) == 1.0:
        return lambda: sampling.sampling_from_logits(logits, seed=1, offset=0)
    return lambda: sampling.top_k_top_p_sampling_from_logits(logits, top_k, top_p, seed=1, offset=0)


FLASHINFER: dict[str, dict[str, Callable[[Arguments], Call | str]]] = {
    "rms_norm": {"FlashInfer": _peer(_rmsnorm)},
    "add_rms_norm": {"FlashInfer": _peer(_fused_add_rmsnorm)},
    "silu_and_mul": {"FlashInfer": _peer(_activation("silu_and_mul"))},
    "gelu_and_mul": {"FlashInfer": _peer(_activation("gelu_and_mul"))},
    "rope": {"FlashInfer": _peer(_rope)},
    "attention_prefill": {"FlashInfer": _peer(_prefill_ragged)},
    "attention_prefill_paged": {"FlashInfer": _peer(_prefill_paged)},
    "attention_decode": {"FlashInfer": _peer(_decode), "FlashInfer XQA": _peer(_xqa)},
    "mla_decode": {"FlashInfer": _peer(_mla)},
    "merge_attention": {"FlashInfer": _peer(_merge_states)},
    "sample": {"FlashInfer probs": _peer(_sample_from_probs), "FlashInfer logits": _peer(_sample_from_logits)},
}
