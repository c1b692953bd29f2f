"""The Python interface of hpc-ops over our operators: what `import hpc` finds with PENSTOCK_HPC=1.

vLLM and SGLang call hpc-ops by its module name, `hpc`. `install`, an entry point of both, puts this module under that name in
every worker process, so that their own integrations of hpc-ops run on our operators. Names, argument orders and layouts are
those of hpc-ops; what no operator covers is there too and raises NotSupported with its name.

Layouts: caches [pages, page size, KV heads, head dim], NHD or HND by strides, any page size that is a power of two; block
tables [requests, pages]; scales of queries [requests, heads, padded length] in a prefill and [rows, heads] in decode; a scale
multiplies the stored value back. Where hpc-ops wants unused slots of a page to be zero, ours may hold anything.

Source: the public interface of hpc-ops (github.com/Tencent/hpc-ops, hpc/*.py and its tests), commit 6e2eced.
"""

import importlib.util
import sys
from enum import Enum, IntEnum
from typing import Any, NoReturn

import torch
from torch import Tensor

from penstock.core import env
from penstock.core.formats import FP8_BLOCK, FP8_TENSOR, FP8_TOKEN
from penstock.core.op import NotSupported
from penstock.ops.activation.silu_and_mul_quant import silu_and_mul_quant as _silu_and_mul_quant
from penstock.ops.attention.decode import attention_decode as _attention_decode
from penstock.ops.attention.prefill import attention_prefill as _attention_prefill
from penstock.ops.attention.prefill_paged import attention_prefill_paged as _attention_prefill_paged
from penstock.ops.kvcache.store_kv import store_kv as _store_kv
from penstock.ops.norm.rms_norm import rms_norm as _rms_norm
from penstock.ops.norm.rms_norm_quant import rms_norm_quant as _rms_norm_quant
from penstock.ops.quantization.quantize import quantize as _quantize
from penstock.ops.rotary.rope import rope as _rope
from penstock.ops.sampling.sample import sample as _sample

__version__ = "penstock"
MODULES = ("act", "allreduce", "attention", "fuse_moe", "gemm", "group_gemm", "normalization", "rope", "sampler", "stem")
NOT_COVERED = {
    "attention_with_kvcache_prefill_fp8": "attention over FP8 caches",
    "attention_with_kvcache_blocksparse_prefill_fp8": "attention over FP8 caches, block-sparse",
    "attention_decode_fp8": "attention over FP8 caches",
    "print_attention_decode_task": "task maps of hpc-ops' own schedule",
    "count_and_gather": "mixtures of experts",
    "reduce": "mixtures of experts",
    "fuse_moe": "mixtures of experts",
    "fuse_moe_pertensor_fp8": "mixtures of experts",
    "fuse_moe_blockwise": "mixtures of experts",
    "fuse_moe_blockwise_fp8": "mixtures of experts",
    "group_gemm_fp8": "matrix products in groups",
    "group_gemm_pertensor_fp8": "matrix products in groups",
    "group_gemm_blockwise_fp8": "matrix products in groups",
    "reformat_x_scale": "scale layouts of hpc-ops' own matrix products",
    "gemm_bf16xfp32": "matrix products",
    "get_gemm_bf16xfp32_workspace": "matrix products",
    "fuse_allreduce_rmsnorm_high_throughput": "communication",
    "fuse_allreduce_rmsnorm_low_latency": "communication",
    "empty_multimem": "communication",
    "stem_oam_prep_paged_kv": "block selection for sparse attention",
    "stem_oam_prep_varlen_q": "block selection for sparse attention",
    "stem_oam_gemm": "block selection for sparse attention",
    "stem_tpd": "block selection for sparse attention",
    "stem_paged_kv": "block selection for sparse attention",
}


def install() -> None:
    """Makes this module `import hpc`, when the environment variable PENSTOCK_HPC is 1; otherwise does nothing.

    An entry point of vllm.general_plugins and sglang.srt.plugins; calling it again changes nothing.
    Raises: RuntimeError when hpc-ops itself is installed: it is never shadowed.
    """
    this = sys.modules[__name__]
    if env.HPC.read() == "0" or sys.modules.get("hpc") is this:
        return
    spec = None if "hpc" in sys.modules else importlib.util.find_spec("hpc")
    found = sys.modules.get("hpc") or spec
    if found is not None:
        raise RuntimeError(f"PENSTOCK_HPC=1, but there is a module `hpc` already: {found}; uninstall it or unset the variable")
    for name in ("hpc", *(f"hpc.{module}" for module in MODULES)):
        sys.modules[name] = this


def __getattr__(name: str) -> Any:
    # Hosts ask with getattr whether the build they found has a function: one that hpc-ops does not publish is not there.
    if name in MODULES and name not in NOT_COVERED:
        return sys.modules[__name__]
    if name not in NOT_COVERED:
        raise AttributeError(f"module 'hpc' (penstock.integrations.hpc_ops) has no attribute {name!r}")

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        _refuse(name, NOT_COVERED[name])

    return refuse


def _refuse(name: str, what: str) -> NoReturn:
    raise NotSupported(f"hpc.{name}: no operator for {what}")


class QuantType(Enum):
    """How q, k and v of FP8 attention are scaled."""

    QPERTOKEN_PERHEAD_KPERTOKEN_PERHEAD_VPERHEAD = 0
    QPERTOKEN_PERHEAD_KPERTENSOR_VPERTENSOR = 1
    QPERTENSOR_KPERTENSOR_VPERTENSOR = 2
    QPERTOKEN_PERHEAD_KPERTOKEN_PERHEAD_VPERHEAD_QKHADAMARD = 3


class SoftmaxPolicy(IntEnum):
    """Where fused_sampler normalises: nowhere, over the vocabulary, or over what top-k left."""

    NONE = 0
    BEFORE_TOPK = 1
    AFTER_TOPK = 2


# ---- attention


def attention_prefill_bf16(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens_q: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlens_q: int,
    output: Tensor | None = None,
) -> Tensor:
    """Causal attention of packed prompts [tokens, heads, head dim] over themselves, by attention_prefill."""
    longest = int(max_seqlens_q)
    lengths = {"max_seqlen_q": longest, "max_seqlen_k": longest}
    return _attention_prefill(q, k, v, cu_seqlens_q, cu_seqlens_q, **lengths, out=output)


def attention_with_kvcache_prefill_bf16(
    q: Tensor,
    kcache: Tensor,
    vcache: Tensor,
    cu_seqlens_q: Tensor,
    block_ids: Tensor,
    seqlens_kvcache: Tensor,
    max_seqlens_q: int,
    output: Tensor | None = None,
) -> Tensor:
    """Causal attention of packed queries over a paged cache that holds their keys already, by attention_prefill_paged.

    seqlens_kvcache counts each request's keys, those of its queries included.
    """
    tensors = (q, kcache, vcache, block_ids, cu_seqlens_q, seqlens_kvcache)
    return _attention_prefill_paged(*tensors, max_seqlen_q=int(max_seqlens_q), out=output)


def attention_decode_bf16(
    q: Tensor,
    kcache: Tensor,
    vcache: Tensor,
    block_ids: Tensor,
    num_seq_kvcache: Tensor,
    mtp: int = 0,
    new_kv_included: bool = False,
    splitk: bool = True,
    task_map: Tensor | None = None,
    split_flag: Tensor | None = None,
    output: Tensor | None = None,
) -> Tensor:
    """Attention of each request's last mtp + 1 tokens over a paged cache, by attention_decode, which plans by itself.

    num_seq_kvcache counts each request's keys, without those of its new tokens unless new_kv_included.
    """
    lengths = num_seq_kvcache if new_kv_included else num_seq_kvcache + (mtp + 1)
    return _attention_decode(q, kcache, vcache, block_ids, lengths, q_len=mtp + 1, out=output)


def get_attention_decode_task_workspace(
    max_num_batch: int, max_seqlen: int, num_head_kv: int, min_process_len: int = 512
) -> Tensor:
    """A token workspace: attention_decode plans with the number of query heads, which is not known where this is called."""
    return torch.zeros(48, dtype=torch.int8, device="cuda" if torch.cuda.is_available() else "cpu")


def assign_attention_decode_task(
    num_seq_kvcache: Tensor,
    task_map: Tensor,
    num_head_kv: int,
    mtp: int,
    new_kv_included: bool,
    min_process_len: int = 512,
) -> Tensor:
    """Returns the workspace as it is; see get_attention_decode_task_workspace."""
    return task_map


# ---- rotary embedding, norm of heads, store


def rope_norm_store_kv(
    key_cache: Tensor,
    value_cache: Tensor,
    qkv: Tensor,
    cos_sin: Tensor,
    num_seqlen_per_req: Tensor,
    q_index: Tensor,
    kvcache_indices: Tensor,
    is_prefill: bool,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    out_q: Tensor | None = None,
    out_k: Tensor | None = None,
    out_v: Tensor | None = None,
    qk_norm_policy: int = 0,
) -> Tensor:
    """Rotates q and k, normalises them (policy 0 not, 1 after, 2 before), stores k and v; returns q [rows, heads, head dim].

    Stored in the pages, or written to out_k and out_v where both are given. Rows of no request, and requests of length 0, are
    padding: they are stored nowhere.
    """
    q, k, v = _split(qkv, key_cache, value_cache)
    positions, slots, _, _ = _places(qkv.shape[0], num_seqlen_per_req, q_index, kvcache_indices, key_cache.shape[1])
    q, k = _rotated(q, k, cos_sin, positions, q_norm_weight, k_norm_weight, qk_norm_policy)
    outside = _outside_pages("rope_norm_store_kv", out_k, out_v)
    if outside is None:
        _store_kv(k, v, key_cache, value_cache, slots)
    else:
        outside[0].copy_(k)
        outside[1].copy_(v)
    return q if out_q is None else out_q.copy_(q)


def rope_norm_store_kv_fp8(
    key_cache: Tensor,
    value_cache: Tensor,
    qkv: Tensor,
    cos_sin: Tensor,
    num_seqlen_per_req: Tensor,
    q_index: Tensor,
    kvcache_indices: Tensor,
    is_prefill: bool,
    k_scale: Tensor,
    v_scale: Tensor,
    quant_policy: int,
    max_seqlens: int = 0,
    upper_max: float | None = None,
    q_scale_inv: Tensor | None = None,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    out_q: Tensor | None = None,
    out_k: Tensor | None = None,
    out_v: Tensor | None = None,
    qk_norm_policy: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """rope_norm_store_kv, stored as k / k_scale and v / v_scale in FP8, with q in FP8 too.

    quant_policy 1 takes a scale of q for each row and head, 2 multiplies q by q_scale_inv.
    Returns: (q, its scales or None, zeros [requests, KV heads] int32); the scales are [rows, heads] in decode and
        [requests, heads, max_seqlens rounded up to 128] in a prefill.
    """
    if upper_max is not None and upper_max != 448.0:
        _refuse("rope_norm_store_kv_fp8", f"upper_max={upper_max}; FP8 is quantised to ±448")
    q, k, v = _split(qkv, key_cache, value_cache)
    places = _places(qkv.shape[0], num_seqlen_per_req, q_index, kvcache_indices, key_cache.shape[1])
    positions, slots, request, offset = places
    q, k = _rotated(q, k, cos_sin, positions, q_norm_weight, k_norm_weight, qk_norm_policy)
    scale: Tensor | None = None
    if quant_policy == 1:
        stored, scale = _quantize(q, format=FP8_TOKEN, out=(out_q, None))
    elif quant_policy == 2 and q_scale_inv is not None:
        stored, _ = _quantize(q, format=FP8_TENSOR, scale=q_scale_inv.reciprocal(), out=(out_q, None))
    else:
        _refuse("rope_norm_store_kv_fp8", f"quant_policy={quant_policy} with q_scale_inv={q_scale_inv}")
    outside = _outside_pages("rope_norm_store_kv_fp8", out_k, out_v)
    if outside is None:
        _store_kv(k, v, key_cache, value_cache, slots, format=FP8_TENSOR, k_scale=k_scale, v_scale=v_scale)
    else:
        _quantize(k, format=FP8_TENSOR, scale=k_scale, out=(outside[0], None))
        _quantize(v, format=FP8_TENSOR, scale=v_scale, out=(outside[1], None))
    requests = num_seqlen_per_req.shape[0]
    if is_prefill and scale is not None:
        # One request more takes the scales of rows of no request.
        by_request = scale.new_zeros(requests + 1, q.shape[1], -(-max_seqlens // 128) * 128)
        by_request[request, :, offset.clamp(max=by_request.shape[2] - 1)] = scale
        scale = by_request[:requests]
    flags = torch.zeros(requests, key_cache.shape[2], dtype=torch.int32, device=qkv.device)
    return stored, scale, flags


def _split(qkv: Tensor, key_cache: Tensor, value_cache: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[rows, heads, dim] views of the packed rows: queries, then keys, then values."""
    heads, dim, value_dim = *key_cache.shape[2:], value_cache.shape[3]
    widths = [qkv.shape[1] - heads * (dim + value_dim), heads * dim, heads * value_dim]
    q, k, v = qkv.split(widths, 1)
    return q.unflatten(1, (-1, dim)), k.unflatten(1, (heads, dim)), v.unflatten(1, (heads, value_dim))


def _outside_pages(name: str, out_k: Tensor | None, out_v: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Where k and v go instead of the pages."""
    if out_k is None and out_v is None:
        return None
    if out_k is None or out_v is None:
        _refuse(name, "one of out_k and out_v without the other")
    return out_k, out_v


def _places(
    rows: int, seqlens: Tensor, q_index: Tensor, table: Tensor, page_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(position, slot) int32 of each packed row, -1 for padding, and its (request, offset in the request)."""
    row = torch.arange(rows, dtype=torch.int32, device=q_index.device)
    request = torch.searchsorted(q_index[1:].contiguous(), row, right=True)
    known = request.clamp(max=seqlens.shape[0] - 1)
    offset = row - q_index[known]
    position = seqlens[known] - (q_index[known + 1] - row)
    position = torch.where(request < seqlens.shape[0], position, -1).clamp(min=-1)
    page = table[known, (position // page_size).clamp(0, table.shape[1] - 1)]
    slot = torch.where((position >= 0) & (page >= 0), page * page_size + position % page_size, -1)
    return position.int(), slot.int(), request, offset.long()


def _rotated(
    q: Tensor,
    k: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    policy: int,
) -> tuple[Tensor, Tensor]:
    if policy not in (0, 1, 2) or (policy and (q_weight is None or k_weight is None)):
        raise ValueError(f"qk_norm_policy must be 0, 1 or 2, with q_norm_weight and k_norm_weight unless 0, got {policy}")
    if policy == 2:
        q, k = _rms_norm(q, q_weight), _rms_norm(k, k_weight)
    q, k = _rope(q, k, cos_sin, positions)
    if policy == 1:
        q, k = _rms_norm(q, q_weight), _rms_norm(k, k_weight)
    return q, k


# ---- norm, activation, quantisation


def fused_rmsnorm_with_scale(
    a: Tensor,
    weight: Tensor,
    eps: float = torch.finfo(torch.float32).eps,
    scale: Tensor | None = None,
    is_moe: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """RMSNorm(a) / scale[0] in FP8; with is_moe (RMSNorm(a) in float32, / scale[0] in FP8, / scale[1] in FP8)."""
    weight = weight.view(-1)
    scale = torch.ones(1, device=a.device) if scale is None else scale.to(a.device)
    if not is_moe:
        return _rms_norm_quant(a, weight, format=FP8_TENSOR, scale=scale[:1], eps=eps)[0]
    wide = _rms_norm(a.float(), weight.float(), eps=eps)
    first, second = (_quantize(wide, format=FP8_TENSOR, scale=one)[0] for one in (scale[:1], scale[1:2]))
    return wide, first, second


def act_mul_and_quant(gate_up: Tensor, scale: Tensor, use_bf16_mul: bool = True, output: Tensor | None = None) -> Tensor:
    """silu(gate) · up · scale[0] in FP8; the product is float32 whatever use_bf16_mul says, which is more exact."""
    return _silu_and_mul_quant(gate_up, format=FP8_TENSOR, scale=scale.view(-1)[:1].reciprocal(), out=(output, None))[0]


def masked_act_mul_and_quant(gate_up: Tensor, scale: Tensor, num_per_expert: Tensor, output: Tensor | None = None) -> Tensor:
    """act_mul_and_quant of experts' rows, padded to one length; rows past an expert's number are computed too."""
    return act_mul_and_quant(gate_up, scale, output=output)


def masked_act_mul_and_blockwise_quant(
    gate_up: Tensor, num_per_expert: Tensor, output: Tensor | None = None, output_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(silu(gate) · up in FP8, a scale for each 128 columns) of experts' padded rows; a row of zeros has scale 1."""
    return _silu_and_mul_quant(gate_up, format=FP8_BLOCK, out=(output, output_scale))


def scaled_fp8_quant(input: Tensor, scale: Tensor, output: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(input / scale in FP8, scale)."""
    return _quantize(input, format=FP8_TENSOR, scale=scale.view(1), out=(output, None))


# ---- sampling


def fused_sampler(
    logits: Tensor,
    *,
    penalty_mask: Tensor | None = None,
    slot_id: Tensor | None = None,
    repetition_penalty: Tensor | float = 0.0,
    temperature: Tensor | float = 0.0,
    softmax_policy: SoftmaxPolicy = SoftmaxPolicy.NONE,
    topk: Tensor | int = 0,
    topp: Tensor | float = 0.0,
    max_topk: int = 32,
    gumbel_noise: Tensor | None = None,
    draft_token_ids: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """One id a row [B, 1], from the top `topk` (0: max_topk) and of these the top `topp` (0: all), by `sample`.

    The distribution is that of hpc-ops; a seed gives other draws than there, and the same ones in every batch. With a
    temperature alone the draw is from the whole vocabulary.
    """
    asked = {
        "penalty_mask": penalty_mask is not None or slot_id is not None or not _is_zero(repetition_penalty),
        "gumbel_noise": gumbel_noise is not None,
        "draft_token_ids": draft_token_ids is not None,
        "softmax_policy=BEFORE_TOPK": softmax_policy == SoftmaxPolicy.BEFORE_TOPK,
    }
    for name, given in asked.items():
        if given:
            _refuse("fused_sampler", name)
    if max_topk not in (32, 64) or seed <= 0:
        raise ValueError(f"max_topk must be 32 or 64 and seed above 0, got {max_topk} and {seed}")
    if not _is_zero(topp) and softmax_policy == SoftmaxPolicy.NONE:
        raise ValueError("topp needs softmax_policy=AFTER_TOPK: without a softmax there are no probabilities")
    alone = _is_zero(topk) and _is_zero(topp) and softmax_policy == SoftmaxPolicy.NONE and not _is_zero(temperature)
    kept: Tensor | int = 0
    if not alone:
        inside = (topk > 0) & (topk <= max_topk) if isinstance(topk, Tensor) else 0 < topk <= max_topk
        kept = torch.where(inside, topk, max_topk).int() if isinstance(inside, Tensor) else topk if inside else max_topk
    mass = torch.where(topp > 0, topp, 1.0) if isinstance(topp, Tensor) else topp or 1.0
    heat = torch.where(temperature > 0, temperature, 1.0) if isinstance(temperature, Tensor) else temperature or 1.0
    rows = torch.arange(logits.shape[0], device=logits.device)
    options = {"temperature": heat, "top_k": kept, "top_p": mass}
    return _sample(logits, **options, seeds=torch.full_like(rows, seed), offsets=rows)[:, None]


def _is_zero(value: Tensor | float) -> bool:
    return not isinstance(value, Tensor) and value == 0
