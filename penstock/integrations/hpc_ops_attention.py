"""hpc.attention and hpc.rope over our operators; hpc_ops.py exports what is public here."""

from enum import Enum
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from penstock.core.formats import FP8_TENSOR, FP8_TOKEN
from penstock.core.op import NotSupported
from penstock.ops.attention.decode import attention_decode as _attention_decode
from penstock.ops.attention.prefill import attention_prefill as _attention_prefill
from penstock.ops.attention.prefill_paged import attention_prefill_paged as _attention_prefill_paged
from penstock.ops.kvcache.store_kv import store_kv as _store_kv
from penstock.ops.norm.rms_norm import rms_norm as _rms_norm
from penstock.ops.quantization.quantize import quantize as _quantize
from penstock.ops.rotary.rope import rope as _rope
from penstock.ops.rotary.rope_norm_store_kv import rope_norm_store_kv as _rope_norm_store_kv


def refuse(name: str, what: str) -> NoReturn:
    raise NotSupported(f"hpc.{name}: no operator for {what}")


class QuantType(Enum):
    """How q, k and v of FP8 attention are scaled."""

    QPERTOKEN_PERHEAD_KPERTOKEN_PERHEAD_VPERHEAD = 0
    QPERTOKEN_PERHEAD_KPERTENSOR_VPERTENSOR = 1
    QPERTENSOR_KPERTENSOR_VPERTENSOR = 2
    QPERTOKEN_PERHEAD_KPERTOKEN_PERHEAD_VPERHEAD_QKHADAMARD = 3


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


def attention_with_kvcache_prefill_fp8(
    q: Tensor,
    kcache: Tensor,
    vcache: Tensor,
    qscale: Tensor,
    kscale: Tensor,
    vscale: Tensor,
    cu_seqlens_q: Tensor,
    block_ids: Tensor,
    seqlens_kvcache: Tensor,
    max_seqlens_q: int,
    quant_type: QuantType = QuantType.QPERTOKEN_PERHEAD_KPERTENSOR_VPERTENSOR,
    output: Tensor | None = None,
) -> Tensor:
    """attention_with_kvcache_prefill_bf16 in FP8; qscale [requests, heads, padded length], vscale [1] or [KV heads]."""
    tensors = (q, kcache, vcache, qscale, kscale, vscale, cu_seqlens_q, block_ids, seqlens_kvcache)
    return attention_with_kvcache_blocksparse_prefill_fp8(*tensors, max_seqlens_q, quant_type, output=output)


def attention_with_kvcache_blocksparse_prefill_fp8(
    q: Tensor,
    kcache: Tensor,
    vcache: Tensor,
    qscale: Tensor,
    kscale: Tensor,
    vscale: Tensor,
    cu_seqlens_q: Tensor,
    block_ids: Tensor,
    seqlens_kvcache: Tensor,
    max_seqlens_q: int,
    quant_type: QuantType = QuantType.QPERTOKEN_PERHEAD_KPERTENSOR_VPERTENSOR,
    block_mask: Tensor | None = None,
    output: Tensor | None = None,
) -> Tensor:
    """attention_with_kvcache_prefill_fp8; where block_mask [requests, heads, blocks, blocks] is 0, 128 × 128 do not meet.

    A query that sees no key gives zeros; hpc-ops gives NaN.
    """
    name = "attention_with_kvcache_blocksparse_prefill_fp8"
    request, offset = owners(q.shape[0], cu_seqlens_q)
    if qscale.dim() == 3:
        qscale = qscale[request, :, offset.clamp(max=qscale.shape[2] - 1)]
    scales = {"q_scale": qscale, "k_scale": _key_scale(name, kscale, kcache, quant_type), "v_scale": vscale}
    tensors = (q, kcache, vcache, block_ids, cu_seqlens_q, seqlens_kvcache)
    return _attention_prefill_paged(*tensors, max_seqlen_q=int(max_seqlens_q), block_mask=block_mask, out=output, **scales)


def attention_decode_fp8(
    q: Tensor,
    kcache: Tensor,
    vcache: Tensor,
    block_ids: Tensor,
    num_seq_kvcache: Tensor,
    qscale: Tensor,
    kscale: Tensor,
    vscale: Tensor,
    mtp: int = 0,
    new_kv_included: bool = False,
    quant_type: QuantType = QuantType.QPERTOKEN_PERHEAD_KPERTENSOR_VPERTENSOR,
    splitk: bool = True,
    task_map: Tensor | None = None,
    split_flag: Tensor | None = None,
    output: Tensor | None = None,
) -> Tensor:
    """attention_decode_bf16 in FP8; qscale [rows, heads], vscale [1] or [KV heads]."""
    lengths = num_seq_kvcache if new_kv_included else num_seq_kvcache + (mtp + 1)
    k_scale = _key_scale("attention_decode_fp8", kscale, kcache, quant_type)
    scales = {"q_scale": qscale, "k_scale": k_scale, "v_scale": vscale}
    return _attention_decode(q, kcache, vcache, block_ids, lengths, q_len=mtp + 1, out=output, **scales)


def _key_scale(name: str, kscale: Tensor, kcache: Tensor, quant_type: QuantType) -> Tensor:
    """[1], or [pages, page size, KV heads]: a scale for each token and head, from the rows of a page behind its tokens.

    Those rows hold float32 in the bytes of FP8, [pages, 4 · page size / dim, KV heads, dim]. In HND order they are read where
    they lie; in NHD order they are copied.
    """
    kind = QuantType(quant_type)
    if kind in (QuantType.QPERTOKEN_PERHEAD_KPERTENSOR_VPERTENSOR, QuantType.QPERTENSOR_KPERTENSOR_VPERTENSOR):
        return kscale
    if kind is not QuantType.QPERTOKEN_PERHEAD_KPERTOKEN_PERHEAD_VPERHEAD:
        refuse(name, f"quant_type={kind.name}")
    values = kscale if kscale.dtype is torch.float32 else kscale.view(torch.float32)
    return values.transpose(2, 3).flatten(1, 2)[:, : kcache.shape[1]]


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
    places = _places(qkv.shape[0], num_seqlen_per_req, q_index, kvcache_indices, key_cache.shape[1])
    pages = _pages("rope_norm_store_kv", key_cache, value_cache, places.slots, out_k, out_v)
    norms = _norms(q_norm_weight, k_norm_weight, qk_norm_policy)
    if key_cache.shape[3] == value_cache.shape[3]:
        return _rope_norm_store_kv(qkv, cos_sin, places.positions, pages.slots, *pages[:2], out=out_q, **norms)
    q, k, v = _split(qkv, key_cache, value_cache)
    q, k = _rotated(q, k, cos_sin, places.positions, **norms)
    _store_kv(k, v, *pages)
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
        refuse("rope_norm_store_kv_fp8", f"upper_max={upper_max}; FP8 is quantised to ±448")
    if quant_policy not in (1, 2) or (quant_policy == 2 and q_scale_inv is None):
        refuse("rope_norm_store_kv_fp8", f"quant_policy={quant_policy} with q_scale_inv={q_scale_inv}")
    places = _places(qkv.shape[0], num_seqlen_per_req, q_index, kvcache_indices, key_cache.shape[1])
    pages = _pages("rope_norm_store_kv_fp8", key_cache, value_cache, places.slots, out_k, out_v)
    norms = _norms(q_norm_weight, k_norm_weight, qk_norm_policy)
    scales = {"format": FP8_TENSOR, "k_scale": k_scale, "v_scale": v_scale}
    scale: Tensor | None = None
    if quant_policy == 1 and key_cache.shape[3] == value_cache.shape[3]:
        inputs = (qkv, cos_sin, places.positions, pages.slots, *pages[:2])
        stored, scale = _rope_norm_store_kv(*inputs, out=(out_q, None), **norms, **scales)
    else:
        q, k, v = _split(qkv, key_cache, value_cache)
        q, k = _rotated(q, k, cos_sin, places.positions, **norms)
        _store_kv(k, v, *pages, **scales)
        if q_scale_inv is None or quant_policy == 1:
            stored, scale = _quantize(q, format=FP8_TOKEN, out=(out_q, None))
        else:
            stored, _ = _quantize(q, format=FP8_TENSOR, scale=q_scale_inv.reciprocal(), out=(out_q, None))
    requests = num_seqlen_per_req.shape[0]
    if is_prefill and scale is not None:
        # One column more takes the scales of rows of no request.
        longest = -(-max_seqlens // 128) * 128
        by_request = scale.new_zeros(requests, scale.shape[1], longest + 1)
        column = torch.where(places.positions < 0, longest, places.offsets.clamp(max=longest))
        by_request[places.requests, :, column] = scale
        scale = by_request[:, :, :longest]
    flags = torch.zeros(requests, key_cache.shape[2], dtype=torch.int32, device=qkv.device)
    return stored, scale, flags


def _split(qkv: Tensor, key_cache: Tensor, value_cache: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[rows, heads, dim] views of the packed rows: queries, then keys, then values."""
    heads, dim, value_dim = *key_cache.shape[2:], value_cache.shape[3]
    widths = [qkv.shape[1] - heads * (dim + value_dim), heads * dim, heads * value_dim]
    q, k, v = qkv.split(widths, 1)
    return q.unflatten(1, (-1, dim)), k.unflatten(1, (heads, dim)), v.unflatten(1, (heads, value_dim))


class _Pages(NamedTuple):
    """Where new keys and values go."""

    k_cache: Tensor
    v_cache: Tensor
    slots: Tensor


def _pages(
    name: str, key_cache: Tensor, value_cache: Tensor, slots: Tensor, out_k: Tensor | None, out_v: Tensor | None
) -> _Pages:
    """The caches, or out_k and out_v as pages of one row each."""
    if out_k is None and out_v is None:
        return _Pages(key_cache, value_cache, slots)
    if out_k is None or out_v is None:
        refuse(name, "one of out_k and out_v without the other")
    rows = torch.arange(slots.shape[0], dtype=torch.int32, device=slots.device)
    return _Pages(out_k[:, None], out_v[:, None], rows)


def _norms(q_weight: Tensor | None, k_weight: Tensor | None, policy: int) -> dict[str, Any]:
    """The norms of heads as rope_norm_store_kv takes them."""
    if policy not in (0, 1, 2) or (policy and (q_weight is None or k_weight is None)):
        raise ValueError(f"qk_norm_policy must be 0, 1 or 2, with q_norm_weight and k_norm_weight unless 0, got {policy}")
    return {"q_norm": q_weight, "k_norm": k_weight, "norm_first": policy == 2} if policy else {}


def owners(rows: int, q_index: Tensor) -> tuple[Tensor, Tensor]:
    """(request, offset in it) of each packed row; a row of no request has the last request, and an offset past its end."""
    row = torch.arange(rows, dtype=torch.int32, device=q_index.device)
    request = torch.searchsorted(q_index[1:].contiguous(), row, right=True).clamp(max=q_index.shape[0] - 2)
    return request, (row - q_index[request]).long()


class _Places(NamedTuple):
    """Of each packed row: position and slot, int32 and -1 for padding, and what `owners` says."""

    positions: Tensor
    slots: Tensor
    requests: Tensor
    offsets: Tensor


def _places(rows: int, seqlens: Tensor, q_index: Tensor, table: Tensor, page_size: int) -> _Places:
    request, offset = owners(rows, q_index)
    length = q_index[request + 1] - q_index[request]
    position = (seqlens[request] - length + offset).clamp(min=-1)
    position = torch.where(offset < length, position, -1)
    page = table[request, (position // page_size).clamp(0, table.shape[1] - 1)]
    slot = torch.where((position >= 0) & (page >= 0), page * page_size + position % page_size, -1)
    return _Places(position.int(), slot.int(), request, offset)


def _rotated(
    q: Tensor,
    k: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """The norms and the rotation of rope_norm_store_kv, one after another."""
    if norm_first and q_norm is not None and k_norm is not None:
        q, k = _rms_norm(q, q_norm), _rms_norm(k, k_norm)
    q, k = _rope(q, k, cos_sin, positions)
    if not norm_first and q_norm is not None and k_norm is not None:
        q, k = _rms_norm(q, q_norm), _rms_norm(k, k_norm)
    return q, k
