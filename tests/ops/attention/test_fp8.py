"""FP8 attention: what its scales mean, and which it refuses."""

import pytest
import torch

from penstock.core.check import ContractError
from penstock.ops import attention_decode, attention_prefill_paged

FP8 = torch.float8_e4m3fn


def _call(Hq=4, Hkv=2, D=64, length=70, seed=0):
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(length, heads, D, generator=draw) for heads in (Hq, Hkv, Hkv))
    pages = -(-length // 32)
    caches = [torch.zeros(pages * 32, Hkv, D) for _ in range(2)]
    for cache, x in zip(caches, (k, v), strict=True):
        cache[:length] = x
    k_cache, v_cache = (cache.view(pages, 32, Hkv, D).to(FP8) for cache in caches)
    return {
        "q": q.to(FP8),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "page_table": torch.arange(pages, dtype=torch.int32)[None],
        "cu_seqlens_q": torch.tensor([0, length], dtype=torch.int32),
        "seqlens_k": torch.tensor([length], dtype=torch.int32),
        "max_seqlen_q": length,
    }


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_a_scale_multiplies_the_stored_value(impl):
    call = _call()
    plain = attention_prefill_paged(**call, impl=impl)
    assert plain.dtype is torch.bfloat16
    scaled = attention_prefill_paged(
        **call,
        q_scale=torch.tensor([4.0]),
        k_scale=torch.tensor([0.5, 0.5]),
        v_scale=torch.tensor([2.0]),
        scale=0.0625,
        impl=impl,
    )
    # 4 · 0.5 · 0.0625 is the default scale of D = 64; all are powers of two.
    assert torch.equal(scaled, 2 * plain)


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_scales_of_tokens_equal_to_a_static_one_give_the_same(impl):
    call = _call()
    static = attention_prefill_paged(**call, q_scale=torch.tensor([2.0]), k_scale=torch.tensor([0.25]), impl=impl)
    q_scale = torch.full((70, 4), 2.0)
    k_scale = torch.full((3, 32, 2), 0.25)
    assert torch.equal(attention_prefill_paged(**call, q_scale=q_scale, k_scale=k_scale, impl=impl), static)


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_values_transposed_inside_a_page_give_the_same_bits(impl):
    call = _call()
    row_major = attention_prefill_paged(**call, impl=impl)
    transposed = call["v_cache"].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert transposed.stride(1) == 1
    assert torch.equal(attention_prefill_paged(**{**call, "v_cache": transposed}, impl=impl), row_major)


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_decode_is_the_last_row_of_prefill(impl):
    call = _call()
    whole, lse = attention_prefill_paged(**call, return_lse=True, impl=impl)
    shared = {name: call[name] for name in ("k_cache", "v_cache", "page_table", "seqlens_k")}
    last, last_lse = attention_decode(call["q"][-1:], **shared, return_lse=True, impl=impl)
    # Blocks of keys of another size round the weights against another running maximum.
    assert (last.float() - whole[-1:].float()).abs().max() <= 2**-4 * whole[-1:].float().abs().max()
    assert torch.allclose(last_lse, lse[-1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"q_scale": torch.ones(3)}, r"`q_scale` must be float32 \[1\] or \[4\] or \[70, 4\] on cpu, got float32\[3\]"),
        ({"k_scale": torch.ones(3, 32, 1)}, r"`k_scale` must be float32 \[1\] or \[2\] or \[3, 32, 2\] on cpu"),
        ({"v_scale": torch.ones(2, dtype=torch.bfloat16)}, r"`v_scale` must be float32 \[1\] or \[2\] on cpu, got bfloat16"),
        ({"v_scale": 2.0}, r"`v_scale` must be float32 \[1\] or \[2\] on cpu, got 2.0"),
    ],
)
def test_wrong_scales_are_refused(changed, fault):
    with pytest.raises(ContractError, match=fault):
        attention_prefill_paged(**_call(), **changed)


def test_scales_belong_to_fp8_alone():
    call = _call()
    wide = {name: call[name].to(torch.bfloat16) for name in ("q", "k_cache", "v_cache")}
    with pytest.raises(ContractError, match="`k_scale` must be None for bfloat16 values"):
        attention_prefill_paged(**{**call, **wide}, k_scale=torch.ones(1))
    transposed = wide["v_cache"].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    with pytest.raises(ContractError, match="`v_cache` must have stride 1 in its last dimension, got 32"):
        attention_prefill_paged(**{**call, **wide, "v_cache": transposed})
    with pytest.raises(ContractError, match="k_cache"):
        attention_prefill_paged(**{**call, "k_cache": wide["k_cache"]})
