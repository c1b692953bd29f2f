"""Contract rules that the attention operators share."""

from typing import Any

import torch
from torch import Tensor

from penstock.core.check import Contract, describe, short
from penstock.ops.attention._reference import FP8, MASK_BLOCK

MAX_HEAD_DIM = 256
MAX_PAGE_SIZE = 256


def softcap_value(value: object) -> str | None:
    """None or a number of at least zero; zero is None."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")
    return None if value is None or good else "None or a number >= 0"


def window_size(value: object) -> str | None:
    """Keys to one side, -1 for all."""
    good = isinstance(value, int) and not isinstance(value, bool) and value >= -1
    return None if good else "an integer >= -1"


def split_window(contract: Contract, window: object) -> tuple[int, int]:
    """The two sides of `window`; ContractError when it has not two."""
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise contract.error("window", f"must be (left, right), got {window!r}", {})
    return window[0], window[1]


def relate_heads(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str]) -> tuple[str, str] | None:
    """What is wrong with head counts or head dimensions, as (argument, fault)."""
    Hq, Hkv = q.shape[-2], k.shape[-2]
    if Hkv == 0 or Hq % Hkv:
        return "q", f"must have a multiple of {names[0]}'s {Hkv} heads, got {Hq}"
    for name, tensor in (("q", q), (names[1], v)):
        if not 1 <= tensor.shape[-1] <= MAX_HEAD_DIM:
            return name, f"must have a head dimension of 1 to {MAX_HEAD_DIM}, got {tensor.shape[-1]}"
    return None


def relate_scales(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, q_scale: object, k_scale: object, v_scale: object
) -> tuple[str, str] | None:
    """What is wrong with the scales of FP8 values, or with the strides of the values' cache, as (argument, fault)."""
    heads, kv_heads = q.shape[1], k_cache.shape[2]
    scales = {
        "q_scale": (q_scale, ([1], [heads], [q.shape[0], heads])),
        "k_scale": (k_scale, ([1], [kv_heads], [*k_cache.shape[:3]])),
        "v_scale": (v_scale, ([1], [kv_heads])),
    }
    # float64 values are those of FP8 in the reference's own check.
    quantized = q.dtype in (FP8, torch.float64)
    if not quantized and v_cache.stride(3) != 1 and v_cache.shape[3] > 1:
        return "v_cache", f"must have stride 1 in its last dimension, got {v_cache.stride(3)}"
    for name, (scale, shapes) in scales.items():
        if scale is None:
            continue
        if not quantized:
            return name, f"must be None for {short(q.dtype)} values, got {describe(scale)}"
        wanted = "float32 " + " or ".join(map(str, shapes)) + f" on {q.device}"
        if not isinstance(scale, Tensor) or [*scale.shape] not in shapes or scale.device != q.device:
            return name, f"must be {wanted}, got {describe(scale)}"
        if scale.dtype is not (torch.float64 if q.dtype is torch.float64 else torch.float32):
            return name, f"must be {wanted}, got {describe(scale)}"
    return None


def relate_block_mask(
    block_mask: Tensor | None, q: Tensor, seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> tuple[str, str] | None:
    """What is wrong with a block mask, as (argument, fault)."""
    if block_mask is None:
        return None
    blocks = [-(-length // MASK_BLOCK) for length in (max_seqlen_q, max_seqlen_k)]
    wanted = [seqlens_k.shape[0], q.shape[1]]
    if [*block_mask.shape[:2]] != wanted or any(have < need for have, need in zip(block_mask.shape[2:], blocks, strict=True)):
        return "block_mask", f"must be {wanted + blocks} or have more blocks, got {[*block_mask.shape]}"
    return None


def page_size_reason(k_cache: Tensor) -> str | None:
    """Why no kernel reads pages of this size, or None."""
    size = k_cache.shape[1]
    if size & (size - 1) or not 1 <= size <= MAX_PAGE_SIZE:
        return f"page_size {size} is not a power of two from 1 to {MAX_PAGE_SIZE}"
    return None


def tma_reason(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, page_size: int) -> str | None:
    """Why the Hopper kernel of prefill does not take the call, or None."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"q is {short(q.dtype)}; the kernel multiplies float16 or bfloat16"
    for name, size in (("q", q.shape[-1]), ("v", v.shape[-1])):
        if size <= 32:
            return f"the head dimension {size} of {name} would fill less than half of the kernel's narrowest tile, 64"
    if page_size and (page_size & (page_size - 1) or not 16 <= page_size <= MAX_PAGE_SIZE):
        return f"page_size {page_size} is not a power of two from 16 to {MAX_PAGE_SIZE}"
    return _unaligned({"q": q, "k": k, "v": v, "out": out})


def fp8_tma_reason(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor | None,
    k_scale: Tensor | None,
    block: int = 128,
    widest: int = 128,
) -> str | None:
    """Why a Hopper kernel whose blocks are so many keys does not take the call on FP8 values, or None."""
    for name, size in (("q", q.shape[-1]), ("v_cache", v_cache.shape[-1])):
        if not 64 <= size <= widest:
            return f"the head dimension {size} of {name} is not from 64 to {widest}, which FP8 tiles hold"
    sizes = [size for size in (64, 128, 256) if size >= block]
    if k_cache.shape[1] not in sizes:
        known = f"{', '.join(map(str, sizes[:-1]))} or {sizes[-1]}"
        return f"page_size {k_cache.shape[1]} is not {known}; a block of FP8 values is {block} slots of one page"
    if out is not None and out.dtype is torch.float32:
        return "out is float32; the kernel writes float16 or bfloat16"
    if v_cache.stride(1) != 1:
        return f"v_cache is not transposed inside its pages: its slots are {v_cache.stride(1)} elements apart, wanted 1"
    turned = {"v_cache": v_cache.transpose(1, 3)}
    if k_scale is not None and k_scale.dim() == 3:
        if k_scale.stride(1) != 1:
            return f"k_scale's slots are {k_scale.stride(1)} elements apart, wanted 1"
        turned["k_scale"] = k_scale.transpose(1, 2)
    return _unaligned({"q": q, "k_cache": k_cache, "out": out, **turned})


def latent_tma_reason(q_latent: Tensor, q_rope: Tensor, cache: Tensor, q_len: int) -> str | None:
    """Why the Hopper kernel of latent attention does not take the call, or None."""
    if q_latent.dtype not in (torch.float16, torch.bfloat16):
        return f"q_latent is {short(q_latent.dtype)}; the kernel multiplies float16 or bfloat16"
    if (q_latent.shape[2], q_rope.shape[2]) != (512, 64):
        return f"Dc + Dr = {q_latent.shape[2]} + {q_rope.shape[2]} is not 512 + 64"
    heads, page_size = q_latent.shape[1], cache.shape[1]
    if q_len > 1 and heads % 64 and 64 % heads:
        return f"{heads} heads of q_len {q_len} do not fill blocks of 64 rows; that takes a divisor or a multiple of 64"
    if page_size & (page_size - 1) or not 16 <= page_size <= MAX_PAGE_SIZE:
        return f"page_size {page_size} is not a power of two from 16 to {MAX_PAGE_SIZE}"
    return _unaligned({"q_latent": q_latent, "q_rope": q_rope, "cache": cache})


def _unaligned(tensors: dict[str, Tensor | None]) -> str | None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        strides = [stride for size, stride in zip(tensor.shape[:-1], tensor.stride(), strict=False) if size > 1]
        if any(stride * tensor.element_size() % 16 for stride in strides) or tensor.data_ptr() % 16:
            return f"{name} does not start every row on a multiple of 16 bytes, as the tensor memory accelerator needs it"
    return None


def check_offsets(
    contract: Contract, name: str, offsets: Tensor, tokens: int, longest: int | None, named: dict[str, Any]
) -> None:
    """Reads cumulative lengths: they start at 0, never fall, end within the tokens, and no request is over `longest`."""
    if offsets.numel() == 0:
        return
    lengths = offsets.diff()
    if int(offsets[0]) != 0 or bool((lengths < 0).any()) or int(offsets[-1]) > tokens:
        raise contract.error(name, f"must rise from 0 to at most {tokens}, got {offsets.tolist()}", named)
    if longest is not None and lengths.numel() and int(lengths.max()) > longest:
        raise contract.error(
            name.replace("cu_", "max_").replace("seqlens", "seqlen"),
            f"must be at least {int(lengths.max())}, got {longest}",
            named,
        )


def check_pages(contract: Contract, k_cache: Tensor, page_table: Tensor, seqlens_k: Tensor, named: dict[str, Any]) -> None:
    """Reads lengths and page table: every key of a request has a page of the cache."""
    num_pages, page_size = k_cache.shape[:2]
    limit = page_table.shape[1] * page_size
    if seqlens_k.numel() and (int(seqlens_k.min()) < 0 or int(seqlens_k.max()) > limit):
        raise contract.error("seqlens_k", f"must be from 0 to {limit}, the page table's reach, got {seqlens_k.tolist()}", named)
    columns = torch.arange(page_table.shape[1], device=page_table.device)
    used = page_table[columns[None] * page_size < seqlens_k[:, None]]
    if used.numel() and (int(used.min()) < 0 or int(used.max()) >= num_pages):
        raise contract.error(
            "page_table", f"must name pages below {num_pages}, got {int(used.min())} to {int(used.max())}", named
        )


def lse_dtype(q: Tensor) -> torch.dtype:
    """float32, or float64 for float64 inputs."""
    return torch.float64 if q.dtype is torch.float64 else torch.float32


def out_dtype(q: Tensor) -> torch.dtype:
    """The dtype of q, or bfloat16 where that is FP8."""
    return torch.bfloat16 if q.dtype is FP8 else q.dtype
