"""enable() and disable() on small random models of every family: the tokens of the host, every layer called, refusals."""

import copy

import pytest
import torch
from torch import nn

from penstock.core.op import NotSupported
from penstock.integrations import transformers as integration
from penstock.integrations.transformers import ATTENTION, attend, disable, enable, packed_lengths
from penstock.testing.budget import judge
from tests.serve.models.conftest import _GEMMA, _SMALL
from tests.serve.models.conftest import build as build_known

transformers = pytest.importorskip("transformers")

NEW_TOKENS = 8
FAMILIES = ("llama", "llama-bias", "llama-yarn", "mistral", "qwen2-window", "qwen3", "qwen3-moe", "gemma", "gemma2", "gemma3")
OTHERS = {
    "gemma": ("Gemma", {**_GEMMA, "num_key_value_heads": 1}),
    "qwen3-moe": (
        "Qwen3Moe",
        {"head_dim": 32, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "mlp_only_layers": [1]},
    ),
}
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def build(case, **changes):
    """The float32 model of a case, as transformers runs it by its plain definition."""
    if case in OTHERS:
        family, fields = OTHERS[case]
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**{**_SMALL, **fields, **changes})
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
    else:
        model = build_known(case, **changes)
    model.set_attn_implementation("eager")
    if case == "qwen3-moe":
        model.set_experts_implementation("eager")
    return model


@pytest.fixture(scope="module")
def models():
    """models(case) → one model for all tests that leave it as they found it."""
    known = {}

    def get(case):
        if case not in known:
            known[case] = build(case)
        return known[case]

    return get


@pytest.fixture
def counted(monkeypatch):
    """How often each of our operators was called."""
    counts = dict.fromkeys(("attention_prefill", "rms_norm", "rope", "gate", "fused_moe"), 0)

    def counting(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    for name in ("attention_prefill", "rms_norm", "rope", "fused_moe"):
        monkeypatch.setattr(integration, name, counting(name, getattr(integration, name)))
    for activation, gate in list(integration.GATES.items()):
        monkeypatch.setitem(integration.GATES, activation, counting("gate", gate))
    return counts


@pytest.fixture
def llama(models):
    model = models("llama")
    enable(model)
    yield model
    disable(model)


def prompts():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 199, (3, 11), generator=generator)
    padded = torch.ones_like(ids)
    padded[0, :5] = 0
    padded[2, :2] = 0
    return ids, padded


def generated(model):
    """Greedy tokens with and without padding, with caches that grow and caches of a fixed size."""
    ids, padded = prompts()
    static = {"cache_implementation": "static", "disable_compile": True}
    return {
        "dynamic": model.generate(ids, **GREEDY),
        "dynamic, padded": model.generate(ids, attention_mask=padded, **GREEDY),
        "static": model.generate(ids, **static, **GREEDY),
        "static, padded": model.generate(ids, attention_mask=padded, **static, **GREEDY),
    }


def snapshot(model):
    """Everything that an instance of the model holds by itself, but for the tensors' contents."""
    held = {name: {key: id(value) for key, value in vars(module).items()} for name, module in model.named_modules()}
    return held, dict(vars(model.config))


@pytest.mark.parametrize("case", FAMILIES)
def test_greedy_tokens_are_those_of_the_host(case, models, counted):
    model = models(case)
    expected = generated(model)
    before = snapshot(model)
    report = enable(model)
    try:
        got = generated(model)
    finally:
        disable(model)
    for name, tokens in expected.items():
        assert torch.equal(got[name], tokens), f"{case}, {name}"
    assert snapshot(model) == before
    # A forward pass for the prompt and one for each further token, four times.
    passes = 4 * NEW_TOKENS
    layers = model.config.num_hidden_layers
    replaced = {name: n for (name, _), n in report.replaced.items()}
    norms = next(n for name, n in replaced.items() if name.endswith("RMSNorm"))
    mlps = next(n for name, n in replaced.items() if name.endswith("MLP"))
    assert norms == sum(type(module).__name__.endswith("RMSNorm") for module in model.modules())
    assert mlps == (1 if case == "qwen3-moe" else layers)
    wanted = {"attention_prefill": layers, "rope": layers, "rms_norm": norms, "gate": mlps, "fused_moe": layers - mlps}
    assert counted == {name: passes * n for name, n in wanted.items()}


@pytest.mark.parametrize("case", ["llama", "mistral", "gemma3", "qwen3-moe"])
def test_generate_batch_gives_the_tokens_of_generate(case, models, counted):
    model = models(case)
    lengths = (17, 3, 26)
    inputs = [torch.randint(3, 199, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
    expected = [model.generate(torch.tensor([ids]), **GREEDY)[0, len(ids) :].tolist() for ids in inputs]
    generation = transformers.GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = transformers.ContinuousBatchingConfig(page_size=16, num_blocks=24, max_batch_tokens=20)
    enable(model)
    try:
        outputs = model.generate_batch(
            inputs=inputs, generation_config=generation, continuous_batching_config=batching, progress_bar=False
        )
        assert model.config._attn_implementation == ATTENTION
    finally:
        disable(model)
    assert [outputs[f"req_{i}"].generated_tokens for i in range(len(inputs))] == expected
    assert counted["attention_prefill"] > 0 and counted["attention_prefill"] == counted["rope"]


@pytest.mark.parametrize("case", ["qwen3", "gemma2", "qwen3-moe"])
def test_bfloat16_is_no_further_from_float64_than_the_host(case):
    ids, _ = prompts()
    model = build(case)
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()(ids).logits
        model.bfloat16()
        of_host = model(ids).logits
        enable(model)
        judge(f"logits of {case}", model(ids).logits, exact, of_host)


def test_packed_sequences_are_those_alone(models):
    model = models("qwen2-window")
    ids, _ = prompts()
    flat = torch.cat((ids[0, :9], ids[1, :2]))[None], torch.cat((ids[2, :4], ids[1, 4:]))[None]
    together = torch.cat(flat)
    positions = torch.stack((torch.tensor([*range(9), *range(2)]), torch.tensor([*range(4), *range(7)])))
    with torch.inference_mode():
        expected = model(together, position_ids=positions, use_cache=False).logits
        enable(model)
        try:
            got = model(together, position_ids=positions, use_cache=False).logits
            alone = model(ids[2:, :4], use_cache=False).logits
        finally:
            disable(model)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[1:, :4], alone, rtol=1e-4, atol=1e-4)


def test_offsets_of_packed_rows_with_and_without_a_host_read():
    generator = torch.Generator().manual_seed(0)
    sequence = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1]])
    read, captured = (integration._packed_rows(sequence, capturing) for capturing in (False, True))
    assert read.shape[-1] == 7 and captured.shape[-1] == 14
    module = type("Layer", (nn.Module,), {"is_causal": True})()
    q, k, v = (torch.randn(2, heads, 6, 8, generator=generator) for heads in (4, 2, 2))
    got, again = (attend(module, q, k, v, mask)[0] for mask in (read, captured))
    assert torch.equal(got, again)
    together = sequence[:, None, :, None] == sequence[:, None, None, :]
    options = {"attn_mask": together & (torch.ones(6, 6).tril() > 0), "enable_gqa": True}
    expected = nn.functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)
    torch.testing.assert_close(got, expected)


def test_under_torch_compile(llama):
    ids, _ = prompts()
    with torch.inference_mode():
        expected = llama(ids, use_cache=False).logits
        torch._dynamo.reset()
        got = torch.compile(llama, backend="eager")(ids, use_cache=False).logits
    torch.testing.assert_close(got, expected)


def _lengths(generator, limit):
    return int(torch.randint(1, limit, (), generator=generator))


@pytest.mark.parametrize("seed", range(40))
def test_offsets_mean_what_the_hosts_mask_means(seed):
    """Random padding, prefix, window and cache size, against softmax over the host's own boolean mask."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

    generator = torch.Generator().manual_seed(seed)
    batch, Hq, Hkv, D = _lengths(generator, 4), 4, 2, 8
    past, new, spare = _lengths(generator, 9) - 1, _lengths(generator, 9), (seed % 3 == 0) * _lengths(generator, 6)
    window = _lengths(generator, 8) if seed % 2 else None
    # A windowed cache has dropped its oldest keys.
    dropped = max(past - window + 1, 0) if window and seed % 4 == 1 else 0
    length = past + new - dropped + spare
    padding = torch.zeros(batch, past + new, dtype=torch.bool)
    for row in padding:
        first = _lengths(generator, past + new + 1) - 1
        row[first : first + _lengths(generator, past + new + 2) - 1] = True
    padding = None if seed % 5 == 0 else padding
    pattern = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    shared = {"batch_size": batch, "q_length": new, "kv_length": length, "q_offset": past, "kv_offset": dropped}
    q, k, v = (torch.randn(batch, h, n, D, generator=generator) for h, n in ((Hq, new), (Hkv, length), (Hkv, length)))
    k[:, :, length - spare :] = v[:, :, length - spare :] = float("nan")

    options = {"mask_function": pattern, "attention_mask": padding, "allow_is_causal_skip": False, "local_size": window}
    mask = sdpa_mask(**shared, **options)
    k0, v0 = (x.nan_to_num(0.0).repeat_interleave(Hq // Hkv, 1) for x in (k, v))
    scores = (q @ k0.transpose(2, 3) * 0.3).masked_fill(~mask, -torch.inf)
    expected = (scores.softmax(-1).nan_to_num(0.0) @ v0).transpose(1, 2)

    module = type("Layer", (nn.Module,), {"is_causal": True})()
    lengths = packed_lengths(**shared, mask_function=pattern, attention_mask=padding)
    got, weights = attend(module, q, k, v, lengths, scaling=0.3, sliding_window=window)
    # Rows of padding are 0 with us; the host computes something for those after the last token, which nothing reads.
    if padding is not None:
        expected = expected * padding[:, past:, None, None]
    assert weights is None
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def refusal(call):
    with torch.inference_mode(), pytest.raises(NotSupported) as caught:
        call()
    return str(caught.value)


def test_what_attention_cannot_express_is_refused(llama):
    ids, padded = prompts()
    holes = torch.ones_like(ids)
    holes[1, 4] = 0
    assert "row 1 of the attention mask has padding between its tokens" in refusal(lambda: llama(ids, attention_mask=holes))
    square = torch.ones(3, 1, 11, 11, dtype=torch.bool)
    assert "a mask in four dimensions" in refusal(lambda: llama(ids, attention_mask=square))
    assert "attention weights" in refusal(lambda: llama(ids, output_attentions=True))
    llama.model.layers[0].self_attn.is_causal = False
    assert "not causal" in refusal(lambda: llama(ids, attention_mask=padded))
    llama.model.layers[0].self_attn.is_causal = True


def test_dropout_and_gradients_are_refused(llama):
    ids, _ = prompts()
    with pytest.raises(NotSupported, match="no gradients"):
        llama(ids)
    attention = llama.model.layers[0].self_attn
    attention.train()
    attention.attention_dropout = 0.5
    assert "dropout" in refusal(lambda: llama(ids))
    attention.attention_dropout = 0.0
    attention.eval()


def test_other_patterns_are_refused():
    from transformers.masking_utils import (
        bidirectional_mask_function,
        causal_mask_function,
        chunked_causal_mask_function,
        or_masks,
    )

    chunked = chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int))
    either = or_masks(causal_mask_function, bidirectional_mask_function)
    for pattern, name in ((chunked, "chunked_overlay"), (either, "or_masks"), (bidirectional_mask_function, "bidirectional")):
        assert name in refusal(lambda pattern=pattern: packed_lengths(1, 4, 4, mask_function=pattern))


def test_what_is_not_known_is_left_with_its_reason(models):
    model = build("llama")
    model.model.norm.double()
    model.model.layers[0].mlp.up_proj = nn.Sequential(model.model.layers[0].mlp.up_proj)
    model.model.layers[1].mlp.act_fn = nn.ReLU()
    left = {(name, reason) for name, reason in enable(model).left}
    assert ("LlamaRMSNorm", "its weight is torch.float64 in a model of torch.float32, so its result has another dtype") in left
    assert ("LlamaMLP", "its projection is a Sequential, not torch's Linear") in left
    assert ("LlamaMLP", "no operator for the activation ReLU") in left
    assert any(name == "Embedding" for name, _ in left)
    hooked = build("llama")
    hooked.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *args: None)
    hooked.model.norm.forward = hooked.model.norm.forward
    kept = hooked.model.norm.forward
    left = set(enable(hooked).left)
    assert ("LlamaMLP", "its projection has hooks or a forward of its own") in left
    assert ("LlamaRMSNorm", "its forward is not the one of its class") in left
    disable(hooked)
    assert vars(hooked.model.norm)["forward"] is kept
    mixture = build("qwen3-moe")
    mixture.model.layers[0].mlp.experts.act_fn = nn.ReLU()
    assert ("Qwen3MoeExperts", "no operator for the activation ReLU") in enable(mixture).left
    tiny = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9, bos_token_id=0, eos_token_id=0)
    with pytest.raises(NotSupported, match="not one of our families"):
        enable(transformers.GPT2LMHeadModel(tiny))


def test_an_error_on_the_way_leaves_nothing_behind(models, monkeypatch):
    model = models("llama")
    before = snapshot(model)

    def fail(*args):
        raise RuntimeError("in the middle")

    monkeypatch.setitem(integration._SWAPS, "RotaryEmbedding", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        enable(model)
    assert snapshot(model) == before


def test_attention_and_rotation_change_together_or_not_at_all(monkeypatch):
    model = build("qwen3")
    ids, _ = prompts()
    expected = model.generate(ids, **GREEDY)
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    assert {name for name, _ in enable(model).replaced} == {"Qwen3RMSNorm", "Qwen3MLP"}
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    disable(model)
    monkeypatch.undo()
    model.model.layers[1].self_attn.forward = model.model.layers[1].self_attn.forward
    report = enable(model)
    assert ("Qwen3Attention", "attention_prefill") in report.replaced
    assert {name for name, _ in report.left} >= {"Qwen3Attention", "Qwen3RotaryEmbedding"}
    assert torch.equal(model.generate(ids, **GREEDY), expected)


def test_enable_twice_and_a_copy(models):
    model = models("qwen3")
    report = enable(model)
    try:
        assert enable(model) is report
        assert "Qwen3RMSNorm" in str(report) and "attention_prefill, rope" in str(report)
        twin = copy.deepcopy(model)
    finally:
        disable(model)
    with pytest.raises(ValueError, match="is not enabled"):
        disable(model)
    with pytest.raises(TypeError, match="must be a PreTrainedModel of transformers, got Linear"):
        enable(nn.Linear(2, 2))
    assert twin.config._attn_implementation == ATTENTION
    disable(twin)
    assert twin.config._attn_implementation == model.config._attn_implementation == "eager"
    assert all("forward" not in vars(module) for module in twin.modules())
