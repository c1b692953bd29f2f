"""Every name of hpc-ops' public modules: the covered ones against plain torch, the others refused by name; the switch."""

import importlib.util
import inspect
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from penstock.core.op import NotSupported
from penstock.integrations import hpc_ops as hpc
from penstock.testing.budget import judge

FP8 = torch.float8_e4m3fn
# The functions of hpc/*.py at commit 6e2eced and how their arguments are called, in order.
PUBLIC = {
    "act_mul_and_quant": "gate_up scale use_bf16_mul output",
    "masked_act_mul_and_quant": "gate_up scale num_per_expert output",
    "masked_act_mul_and_blockwise_quant": "gate_up num_per_expert output output_scale",
    "scaled_fp8_quant": "input scale output",
    "fused_rmsnorm_with_scale": "a weight eps scale is_moe",
    "attention_prefill_bf16": "q k v seqlens_q cu_seqlens_q max_seqlens_q output",
    "attention_with_kvcache_prefill_bf16": "q kcache vcache cu_seqlens_q block_ids seqlens_kvcache max_seqlens_q output",
    "attention_with_kvcache_prefill_fp8": (
        "q kcache vcache qscale kscale vscale cu_seqlens_q block_ids seqlens_kvcache max_seqlens_q quant_type output"
    ),
    "attention_with_kvcache_blocksparse_prefill_fp8": (
        "q kcache vcache qscale kscale vscale cu_seqlens_q block_ids seqlens_kvcache max_seqlens_q quant_type block_mask output"
    ),
    "attention_decode_bf16": (
        "q kcache vcache block_ids num_seq_kvcache mtp new_kv_included splitk task_map split_flag output"
    ),
    "attention_decode_fp8": (
        "q kcache vcache block_ids num_seq_kvcache qscale kscale vscale mtp new_kv_included quant_type splitk task_map"
        " split_flag output"
    ),
    "get_attention_decode_task_workspace": "max_num_batch max_seqlen num_head_kv min_process_len",
    "assign_attention_decode_task": "num_seq_kvcache task_map num_head_kv mtp new_kv_included min_process_len",
    "print_attention_decode_task": "",
    "rope_norm_store_kv": (
        "key_cache value_cache qkv cos_sin num_seqlen_per_req q_index kvcache_indices is_prefill q_norm_weight k_norm_weight"
        " out_q out_k out_v qk_norm_policy"
    ),
    "rope_norm_store_kv_fp8": (
        "key_cache value_cache qkv cos_sin num_seqlen_per_req q_index kvcache_indices is_prefill k_scale v_scale quant_policy"
        " max_seqlens upper_max q_scale_inv q_norm_weight k_norm_weight out_q out_k out_v qk_norm_policy"
    ),
    "fused_sampler": (
        "logits penalty_mask slot_id repetition_penalty temperature softmax_policy topk topp max_topk gumbel_noise"
        " draft_token_ids seed"
    ),
    "count_and_gather": "",
    "reduce": "",
    "fuse_moe": (
        "x gate_up_weight down_weight gate_up_scale down_scale act_and_mul_scale topk_ids topk_scale rank_ep num_expert_total"
        " use_bf16_mul shared_output output"
    ),
    "fuse_moe_pertensor_fp8": (
        "x gate_up_weight down_weight gate_up_scale down_scale act_and_mul_scale topk_ids topk_scale rank_ep num_expert_total"
        " use_bf16_mul shared_output"
    ),
    "fuse_moe_blockwise_fp8": (
        "x x_scale gate_up_weight gate_up_weight_scale down_weight down_weight_scale topk_ids topk_scale rank_ep"
        " num_expert_total shared_output"
    ),
    "fuse_moe_blockwise": (
        "x x_scale gate_up_weight gate_up_weight_scale down_weight down_weight_scale topk_ids topk_scale rank_ep"
        " num_expert_total shared_output output"
    ),
    "reformat_x_scale": "x_scale seqlens cu_seqlens num_seq_per_group_avg output",
    "group_gemm_pertensor_fp8": (
        "x weight seqlens cu_seqlens y_scale num_seq_per_group_avg output tma_desc task_map_workspace"
    ),
    "group_gemm_fp8": ("x weight seqlens cu_seqlens y_scale num_seq_per_group_avg output tma_desc task_map_workspace"),
    "group_gemm_blockwise_fp8": (
        "x weight seqlens cu_seqlens x_scale w_scale num_seq_per_group_avg output tma_desc task_map_workspace"
    ),
    "get_gemm_bf16xfp32_workspace": "max_weight_hidden_size max_tokens",
    "gemm_bf16xfp32": "x w_high w_low scale use_fp32_output use_splitk split_flag",
    "fuse_allreduce_rmsnorm_high_throughput": "",
    "fuse_allreduce_rmsnorm_low_latency": "",
    "empty_multimem": "",
    "stem_oam_prep_paged_kv": "",
    "stem_oam_prep_varlen_q": "",
    "stem_oam_gemm": "",
    "stem_tpd": "",
    "stem_paged_kv": "",
}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there_or_refused_by_name(name):
    function = getattr(hpc, name)
    if name in hpc.NOT_COVERED:
        assert PUBLIC[name] == ""
        with pytest.raises(NotSupported, match=f"hpc.{name}: no operator for {hpc.NOT_COVERED[name]}"):
            function(1, two=2)
    else:
        assert list(inspect.signature(function).parameters) == PUBLIC[name].split()


def test_nothing_else_is_there():
    assert set(hpc.NOT_COVERED) <= set(PUBLIC)
    functions = {name for name, value in vars(hpc).items() if inspect.isfunction(value) and not name.startswith("_")}
    assert functions == (set(PUBLIC) - set(hpc.NOT_COVERED)) | {"install"}
    assert set(hpc.__all__) == (functions - {"install"}) | {"QuantType", "SoftmaxPolicy"}
    assert not hasattr(hpc, "gated_mla_gemm") and hpc.normalization is hpc
    assert [kind.value for kind in hpc.QuantType] == [0, 1, 2, 3] and hpc.SoftmaxPolicy.AFTER_TOPK == 2


# ---- attention


def attention(q, k, v, dtype):
    """Causal, bottom-right aligned, every step in one dtype; q [n, Hq, D], k [m, Hkv, D], v [m, Hkv, Dv]."""
    n, m, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    k, v = (x.to(dtype).repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    scores = q.to(dtype).transpose(0, 1) @ k.transpose(1, 2) / q.shape[2] ** 0.5
    scores = scores.masked_fill(torch.ones(n, m).tril(m - n) == 0, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1)


def judge_attention(got, requests):
    """As close to float64 as the operators themselves must be; requests: (q, k, v) of each."""
    exact, plain = (torch.cat([attention(*rows, dtype) for rows in requests]) for dtype in (torch.float64, torch.bfloat16))
    judge("attention", got, exact, plain)


def paged(lengths, heads, dim, page_size, layout, generator):
    """(k cache, v cache, block table, keys and values of each request): pages in random order, NaN where nothing is stored.

    layout: nhd; hnd; or interleaved, strided halves of one buffer [pages, heads, page size, 2 · dim].
    """
    counts = [-(-length // page_size) for length in lengths]
    pages = sum(counts) + 2
    if layout == "interleaved":
        halves = torch.full((pages, heads, page_size, 2 * dim), torch.nan, dtype=torch.bfloat16).split(dim, -1)
        caches = [half.transpose(1, 2) for half in halves]
    else:
        shape = (pages, page_size, heads, dim) if layout == "nhd" else (pages, heads, page_size, dim)
        caches = [torch.full(shape, torch.nan, dtype=torch.bfloat16) for _ in range(2)]
        caches = caches if layout == "nhd" else [cache.transpose(1, 2) for cache in caches]
    order = torch.randperm(pages, generator=generator)
    table = torch.zeros(len(lengths), max(counts) + 1, dtype=torch.int32)
    contents, used = [], 0
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        mine = order[used : used + count]
        used += count
        table[row, :count] = mine.int()
        both = torch.randn(2, length, heads, dim, generator=generator).bfloat16()
        for cache, values in zip(caches, both, strict=True):
            for i, page in enumerate(mine):
                part = values[i * page_size : (i + 1) * page_size]
                cache[page, : len(part)] = part
        contents.append(both)
    return *caches, table, contents


# The last two have group sizes and head dims that hpc-ops refuses.
HEADS = [(8, 2, 128), (8, 1, 128), (6, 2, 64), (3, 3, 256)]


@pytest.mark.parametrize("layout", ["nhd", "hnd", "interleaved"])
@pytest.mark.parametrize(("Hq", "Hkv", "dim"), HEADS)
def test_decode(layout, Hq, Hkv, dim):
    generator = torch.Generator().manual_seed(dim + Hq)
    page_size, lengths = (64, [70, 1, 129]) if dim == 128 else (16, [40, 3, 17])
    for mtp in (0, 2):
        k_cache, v_cache, table, contents = paged([n + mtp for n in lengths], Hkv, dim, page_size, layout, generator)
        q = torch.randn(3 * (mtp + 1), Hq, dim, generator=generator).bfloat16()
        total = torch.tensor([n + mtp for n in lengths], dtype=torch.int32)
        task_map = hpc.get_attention_decode_task_workspace(3, 256, Hkv, min_process_len=1024)
        assert hpc.assign_attention_decode_task(total, task_map, Hkv, mtp + 1, True) is task_map
        output = torch.full_like(q, torch.nan)
        arguments = (q, k_cache, v_cache, table)
        options = {"mtp": mtp, "splitk": True, "task_map": task_map}
        got = hpc.attention_decode_bf16(*arguments, total, new_kv_included=True, output=output, **options)
        assert got is output
        judge_attention(got, [(rows, k, v) for rows, (k, v) in zip(q.split(mtp + 1), contents, strict=True)])
        before = hpc.attention_decode_bf16(*arguments, total - (mtp + 1), new_kv_included=False, **options)
        assert torch.equal(before, got)


@pytest.mark.parametrize("layout", ["nhd", "hnd", "interleaved"])
@pytest.mark.parametrize(("Hq", "Hkv", "dim"), HEADS)
def test_prefill_over_pages(layout, Hq, Hkv, dim):
    generator = torch.Generator().manual_seed(dim - Hq)
    news, olds = [9, 1, 20], [0, 33, 7]
    lengths = [new + old for new, old in zip(news, olds, strict=True)]
    k_cache, v_cache, table, contents = paged(lengths, Hkv, dim, 16, layout, generator)
    q = torch.randn(sum(news), Hq, dim, generator=generator).bfloat16()
    cu = torch.tensor([0, 9, 10, 30], dtype=torch.int32)
    arguments = (q, k_cache, v_cache, cu, table, torch.tensor(lengths, dtype=torch.int32), torch.tensor(20))
    output = torch.full_like(q, torch.nan)
    got = hpc.attention_with_kvcache_prefill_bf16(*arguments, output=output)
    assert got is output and torch.equal(got, hpc.attention_with_kvcache_prefill_bf16(*arguments))
    judge_attention(got, [(rows, k, v) for rows, (k, v) in zip(q.split(news), contents, strict=True)])


def test_prefill():
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 0, 17]
    q, k, v = (torch.randn(22, heads, 64, generator=generator).bfloat16() for heads in (6, 2, 2))
    cu = torch.tensor([0, 5, 5, 22], dtype=torch.int32)
    got = hpc.attention_prefill_bf16(q, k, v, torch.tensor(lengths, dtype=torch.int32), cu, 17)
    judge_attention(got, list(zip(*(x.split(lengths) for x in (q, k, v)), strict=True)))


# ---- attention in FP8


def attention_fp8(q, k, v, dtype, seen=None):
    """Exact in float64; in float32 with weights stored as e4m3(256 · exp(s - m)), as hpc-ops documents it.

    q, k, v: (FP8 values, scales that broadcast to them) of one request; seen: [heads, n, m] on top of causal.
    """
    (q, q_scale), (k, k_scale), (v, v_scale) = ((x.to(dtype), scale.to(dtype)) for x, scale in (q, k, v))
    n, m, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    scaled = (k * k_scale).repeat_interleave(group, 1).transpose(0, 1)
    v, v_scale = (x.expand_as(v).repeat_interleave(group, 1).transpose(0, 1) for x in (v, v_scale))
    scores = (q * q_scale).transpose(0, 1) @ scaled.transpose(1, 2) / q.shape[2] ** 0.5
    visible = torch.ones(n, m).tril(m - n) > 0
    scores = scores.masked_fill(~(visible if seen is None else visible & seen), -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    total = weights.sum(-1, keepdim=True)
    if dtype is torch.float32:
        weights = (weights * 256).to(FP8).float() / 256
    return (weights @ v * v_scale[:, :1] / total).transpose(0, 1).to(dtype if dtype is torch.float64 else torch.bfloat16)


def quantised(x, scale):
    return (x.float() / scale).clamp(-448, 448).to(FP8)


def cache_fp8(k_cache, v_cache, kind, layout, generator):
    """FP8 caches with their scales as hpc-ops wants them, and those scales as [pages, page size, heads, 1]-like tensors."""
    pages, page_size, heads, dim = k_cache.shape
    v_scale = torch.rand(heads if kind == 0 else 1, generator=generator) * 0.02 + 0.005
    v_cache = quantised(v_cache, v_scale[:, None] if kind == 0 else v_scale)
    if kind == 1:
        k_scale = torch.tensor([0.013])
        return quantised(k_cache, k_scale), v_cache, k_scale, v_scale, k_scale.expand(pages, page_size, heads, 1)
    of_tokens = torch.rand(pages, page_size, heads, 1, generator=generator) * 0.02 + 0.005
    rows = page_size * 4 // dim
    # Values, and behind them in the same page float32 scales in rows of FP8.
    whole = torch.zeros(pages, heads, page_size + rows, dim, dtype=FP8)
    whole = whole.transpose(1, 2) if layout == "hnd" else whole.transpose(1, 2).contiguous()
    whole[:, :page_size] = quantised(k_cache, of_tokens)
    inside = of_tokens[..., 0].reshape(pages, rows, dim // 4, heads).transpose(2, 3).contiguous()
    whole[:, page_size:] = inside.view(FP8)
    return whole[:, :page_size], v_cache, whole[:, page_size:], v_scale, of_tokens


def requests_fp8(q, q_scale, counts, lengths, caches, table):
    """(q, k, v) of each request with their scales, gathered from the pages."""
    k_cache, v_cache, _, v_scale, of_tokens = caches
    v_scale = v_scale[:, None] if len(v_scale) > 1 else v_scale
    parts = zip(q.split(counts), q_scale.split(counts), strict=True)
    for row, ((rows, scales), length) in enumerate(zip(parts, lengths, strict=True)):
        k, v, k_scale = (x[table[row].long()].flatten(0, 1)[:length] for x in (k_cache, v_cache, of_tokens))
        yield (rows, scales[..., None]), (k, k_scale), (v, v_scale)


def judge_fp8(got, requests, seen=None):
    masks = [None] * len(requests) if seen is None else seen
    exact, plain = (
        torch.cat([attention_fp8(*rows, dtype, mask) for rows, mask in zip(requests, masks, strict=True)])
        for dtype in (torch.float64, torch.float32)
    )
    judge("attention", got, exact, plain)


KINDS = {
    0: hpc.QuantType.QPERTOKEN_PERHEAD_KPERTOKEN_PERHEAD_VPERHEAD,
    1: hpc.QuantType.QPERTOKEN_PERHEAD_KPERTENSOR_VPERTENSOR,
}


@pytest.mark.parametrize("layout", ["nhd", "hnd"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("Hq", "Hkv", "dim"), [(8, 2, 128), (6, 2, 64)])
def test_decode_fp8(kind, layout, Hq, Hkv, dim):
    generator = torch.Generator().manual_seed(dim + kind)
    lengths, mtp = [70, 2, 129], 1
    k_cache, v_cache, table, _ = paged(lengths, Hkv, dim, 64, layout, generator)
    caches = cache_fp8(k_cache.nan_to_num(0.0), v_cache.nan_to_num(0.0), kind, layout, generator)
    q_scale = torch.rand(6, Hq, generator=generator) * 0.02 + 0.005
    q = quantised(torch.randn(6, Hq, dim, generator=generator), q_scale[..., None])
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    output = torch.full(q.shape, torch.nan, dtype=torch.bfloat16)
    arguments = (q, *caches[:2], table)
    scales = (q_scale, *caches[2:4])
    options = {"mtp": mtp, "quant_type": KINDS[kind], "task_map": hpc.get_attention_decode_task_workspace(3, 256, Hkv)}
    got = hpc.attention_decode_fp8(*arguments, seqlens, *scales, new_kv_included=True, output=output, **options)
    assert got is output
    judge_fp8(got, list(requests_fp8(q, q_scale, [2, 2, 2], lengths, caches, table)))
    assert torch.equal(got, hpc.attention_decode_fp8(*arguments, seqlens - 2, *scales, **options))


@pytest.mark.parametrize("layout", ["nhd", "hnd"])
@pytest.mark.parametrize("kind", KINDS)
def test_prefill_fp8(kind, layout):
    generator = torch.Generator().manual_seed(kind)
    Hq, Hkv, dim, news, lengths = 4, 2, 64, [9, 0, 20], [9, 33, 27]
    k_cache, v_cache, table, _ = paged(lengths, Hkv, dim, 16, layout, generator)
    caches = cache_fp8(k_cache.nan_to_num(0.0), v_cache.nan_to_num(0.0), kind, layout, generator)
    by_request = torch.rand(3, Hq, 128, generator=generator) * 0.02 + 0.005
    q_scale = torch.cat([by_request[b, :, :n].T for b, n in enumerate(news)])
    q = quantised(torch.randn(29, Hq, dim, generator=generator), q_scale[..., None])
    cu, seqlens = torch.tensor([0, 9, 9, 29], dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)
    arguments = (q, *caches[:2], by_request, *caches[2:4], cu, table, seqlens, 20)
    output = torch.full(q.shape, torch.nan, dtype=torch.bfloat16)
    got = hpc.attention_with_kvcache_prefill_fp8(*arguments, KINDS[kind], output=output)
    assert got is output
    judge_fp8(got, list(requests_fp8(q, q_scale, news, lengths, caches, table)))
    if kind == 1:
        assert torch.equal(got, hpc.attention_with_kvcache_prefill_fp8(*arguments))
    hadamard = hpc.QuantType.QPERTOKEN_PERHEAD_KPERTOKEN_PERHEAD_VPERHEAD_QKHADAMARD
    with pytest.raises(NotSupported, match=f"quant_type={hadamard.name}"):
        hpc.attention_with_kvcache_prefill_fp8(*arguments, hadamard)


def test_block_sparse_prefill_fp8():
    generator = torch.Generator().manual_seed(5)
    Hq, Hkv, dim, length = 2, 1, 64, 300
    k_cache, v_cache, table, _ = paged([length], Hkv, dim, 64, "nhd", generator)
    caches = cache_fp8(k_cache.nan_to_num(0.0), v_cache.nan_to_num(0.0), 1, "nhd", generator)
    by_request = torch.rand(1, Hq, 384, generator=generator) * 0.02 + 0.005
    q_scale = by_request[0, :, :length].T
    q = quantised(torch.randn(length, Hq, dim, generator=generator), q_scale[..., None])
    mask = torch.eye(3).expand(1, Hq, 3, 3).contiguous().to(torch.uint8)
    mask[0, 1, 2, 0] = 1
    cu, seqlens = torch.tensor([0, length], dtype=torch.int32), torch.tensor([length], dtype=torch.int32)
    arguments = (q, *caches[:2], by_request, *caches[2:4], cu, table, seqlens, length)
    got = hpc.attention_with_kvcache_blocksparse_prefill_fp8(*arguments, block_mask=mask)
    seen = mask[0].repeat_interleave(128, 1).repeat_interleave(128, 2)[:, :length, :length] > 0
    judge_fp8(got, list(requests_fp8(q, q_scale, [length], [length], caches, table)), [seen])
    dense = hpc.attention_with_kvcache_blocksparse_prefill_fp8(*arguments)
    assert torch.equal(dense, hpc.attention_with_kvcache_prefill_fp8(*arguments)) and not torch.equal(dense, got)


# ---- rope_norm_store_kv


def rotated(x, cos_sin, positions):
    cos, sin = cos_sin[positions].to(x.dtype)[:, None].chunk(2, -1)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def normalised(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight.to(x.dtype)


@pytest.fixture(params=["prefill", "longer prefill", "decode", "padded decode"])
def packed(request):
    """q_lens packed tokens of each request, the last of its totals; longer: rows of no request; padded: requests of none."""
    is_prefill = "prefill" in request.param
    q_lens, totals = ([5, 1, 20], [5, 9, 23]) if is_prefill else ([2, 2, 2], [11, 2, 17])
    Hq, Hkv, dim, page_size = 6, 2, 32, 8
    generator = torch.Generator().manual_seed(len(request.param))
    padding, longer = 4 * (request.param == "padded decode"), 3 * (request.param == "longer prefill")
    rows = sum(q_lens)
    qkv = torch.randn(rows + padding + longer, (Hq + 2 * Hkv) * dim, generator=generator).bfloat16()
    table = torch.randperm(16, generator=generator)[: 3 * 3].view(3, 3).int()
    index = torch.tensor([0, *torch.tensor(q_lens).cumsum(0).tolist()] + [rows + padding] * (padding > 0), dtype=torch.int32)
    seqlens = torch.tensor(totals + [0] * (padding > 0), dtype=torch.int32)
    tables = torch.cat((table, torch.zeros(int(padding > 0), 3, dtype=torch.int32)))
    angles = torch.outer(torch.arange(32.0), 0.7 ** torch.arange(16.0))
    positions = torch.cat([torch.arange(total - n, total) for n, total in zip(q_lens, totals, strict=True)])
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(q_lens))
    return {
        "arguments": (qkv, torch.cat((angles.cos(), angles.sin()), -1), seqlens, index, tables, is_prefill),
        "weights": {
            "q_norm_weight": torch.rand(dim, generator=generator),
            "k_norm_weight": torch.rand(dim, generator=generator),
        },
        "caches": [torch.full((16, Hkv, page_size, dim), 7.0, dtype=torch.bfloat16).transpose(1, 2) for _ in range(2)],
        "positions": positions,
        "owner": owner,
        "at": (table[owner, positions // page_size].long(), positions % page_size),
        "rows": rows,
        "split": [Hq, Hkv, Hkv],
        "q_lens": q_lens,
    }


def expected_rows(packed, policy, dtype=torch.float64):
    """q, k and v of the real rows, every step in one dtype."""
    qkv, cos_sin = packed["arguments"][:2]
    widths = [32 * heads for heads in packed["split"]]
    q, k, v = (x.unflatten(1, (-1, 32)).to(dtype) for x in qkv[: packed["rows"]].split(widths, 1))
    both = []
    for x, weight in ((q, packed["weights"]["q_norm_weight"]), (k, packed["weights"]["k_norm_weight"])):
        x = normalised(x, weight) if policy == 2 else x
        x = rotated(x, cos_sin, packed["positions"])
        both.append(normalised(x, weight) if policy == 1 else x)
    return *both, v


@pytest.mark.parametrize("policy", [0, 1, 2])
def test_rope_norm_store_kv(packed, policy):
    caches = packed["caches"]
    weights = packed["weights"] if policy else {}
    got = hpc.rope_norm_store_kv(*caches, *packed["arguments"], qk_norm_policy=policy, **weights)
    exact, plain = expected_rows(packed, policy), expected_rows(packed, policy, torch.bfloat16)
    results = (got[: packed["rows"]], *(cache[packed["at"]] for cache in caches))
    for name, result, *wanted in zip("qkv", results, exact, plain, strict=True):
        judge(name, result, *wanted)
    for cache in caches:
        assert int((cache != 7).any(-1).any(-1).sum()) == packed["rows"], "a slot that is not of the batch was written"
    out_q, out_k, out_v = torch.empty_like(got), *(got.new_empty(got.shape[0], 2, 32) for _ in range(2))
    untouched = [cache.clone() for cache in caches]
    outs = {"out_q": out_q, "out_k": out_k, "out_v": out_v}
    assert hpc.rope_norm_store_kv(*caches, *packed["arguments"], qk_norm_policy=policy, **weights, **outs) is out_q
    assert torch.equal(out_q, got) and all(map(torch.equal, caches, untouched))
    judge("out_k", out_k[: packed["rows"]], exact[1], plain[1])
    assert torch.equal(out_v[: packed["rows"]].double(), exact[2])
    with pytest.raises(NotSupported, match="one of out_k and out_v without the other"):
        hpc.rope_norm_store_kv(*caches, *packed["arguments"], out_k=out_k)


@pytest.mark.parametrize("policy", [0, 1, 2])
def test_rope_norm_store_kv_with_narrower_values(packed, policy):
    qkv, *others = packed["arguments"]
    Hq, Hkv, _ = packed["split"]
    narrow = qkv[:, 32 * (Hq + Hkv) :].unflatten(1, (Hkv, 32))[:, :, :16].flatten(1)
    qkv = torch.cat((qkv[:, : 32 * (Hq + Hkv)], narrow), 1)
    k_cache, v_cache = packed["caches"][0], packed["caches"][1][..., :16].clone()
    weights = packed["weights"] if policy else {}
    got = hpc.rope_norm_store_kv(k_cache, v_cache, qkv, *others, qk_norm_policy=policy, **weights)
    exact, plain = expected_rows(packed, policy), expected_rows(packed, policy, torch.bfloat16)
    judge("q", got[: packed["rows"]], exact[0], plain[0])
    judge("k", k_cache[packed["at"]], exact[1], plain[1])
    assert torch.equal(v_cache[packed["at"]].double(), exact[2][..., :16])
    caches, scale = (k_cache.to(FP8), v_cache.to(FP8)), torch.tensor([0.05])
    arguments = (qkv, *others, scale, scale, 1, max(packed["q_lens"]))
    stored, _, _ = hpc.rope_norm_store_kv_fp8(*caches, *arguments, qk_norm_policy=policy, **weights)
    assert float(stored[: packed["rows"]].float().abs().amax(-1).min()) == 448.0
    # Half a step of e4m3, and what rounding to bfloat16 before it may have moved.
    allowed = exact[1].abs() * 2**-4 + 0.05 * 2**-10 + 2 * (plain[1].double() - exact[1]).abs().max()
    assert bool(((caches[0][packed["at"]].double() * 0.05 - exact[1]).abs() <= allowed).all())
    codes_close(caches[1][packed["at"]], exact[2][..., :16].float() / 0.05)


@pytest.mark.parametrize("quant_policy", [1, 2])
def test_rope_norm_store_kv_fp8(packed, quant_policy):
    caches = [cache.to(FP8) for cache in packed["caches"]]
    k_scale, v_scale, q_inverse = (torch.tensor([value]) for value in (0.05, 0.02, 20.0))
    is_prefill, longest = packed["arguments"][-1], max(packed["q_lens"])
    options = {"q_scale_inv": q_inverse if quant_policy == 2 else None, "qk_norm_policy": 2, **packed["weights"]}
    arguments = (*packed["arguments"], k_scale, v_scale, quant_policy, longest)
    stored, scale, flags = hpc.rope_norm_store_kv_fp8(*caches, *arguments, **options)
    q, k, v = (x.float() for x in expected_rows(packed, 2))
    rows, requests = packed["rows"], packed["arguments"][2].shape[0]
    assert stored.dtype is FP8 and torch.equal(flags, torch.zeros(requests, 2, dtype=torch.int32))
    if quant_policy == 2:
        assert scale is None
        back = stored[:rows].float() / q_inverse
    elif is_prefill:
        assert scale.shape == (requests, 6, 128)
        of_rows = torch.cat([scale[b, :, :n].T for b, n in enumerate(packed["q_lens"])])
        back = stored[:rows].float() * of_rows[..., None]
        assert all(not scale[b, :, n:].any() for b, n in enumerate(packed["q_lens"])), "a row of no request has a scale"
    else:
        assert scale.shape == (stored.shape[0], 6)
        back = stored[:rows].float() * scale[:rows, :, None]
    if scale is not None:
        assert float(stored[:rows].float().abs().amax(-1).min()) == 448.0, "the largest value of a head is stored as 448"
    # e4m3 keeps three bits of a mantissa, and below its smallest normal number, 2**-6, a fixed step.
    close = {"rtol": 2**-4 + 2e-2, "atol": 2e-2}
    torch.testing.assert_close(back, q, **close)
    for cache, values, of_cache in zip(caches, (k, v), (k_scale, v_scale), strict=True):
        torch.testing.assert_close(cache[packed["at"]].float() * of_cache, values, **close)
    with pytest.raises(NotSupported, match="upper_max=240"):
        hpc.rope_norm_store_kv_fp8(*caches, *arguments, upper_max=240.0)


# ---- norm, activation, quantisation


def codes_close(got, wanted):
    """FP8 values equal to `wanted` rounded, or one step off where float32 sums differ by an ulp."""
    assert got.dtype is FP8
    rounded = wanted.clamp(-448, 448).to(FP8)
    steps = (got.view(torch.uint8).int() - rounded.view(torch.uint8).int()).abs()
    assert int(steps.max()) <= 1 and float((steps > 0).float().mean()) < 0.01


@pytest.mark.parametrize("width", [5120, 320])
def test_fused_rmsnorm_with_scale(width):
    generator = torch.Generator().manual_seed(width)
    x, weight = torch.randn(5, width, generator=generator).bfloat16(), torch.rand(1, width, generator=generator).bfloat16()
    scale = torch.tensor([2.5, 5.0])
    norm = normalised(x.float(), weight.float())
    codes_close(hpc.fused_rmsnorm_with_scale(x, weight, eps=1e-6, scale=scale[:1]), norm / 2.5)
    codes_close(hpc.fused_rmsnorm_with_scale(x, weight, eps=1e-6), norm)
    wide, first, second = hpc.fused_rmsnorm_with_scale(x, weight, eps=1e-6, scale=scale, is_moe=True)
    torch.testing.assert_close(wide, norm)
    codes_close(first, norm / 2.5)
    codes_close(second, norm / 5.0)


def test_activations():
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(12, 512, generator=generator).bfloat16()
    scale, counts = torch.tensor([30.0, 9.0]), torch.tensor([2, 0, 3], dtype=torch.int32)
    gate, up = gate_up.float().chunk(2, -1)
    product = gate / (1 + (-gate).exp()) * up
    output = torch.empty(12, 256, dtype=FP8)
    assert hpc.act_mul_and_quant(gate_up, scale, output=output).data_ptr() == output.data_ptr()
    codes_close(output, product * 30.0)
    codes_close(hpc.masked_act_mul_and_quant(gate_up, scale, counts), product * 30.0)
    blocks = product.unflatten(-1, (2, 128))
    wanted = blocks.abs().amax(-1) / 448
    out_scale = torch.empty(12, 2)
    got, got_scale = hpc.masked_act_mul_and_blockwise_quant(gate_up, counts, output=output, output_scale=out_scale)
    assert got.data_ptr() == output.data_ptr() and got_scale.data_ptr() == out_scale.data_ptr()
    torch.testing.assert_close(got_scale, wanted)
    codes_close(got, (blocks / wanted[..., None]).flatten(1))
    values = torch.tensor([[1.0, -3.3, 1e9, 0.0]])
    stored, same = hpc.scaled_fp8_quant(values, torch.tensor(0.5))
    assert torch.equal(stored, torch.tensor([[2.0, -6.6, 448.0, 0.0]]).to(FP8)) and same == 0.5


# ---- mixtures of experts


def silu_product(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return gate / (1 + (-gate).exp()) * up


def expanded(scale, shape):
    """Scales of 128 × 128 squares, or of 128 columns of a row, for every value."""
    wide = scale.repeat_interleave(128, -1)[..., : shape[-1]]
    return wide.repeat_interleave(128, -2)[..., : shape[-2], :] if len(shape) == 3 else wide


def mixture(x, w13, w2, ids, weights, shared, stored, dtype):
    """The weighted sum over experts; `stored` is what becomes of the gated product; float32 rounds as hpc-ops' stages do."""
    out = torch.zeros(x.shape, dtype=dtype)
    half = torch.bfloat16 if dtype is torch.float32 else dtype
    for token, (chosen, shares) in enumerate(zip(ids.tolist(), weights.to(dtype), strict=True)):
        for expert, share in zip(chosen, shares, strict=True):
            if 0 <= expert < len(w13):
                inner = stored(silu_product((x[token] @ w13[expert].T).to(half).to(dtype)))
                out[token] += (inner @ w2[expert].T).to(half).to(dtype) * share
    return (out + shared.to(dtype)).to(half)


@pytest.mark.parametrize("rank_ep", [0, 1])
@pytest.mark.parametrize("scheme", ["tensor", "block"])
def test_fuse_moe(scheme, rank_ep):
    generator = torch.Generator().manual_seed(rank_ep)
    T, H, I, E = 7, 256, 128, 3

    def rand(*shape):
        return torch.rand(shape, generator=generator) * 0.02 + 0.01

    def fp8(*shape):
        return (torch.randn(shape, generator=generator) * 30).clamp(-448, 448).to(FP8)

    x, w13, w2 = fp8(T, H), fp8(E, 2 * I, H), fp8(E, H, I)
    ids = torch.stack([torch.randperm(2 * E, generator=generator)[:2] for _ in range(T)]).int()
    weights = torch.rand(T, 2, generator=generator)
    shared = torch.randn(T, H, generator=generator).bfloat16()
    local = ids - rank_ep * E
    output = torch.full((T, H), torch.nan, dtype=torch.bfloat16)
    if scheme == "tensor":
        x_scale, w13_scale, w2_scale, inner_scale = rand(1), rand(E), rand(E), torch.tensor([0.3])
        # The kernel's factors: what the products of stored values are multiplied with, and what the gated product is.
        factors = (w13_scale * x_scale, w2_scale * inner_scale, 1 / inner_scale)
        arguments = (x, w13, w2, *factors, ids, weights, rank_ep, 2 * E)
        got = hpc.fuse_moe(*arguments, shared_output=shared, output=output)
        again = hpc.fuse_moe_pertensor_fp8(*arguments, shared_output=shared)
        x_wide, w13_wide, w2_wide = (
            x.float() * x_scale,
            w13.float() * w13_scale[:, None, None],
            w2.float() * w2_scale[:, None, None],
        )

        def stored(inner):
            return (inner / inner_scale).clamp(-448, 448).to(FP8).float() * inner_scale

    else:
        x_scale, w13_scale, w2_scale = rand(T, 2), rand(E, 2, 4), rand(E, 2, 4)
        arguments = (x, x_scale, w13, w13_scale, w2, w2_scale, ids, weights, rank_ep, 2 * E)
        got = hpc.fuse_moe_blockwise(*arguments, shared_output=shared, output=output)
        again = hpc.fuse_moe_blockwise_fp8(*arguments, shared_output=shared)
        x_wide, w13_wide, w2_wide = (
            value.float() * expanded(scale, value.shape) for value, scale in ((x, x_scale), (w13, w13_scale), (w2, w2_scale))
        )

        def stored(inner):
            scale = inner.abs().max() / 448
            return (inner / scale).to(FP8).float() * scale

    assert got is output and torch.equal(got, again)
    plain = mixture(x_wide, w13_wide, w2_wide, local, weights, shared, stored, torch.float32)
    wide = (value.double() for value in (x_wide, w13_wide, w2_wide))
    exact = mixture(*wide, local, weights, shared, lambda inner: inner, torch.float64)
    judge("fuse_moe", got, exact, plain)
    assert float((got.double() - exact).abs().max()) < 0.05 * float((exact - shared).abs().max())


def test_group_gemm():
    generator = torch.Generator().manual_seed(0)
    seqlens = torch.tensor([5, 0, 33], dtype=torch.int32)
    cu = torch.tensor([0, 5, 5, 38], dtype=torch.int32)
    x = (torch.randn(38, 256, generator=generator) * 30).to(FP8)
    w = (torch.randn(3, 128, 256, generator=generator) * 30).to(FP8)
    groups = torch.repeat_interleave(torch.arange(3), seqlens)
    y_scale = torch.rand(3, generator=generator)
    output = torch.full((38, 128), torch.nan, dtype=torch.bfloat16)
    got = hpc.group_gemm_pertensor_fp8(x, w, seqlens, cu, y_scale, output=output)
    assert got is output and torch.equal(got, hpc.group_gemm_fp8(x, w, seqlens, cu, y_scale))
    exact = torch.einsum("tk,tnk->tn", x.double(), w.double()[groups]) * y_scale.double()[groups][:, None]
    judge("group_gemm_pertensor_fp8", got, exact, exact.bfloat16())

    x_scale, w_scale = torch.rand(38, 2, generator=generator), torch.rand(3, 1, 4, generator=generator)
    for average, tile in ((13, 16), (20, 32), (100, 64)):
        padded = (seqlens + tile - 1) // tile * tile
        layout = torch.full((2, int(padded.sum()) + 3), torch.nan)
        starts = padded.cumsum(0) - padded
        for begin, start, count in zip(cu.tolist(), starts.tolist(), seqlens.tolist(), strict=False):
            layout[:, start : start + count] = x_scale[begin : begin + count].T
        got = hpc.group_gemm_blockwise_fp8(x, w, seqlens, cu, layout, w_scale, num_seq_per_group_avg=average)
        wide_x, wide_w = x.double() * expanded(x_scale, x.shape), w.double() * expanded(w_scale, w.shape)
        exact = torch.einsum("tk,tnk->tn", wide_x, wide_w[groups])
        judge("group_gemm_blockwise_fp8", got, exact, exact.bfloat16())


def test_gemm_bf16xfp32():
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(7, 96, generator=generator).bfloat16(), torch.randn(40, 96, generator=generator)
    w_high = w.bfloat16()
    w_low = ((w - w_high.float()) * 256).bfloat16()
    exact = x.double() @ (w_high.double() + w_low.double() / 256).T
    plain = x.float() @ w.T
    split_flag = hpc.get_gemm_bf16xfp32_workspace(40)
    got = hpc.gemm_bf16xfp32(x, w_high, w_low, 1 / 256, use_fp32_output=True, split_flag=split_flag)
    judge("gemm_bf16xfp32", got, exact, plain)
    assert not split_flag.any()
    # Far nearer to the product with float32 weights than one of bfloat16 weights would be.
    assert float((got - x.double() @ w.double().T).abs().max()) < 0.02 * float(
        (exact - x.double() @ w_high.double().T).abs().max()
    )
    judge("gemm_bf16xfp32", hpc.gemm_bf16xfp32(x, w_high, w_low, torch.tensor(1 / 256)), exact, plain.bfloat16())
    with pytest.raises(NotSupported, match=r"scale=0\.5"):
        hpc.gemm_bf16xfp32(x, w_high, w_low, 0.5)


def test_reformat_x_scale():
    seqlens, capacity = torch.tensor([3, 0, 20, 16], dtype=torch.int32), 32
    cu = torch.arange(5, dtype=torch.int32) * capacity
    scales = torch.rand(4 * capacity, 2, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(2, 4 * capacity)
    for start, begin, count in ((0, 0, 3), (16, 2 * capacity, 20), (48, 3 * capacity, 16)):
        expected[:, start : start + count] = scales[begin : begin + count].T
    assert torch.equal(hpc.reformat_x_scale(scales, seqlens, cu, 10), expected)
    output = torch.full((2, 4 * capacity), 9.0)
    assert hpc.reformat_x_scale(scales, seqlens, cu, 10, output) is output
    assert torch.equal(output, torch.where(expected > 0, expected, 9.0))


# ---- sampling


DRAWS = 4000


def frequencies(logits, **options):
    """How often each id comes out of rows of one distribution."""
    ids = hpc.fused_sampler(logits.expand(DRAWS, -1).contiguous(), seed=7, **options)
    assert ids.shape == (DRAWS, 1) and ids.dtype == torch.int32
    return torch.bincount(ids[:, 0].long(), minlength=logits.shape[-1]) / DRAWS


def test_fused_sampler():
    after = hpc.SoftmaxPolicy.AFTER_TOPK
    logits = torch.linspace(3.0, -1.0, 80)[torch.randperm(80, generator=torch.Generator().manual_seed(0))]
    order = logits.argsort(descending=True)

    def wanted(scores, count, mass=1.0):
        kept = scores[order[:count]].softmax(-1)
        kept = torch.where(kept.cumsum(-1) - kept < mass, kept, 0.0)
        return torch.zeros(80).index_put((order[:count],), kept / kept.sum())

    cases = [
        ({}, wanted(logits, 32)),
        ({"max_topk": 64, "topk": 70}, wanted(logits, 64)),
        ({"topk": 5}, wanted(logits, 5)),
        ({"topk": 5, "temperature": 0.5}, wanted(logits / 0.5, 5)),
        ({"topk": 20, "topp": 0.4, "softmax_policy": after}, wanted(logits, 20, 0.4)),
        ({"topp": torch.full((DRAWS,), 0.4), "softmax_policy": after}, wanted(logits, 32, 0.4)),
        ({"temperature": 2.0}, wanted(logits / 2.0, 80)),
        ({"topk": torch.full((DRAWS,), 7), "temperature": torch.full((DRAWS,), 2.0)}, wanted(logits / 2.0, 7)),
    ]
    for options, probabilities in cases:
        got = frequencies(logits[None], **options)
        assert torch.equal(got > 0, (probabilities > 0) & (got > 0)), f"{options}: an id that was cut off"
        # Five standard deviations of a share of 4,000 draws, at most 0.04.
        assert float((got - probabilities).abs().max()) < 5 * 0.5 / DRAWS**0.5, options
    assert torch.equal(frequencies(logits[None], topk=1), torch.nn.functional.one_hot(order[0], 80).float())


def test_fused_sampler_refuses():
    logits = torch.zeros(2, 40)
    mask, slots = torch.zeros(2, 5, dtype=torch.uint8), torch.arange(2, dtype=torch.int32)
    refused = [
        {"penalty_mask": mask, "slot_id": slots, "repetition_penalty": 1.1},
        {"gumbel_noise": torch.zeros(2, 40)},
        {"draft_token_ids": torch.zeros(2, dtype=torch.long), "temperature": 1.0},
        {"softmax_policy": hpc.SoftmaxPolicy.BEFORE_TOPK},
    ]
    for options in refused:
        with pytest.raises(NotSupported, match=f"fused_sampler: no operator for {next(iter(options))}"):
            hpc.fused_sampler(logits, seed=1, **options)
    with pytest.raises(ValueError, match="seed above 0"):
        hpc.fused_sampler(logits)
    with pytest.raises(ValueError, match="topp needs"):
        hpc.fused_sampler(logits, topp=0.5, seed=1)


# ---- the switch


@pytest.fixture
def bare(monkeypatch):
    """No module `hpc`, whatever the tests before did."""
    for name in ("hpc", *(f"hpc.{module}" for module in hpc.MODULES)):
        # Known to monkeypatch, so that it is taken away again afterwards.
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]
    monkeypatch.delenv("PENSTOCK_HPC", raising=False)
    return monkeypatch


def test_the_switch(bare):
    hpc.install()
    assert importlib.util.find_spec("hpc") is None
    bare.setenv("PENSTOCK_HPC", "0")
    hpc.install()
    assert importlib.util.find_spec("hpc") is None
    bare.setenv("PENSTOCK_HPC", "yes")
    with pytest.raises(ValueError, match="PENSTOCK_HPC must be '0' or '1', got 'yes'"):
        hpc.install()
    bare.setenv("PENSTOCK_HPC", "1")
    hpc.install()
    hpc.install()
    assert importlib.util.find_spec("hpc") is not None and importlib.import_module("hpc") is hpc
    assert importlib.import_module("hpc.attention").attention_decode_bf16 is hpc.attention_decode_bf16


def test_hpc_ops_is_never_shadowed(bare, tmp_path):
    (tmp_path / "hpc.py").write_text("name = 'the real one'")
    bare.syspath_prepend(tmp_path)
    bare.setenv("PENSTOCK_HPC", "1")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="there is a module `hpc` already"):
            hpc.install()
        assert importlib.import_module("hpc").name == "the real one"


def test_the_plug_ins_are_entry_points():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for group in ("vllm.general_plugins", "sglang.srt.plugins"):
        for target in project["entry-points"][group].values():
            module, _, name = target.partition(":")
            assert callable(getattr(importlib.import_module(module), name))
        assert project["entry-points"][group]["penstock_hpc"] == "penstock.integrations.hpc_ops:install"
