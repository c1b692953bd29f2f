"""moe_route beyond the shared cases: transformers' routers, ties, masked experts, errors, compilation."""

import pytest
import torch

from penstock.core.check import ContractError
from penstock.ops import moe_route

GPU = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = pytest.mark.parametrize(("impl", "device"), [("reference", "cpu"), ("cpu", "cpu"), ("triton", GPU)])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def routed(name, config, logits, bias=None):
    """(ids, weights) of a router of transformers whose weight is the identity, ids in rising order."""
    module = pytest.importorskip(f"transformers.models.{name}.modeling_{name}")
    kind = next(v for k, v in vars(module).items() if k.lower().endswith(("topkrouter", "gate")) and isinstance(v, type))
    settings = next(
        v for k, v in vars(module).items() if k.endswith("Config") and k.lower().startswith(name.replace("_", "")[:6])
    )
    made = settings(hidden_size=logits.shape[1], **config)
    router = kind(made)
    parameters = dict(router.named_parameters())
    next(iter(parameters.values())).data = torch.eye(logits.shape[1])
    if bias is not None:
        router.e_score_correction_bias.copy_(bias)
    _, weights, ids = router(logits)
    ids, order = ids.sort(dim=1)
    return ids, weights.gather(1, order)


DEEPSEEK = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "num_experts_per_tok": 3, "n_routed_experts": 32}
MODELS = {
    "mixtral": ({"num_local_experts": 8, "num_experts_per_tok": 2}, {"top_k": 2}, 8, False),
    "qwen3_moe": (
        {"num_experts": 16, "num_experts_per_tok": 4, "norm_topk_prob": False},
        {"top_k": 4, "renormalize": False},
        16,
        False,
    ),
    "hunyuan_v1_moe": ({"num_experts": 16, "moe_topk": 3}, {"top_k": 3}, 16, False),
    "deepseek_v2": (
        {**DEEPSEEK, "topk_method": "group_limited_greedy"},
        {"top_k": 3, "num_groups": 4, "top_groups": 2, "scale": 2.5, "renormalize": False},
        32,
        False,
    ),
    "deepseek_v3": (
        {**DEEPSEEK, "norm_topk_prob": True},
        {"top_k": 3, "num_groups": 4, "top_groups": 2, "scale": 2.5, "scoring": "sigmoid"},
        32,
        True,
    ),
}


@RUNS
@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_router_of_the_model(impl, device, name):
    config, options, E, biased = MODELS[name]
    logits = torch.randn(9, E)
    bias = torch.randn(E) * 0.1 if biased else None
    wanted_ids, wanted = routed(name, config, logits, bias)
    got_ids, got = moe_route(logits.to(device), bias=None if bias is None else bias.to(device), impl=impl, **options)
    got_ids, order = got_ids.cpu().long().sort(dim=1)
    assert torch.equal(got_ids, wanted_ids)
    torch.testing.assert_close(got.cpu().gather(1, order), wanted, rtol=1e-5, atol=1e-7)


@RUNS
def test_equal_ones_go_to_the_smaller_id(impl, device):
    logits = torch.zeros(2, 12, device=device)
    ids, weights = moe_route(logits, 4, impl=impl)
    assert ids.tolist() == [[0, 1, 2, 3]] * 2
    torch.testing.assert_close(weights.cpu(), torch.full((2, 4), 0.25))
    logits[0, 7] = 1
    ids, _ = moe_route(logits, 3, num_groups=4, top_groups=2, impl=impl)
    assert ids.tolist() == [[7, 0, 1], [0, 1, 2]]


@RUNS
def test_the_bias_changes_the_choice_and_not_the_weights(impl, device):
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]], device=device)
    bias = torch.tensor([0.0, 0.0, 0.0, 9.0], device=device)
    ids, weights = moe_route(logits, 2, scoring="sigmoid", bias=bias, renormalize=False, impl=impl)
    assert ids.tolist() == [[3, 0]]
    torch.testing.assert_close(weights[0].cpu(), torch.tensor([0.0, 3.0]).sigmoid())


@RUNS
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_masked_experts_and_nan(impl, device, scoring):
    logits = torch.full((3, 8), -torch.inf, device=device)
    logits[0, 5] = 1.0
    logits[1, 2] = torch.nan
    ids, weights = moe_route(logits, 2, scoring=scoring, impl=impl)
    assert ids.tolist() == [[5, 0], [0, 1], [0, 1]]
    assert weights.isfinite().all()
    assert weights[0].tolist() == [1.0, 0.0]
    ids, _ = moe_route(logits, 3, scoring=scoring, num_groups=2, top_groups=1, impl=impl)
    assert ids.tolist() == [[5, 4, 6], [0, 1, 2], [0, 1, 2]]


@RUNS
def test_rows_with_gaps(impl, device):
    logits = torch.randn(4, 40, device=device)[:, 8:24]
    got, wanted = (
        moe_route(logits, 3, impl=impl),
        moe_route(logits.contiguous(), 3, impl="reference" if device == "cpu" else impl),
    )
    assert torch.equal(got[0], wanted[0])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("top_k", {"top_k": 0}),
        ("top_k", {"top_k": 9}),
        ("top_k", {"top_k": 5, "num_groups": 4, "top_groups": 2}),
        ("num_groups", {"num_groups": 3, "top_groups": 2}),
        ("top_groups", {"num_groups": 4}),
        ("top_groups", {"num_groups": 4, "top_groups": 5}),
        ("scoring", {"scoring": "tanh"}),
        ("bias", {"bias": torch.zeros(7)}),
        ("logits", {"logits": torch.zeros(2, 5000)}),
        ("logits", {"logits": torch.zeros(2, 8).int()}),
    ],
)
def test_errors_name_the_argument(name, change):
    with pytest.raises(ContractError, match=f"`{name}`"):
        moe_route(**{"logits": torch.zeros(2, 8), "top_k": 2} | change)


def test_compiled_function_agrees():
    def function(x):
        ids, weights = moe_route(x * 2, 2)
        return ids + 1, weights * 2

    x = torch.randn(3, 16)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(x)
    assert all(torch.equal(a, b) for a, b in zip(compiled, function(x), strict=True))
