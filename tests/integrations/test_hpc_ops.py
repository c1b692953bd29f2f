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
    "attention_with_kvcache_prefill_fp8": "",
    "attention_with_kvcache_blocksparse_prefill_fp8": "",
    "attention_decode_bf16": (
        "q kcache vcache block_ids num_seq_kvcache mtp new_kv_included splitk task_map split_flag output"
    ),
    "attention_decode_fp8": "",
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
    "fuse_moe": "",
    "fuse_moe_pertensor_fp8": "",
    "fuse_moe_blockwise_fp8": "",
    "fuse_moe_blockwise": "",
    "reformat_x_scale": "",
    "group_gemm_pertensor_fp8": "",
    "group_gemm_fp8": "",
    "group_gemm_blockwise_fp8": "",
    "get_gemm_bf16xfp32_workspace": "",
    "gemm_bf16xfp32": "",
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
    ours = {name for name, value in vars(hpc).items() if inspect.isfunction(value) and value.__module__ == hpc.__name__}
    assert {name for name in ours if not name.startswith("_")} == (set(PUBLIC) - set(hpc.NOT_COVERED)) | {"install"}
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


# ---- rope_norm_store_kv


def rotated(x, cos_sin, positions):
    cos, sin = cos_sin[positions].to(x.dtype)[:, None].chunk(2, -1)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def normalised(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight.to(x.dtype)


@pytest.fixture(params=["prefill", "decode", "padded decode"])
def packed(request):
    """A packed batch: q_lens tokens of each request, the last of totals; in the padded one, rows and requests of nothing."""
    q_lens, totals = ([5, 1, 20], [5, 9, 23]) if request.param == "prefill" else ([2, 2, 2], [11, 2, 17])
    Hq, Hkv, dim, page_size = 6, 2, 32, 8
    generator = torch.Generator().manual_seed(len(request.param))
    padding = 4 if request.param == "padded decode" else 0
    rows = sum(q_lens)
    qkv = torch.randn(rows + padding, (Hq + 2 * Hkv) * dim, generator=generator).bfloat16()
    table = torch.randperm(16, generator=generator)[: 3 * 3].view(3, 3).int()
    index = torch.tensor([0, *torch.tensor(q_lens).cumsum(0).tolist()] + [rows + padding] * (padding > 0), dtype=torch.int32)
    seqlens = torch.tensor(totals + [0] * (padding > 0), dtype=torch.int32)
    tables = torch.cat((table, torch.zeros(int(padding > 0), 3, dtype=torch.int32)))
    angles = torch.outer(torch.arange(32.0), 0.7 ** torch.arange(16.0))
    positions = torch.cat([torch.arange(total - n, total) for n, total in zip(q_lens, totals, strict=True)])
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(q_lens))
    return {
        "arguments": (qkv, torch.cat((angles.cos(), angles.sin()), -1), seqlens, index, tables, request.param == "prefill"),
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
