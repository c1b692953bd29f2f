"""The SGLang plug-in: what it computes, always; and what it calls and overrides, read in SGLang's sources where they are."""

import ast
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from penstock.integrations import sglang as ours
from penstock.testing.budget import judge


def test_inert_unless_asked(monkeypatch):
    monkeypatch.setitem(sys.modules, "sglang", None)
    for value in (None, "0"):
        monkeypatch.delenv("PENSTOCK_SGLANG", raising=False) if value is None else monkeypatch.setenv("PENSTOCK_SGLANG", value)
        ours.register()
    monkeypatch.setenv("PENSTOCK_SGLANG", "1")
    with pytest.raises(ImportError):
        ours.register()


# ---- attention


def attention(q, k, v, dtype, left, softcap, sinks):
    """Causal, bottom-right aligned, every step in one dtype; q [n, Hq, D], k and v [m, Hkv, D]."""
    n, m, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    k, v = (x.to(dtype).repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    scores = q.to(dtype).transpose(0, 1) @ k.transpose(1, 2) * 0.2
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    behind = torch.arange(n)[:, None] + m - n - torch.arange(m)
    scores = scores.masked_fill((behind < 0) | (behind > (m if left is None else left)), -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(dtype)[:, None, None].expand(-1, n, 1)), -1)
    return (scores.softmax(-1)[..., :m] @ v).transpose(0, 1)


OPTIONS = {
    "plain": {},
    "window": {"window": 5},
    "softcap and sinks": {"softcap": 2.0, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("news", [None, (7, 1, 20)])
def test_attention_over_token_pools(news, page_size, options):
    generator = torch.Generator().manual_seed(page_size)
    Hq, Hkv, D, lengths, slots, context = 4, 2, 16, (9, 40, 20), 160, 64
    k_pool, v_pool = torch.full((2, slots, Hkv, D), torch.nan, dtype=torch.bfloat16)
    req_to_token = torch.full((5, context), 10**6, dtype=torch.int32)
    requests, free = torch.tensor([4, 0, 2]), torch.randperm(slots // page_size, generator=generator).tolist()
    contents = []
    for request, length in zip(requests, lengths, strict=True):
        pages = torch.tensor([free.pop() for _ in range(-(-length // page_size))])
        at = (pages[:, None] * page_size + torch.arange(page_size)).flatten()[:length]
        req_to_token[request, :length] = at.int()
        k, v = torch.randn(2, length, Hkv, D, generator=generator).bfloat16()
        k_pool[at], v_pool[at] = k, v
        contents.append((k, v))
    counts = news or (1, 1, 1)
    q = torch.randn(sum(counts), Hq, D, generator=generator).bfloat16()
    step = ours.Step(
        ours.pages_of(req_to_token, requests, page_size, -(-max(lengths) // page_size)),
        torch.tensor(lengths, dtype=torch.int32),
    )
    if news:
        step.cu_seqlens_q, step.longest = torch.tensor([0, *torch.tensor(news).cumsum(0)]).int(), max(news)
    chosen = {"window": None, "softcap": None, "sinks": None, **OPTIONS[options]}
    got = ours.attend(q, k_pool, v_pool, step, page_size, scale=0.2, **chosen)
    rows = list(zip(q.split(counts), contents, strict=True))
    exact, plain = (
        torch.cat([attention(part, k, v, dtype, *chosen.values()) for part, (k, v) in rows])
        for dtype in (torch.float64, torch.bfloat16)
    )
    judge("attention", got, exact, plain)


# ---- mixtures of experts


class TritonMoeQuantInfo(SimpleNamespace):
    """The fields of SGLang's dataclass of this name that are read; test_fields compares them with the sources."""

    def __init__(self, **changes):
        flags = dict.fromkeys(("use_mxfp8", "use_fp8_w8a8", "use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16"), False)
        fields = {"w13_weight": None, "w2_weight": None, "b13": None, "b2": None, "fuse_swiglu_interleaved": False}
        super().__init__(**{**flags, **fields, **changes})


def config(**changes):
    fields = {"activation": "silu", "is_gated": True, "apply_router_weight_on_input": False, "no_combine": False}
    none = dict.fromkeys(("gemm1_alpha", "gemm1_clamp_limit", "swiglu_limit", "routed_scaling_factor"))
    return SimpleNamespace(**{**fields, **none, **changes})


@pytest.mark.parametrize("factor", [None, 2.5])
def test_mixture(factor):
    generator = torch.Generator().manual_seed(0)
    T, H, I, E = 5, 32, 16, 3
    x, w13, w2 = (torch.randn(shape, generator=generator).bfloat16() * 0.3 for shape in ((T, H), (E, 2 * I, H), (E, H, I)))
    ids = torch.tensor([[0, 2], [1, -1], [-1, -1], [2, 1], [0, 1]])
    weights = torch.rand(T, 2, generator=generator)

    def plain(dtype):
        out = torch.zeros(T, H, dtype=dtype)
        for token in range(T):
            for expert, weight in zip(ids[token].tolist(), weights[token].to(dtype), strict=True):
                if expert >= 0:
                    gate, up = (x[token].to(dtype) @ w13[expert].to(dtype).T).chunk(2)
                    out[token] += (gate / (1 + (-gate).exp()) * up) @ w2[expert].to(dtype).T * weight
        return out * (factor or 1.0)

    info = TritonMoeQuantInfo(w13_weight=w13, w2_weight=w2)
    got = ours.mixture(x, ids, weights, info, config(routed_scaling_factor=factor))
    judge("mixture", got, plain(torch.float64), plain(torch.bfloat16))


def test_what_a_mixture_cannot_be():
    assert ours.mixture_faults(TritonMoeQuantInfo(), config(), False) == []
    assert ours.mixture_faults(SimpleNamespace(), config(), False) == ["a SimpleNamespace"]
    cases = [
        ({"use_fp8_w8a8": True}, {}, "quantised weights"),
        ({"b2": 1}, {}, "biases"),
        ({"fuse_swiglu_interleaved": True}, {}, "interleaved gates"),
        ({}, {"activation": "gelu"}, "the activation gelu"),
        ({}, {"is_gated": False}, "the activation silu"),
        ({}, {"apply_router_weight_on_input": True}, "weights on the input"),
        ({}, {"no_combine": True}, "results that are not summed"),
        ({}, {"swiglu_limit": 7.0}, "a scaled or clamped activation"),
    ]
    for info, changes, fault in cases:
        (found,) = ours.mixture_faults(TritonMoeQuantInfo(**info), config(**changes), False)
        assert found.startswith(fault)
    assert ours.mixture_faults(TritonMoeQuantInfo(), config(), True) == ["LoRA"]


# ---- against the sources of SGLang

FOUND = importlib.util.find_spec("sglang")
needs_sources = pytest.mark.skipif(
    FOUND is None,
    reason="the sources of SGLang are not there; unpack its wheel (pip download --no-deps sglang==0.5.23) on the Python path",
)


def parsed(path):
    return ast.parse((Path(FOUND.origin).parent / path).read_text())


def named(tree, name):
    """The class or function of this dotted name."""
    for part in name.split("."):
        kinds = (ast.ClassDef, ast.FunctionDef)
        tree = next(node for node in ast.walk(tree) if isinstance(node, kinds) and node.name == part)
    return tree


def parameters(path, name):
    arguments = named(parsed(path), name).args
    return [argument.arg for argument in [*arguments.posonlyargs, *arguments.args]]


BASE = "srt/layers/attention/base_attn_backend.py"
SIGNATURES = [
    ("srt/layers/attention/attention_registry.py", "register_attention_backend", "name"),
    ("srt/layers/moe/utils.py", "register_moe_runner_backend_name", "name"),
    ("srt/layers/moe/utils.py", "get_moe_runner_backend", ""),
    ("srt/plugins/hook_registry.py", "HookRegistry.register", "cls target hook hook_type"),
    ("srt/layers/moe/moe_runner/runner.py", "MoeRunner.run", "self dispatch_output quant_info lora_info"),
    (BASE, "AttentionBackend.init_forward_metadata", "self forward_batch"),
    (BASE, "AttentionBackend.init_forward_metadata_out_graph", "self forward_batch in_capture"),
    (BASE, "AttentionBackend.init_forward_metadata_in_graph", "self forward_batch"),
    (BASE, "AttentionBackend.init_cuda_graph_state", "self max_bs max_num_tokens"),
    (BASE, "AttentionBackend.get_cuda_graph_seq_len_fill_value", "self"),
    (BASE, "AttentionBackend.forward_decode", "self q k v layer forward_batch save_kv_cache"),
    (BASE, "AttentionBackend.forward_extend", "self q k v layer forward_batch save_kv_cache"),
    ("srt/mem_cache/memory_pool.py", "MHATokenToKVPool.set_kv_buffer", "self layer loc_info cache_k cache_v"),
    ("srt/mem_cache/memory_pool.py", "MHATokenToKVPool.get_kv_buffer", "self layer_id"),
]


@needs_sources
@pytest.mark.parametrize(("path", "name", "wanted"), SIGNATURES, ids=[name for _, name, _ in SIGNATURES])
def test_signatures(path, name, wanted):
    wanted = wanted.split()
    found = parameters(path, name)
    assert found[: len(wanted)] == wanted
    own = Path(ours.__file__).with_name("sglang_attention.py")
    if path == BASE:
        overridden = named(ast.parse(own.read_text()), "Backend." + name.split(".")[1]).args.args
        assert [argument.arg for argument in overridden] == found


FIELDS = [
    ("srt/layers/moe/moe_runner/triton.py", "TritonMoeQuantInfo", " ".join(vars(TritonMoeQuantInfo()))),
    ("srt/layers/moe/moe_runner/base.py", "MoeRunnerConfig", " ".join(vars(config()))),
    ("srt/layers/moe/token_dispatcher/standard.py", "StandardDispatchOutput", "hidden_states topk_output"),
    ("srt/layers/moe/token_dispatcher/standard.py", "StandardCombineInput", "hidden_states"),
    ("srt/mem_cache/memory_pool.py", "KVWriteLoc", "loc"),
    (
        "srt/model_executor/forward_batch_info.py",
        "ForwardBatch",
        "forward_mode batch_size req_pool_indices seq_lens out_cache_loc seq_lens_cpu extend_seq_lens extend_seq_lens_cpu",
    ),
]


@needs_sources
@pytest.mark.parametrize(("path", "name", "wanted"), FIELDS, ids=[name for _, name, _ in FIELDS])
def test_fields(path, name, wanted):
    fields = {node.target.id for node in named(parsed(path), name).body if isinstance(node, ast.AnnAssign)}
    assert set(wanted.split()) <= fields


@needs_sources
def test_attributes_and_names():
    def assigned(path, name):
        nodes = ast.walk(named(parsed(path), name))
        return {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}

    layer = "tp_q_head_num qk_head_dim scaling layer_id logit_cap sliding_window_size is_cross_attention attn_type"
    assert {*layer.split(), "xai_temperature_len"} <= assigned("srt/layers/radix_attention.py", "RadixAttention")
    runner = "page_size device use_mla_backend spec_algorithm kv_cache_dtype dtype model_config"
    assert set(runner.split()) <= assigned("srt/model_executor/model_runner.py", "ModelRunner")
    assert "lora_enabled" in assigned("srt/layers/moe/moe_runner/runner.py", "MoeRunner")
    imported = {
        alias.name
        for node in ast.walk(parsed("srt/server_args.py"))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {"add_attention_backend_choices", "add_moe_runner_backend_choices"} <= imported
    assert "AROUND" in {node.targets[0].id for node in named(parsed("srt/plugins/hook_registry.py"), "HookType").body[1:]}
    named(parsed("srt/mem_cache/swa_memory_pool.py"), "SWAKVPool")
    module, _, method = ours.MIXTURE.removeprefix("sglang.").rpartition(".MoeRunner.")
    named(parsed(module.replace(".", "/") + ".py"), f"MoeRunner.{method}")
