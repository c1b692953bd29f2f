"""fused_moe beyond the shared cases: transformers' experts, ranks that share a layer, sorting, errors, compilation."""

import pytest
import torch

from penstock.core.check import ContractError
from penstock.core.formats import FP8_BLOCK, FP8_TENSOR, FP8_TOKEN
from penstock.ops import fused_moe, moe_route, quantize

GPU = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = pytest.mark.parametrize(("impl", "device"), [("reference", "cpu"), ("cpu", "cpu"), ("triton", GPU)])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def layer(T=5, E=4, k=2, H=32, intermediate=16, dtype=torch.bfloat16, device="cpu"):
    ids, weights = moe_route(torch.randn(T, E, device=device), k)
    return {
        "x": torch.randn(T, H, device=device).to(dtype),
        "w_gate_up": (torch.randn(E, 2 * intermediate, H, device=device) * H**-0.5).to(dtype),
        "w_down": (torch.randn(E, H, intermediate, device=device) * intermediate**-0.5).to(dtype),
        "topk_ids": ids,
        "topk_weights": weights,
    }


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_it_is_the_experts_of_the_model(impl):
    module = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    config = module.Qwen3MoeConfig(hidden_size=32, moe_intermediate_size=16, num_experts=4)
    experts = module.Qwen3MoeExperts(config)
    arguments = layer(dtype=torch.float32)
    experts.gate_up_proj.data, experts.down_proj.data = arguments["w_gate_up"], arguments["w_down"]
    with torch.no_grad():
        wanted = experts(arguments["x"], arguments["topk_ids"].long(), arguments["topk_weights"])
    torch.testing.assert_close(fused_moe(**arguments, impl=impl), wanted, rtol=1e-5, atol=1e-6)


@RUNS
def test_ranks_add_up_to_the_whole(impl, device):
    arguments = layer(T=12, device=device)
    whole = fused_moe(**arguments, impl=impl).float()
    parts = []
    for first in (0, 2):
        mine = {name: arguments[name][first : first + 2] for name in ("w_gate_up", "w_down")}
        parts.append(fused_moe(**arguments | mine, expert_offset=first, impl=impl).float())
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=0.03, atol=0.02)


@RUNS
@pytest.mark.parametrize("T", [3, 20])
def test_what_another_rank_computes_adds_nothing(impl, device, T):
    arguments = layer(T=T, device=device)
    arguments["topk_ids"][:, 1] = torch.tensor([-1, 4, 2**31 - 1], dtype=torch.int32, device=device).repeat(7)[:T]
    alone = arguments | {"topk_ids": arguments["topk_ids"][:, :1].contiguous()}
    alone["topk_weights"] = arguments["topk_weights"][:, :1].contiguous()
    arguments["topk_weights"][:, 1] = torch.nan
    got = fused_moe(**arguments, impl=impl)
    torch.testing.assert_close(got, fused_moe(**alone, impl=impl), rtol=0.01, atol=0.01)
    nobody = arguments | {"topk_ids": torch.full_like(arguments["topk_ids"], 9)}
    shared = torch.randn_like(arguments["x"])
    assert not fused_moe(**nobody, impl=impl).any()
    assert torch.equal(fused_moe(**nobody, shared_output=shared, impl=impl), shared)


@RUNS
@pytest.mark.parametrize("format", [FP8_TENSOR, FP8_TOKEN, FP8_BLOCK], ids=lambda format: format.name)
def test_quantised_weights_give_nearly_the_layer(impl, device, format):
    arguments = layer(H=128, intermediate=128, dtype=torch.float32, device=device)
    wanted = fused_moe(**{name: value.cpu() for name, value in arguments.items()}, impl="reference")
    arguments["x"] = arguments["x"].bfloat16()
    for name in ("w_gate_up", "w_down"):
        made = [quantize(expert, format=format, weight=format is FP8_BLOCK) for expert in arguments[name]]
        arguments[name] = torch.stack([values for values, _ in made])
        arguments[name + "_scale"] = torch.stack([scale for _, scale in made])
    got = fused_moe(**arguments, format=format, impl=impl).float().cpu()
    assert (got - wanted).norm() < 0.08 * wanted.norm()


@pytest.mark.parametrize(("T", "k"), [(3, 1), (300, 3), (2100, 2)])
def test_sorting_is_stable(T, k):
    pytest.importorskip("triton")
    from penstock.core.features import interpreting
    from penstock.ops.moe.sort_triton import sort_slots

    assert GPU == "cuda" or interpreting()
    ids = torch.randint(-1, 6, (T, k), dtype=torch.int32, device=GPU)
    tokens, position, offsets = (part.cpu() for part in sort_slots(ids, 4, 1, False))
    local = torch.where((ids >= 1) & (ids < 5), ids - 1, 4).flatten().cpu()
    order = local.sort(stable=True).indices
    count = int((local < 4).sum())
    assert offsets.tolist() == [int((local < expert).sum()) for expert in range(5)]
    assert tokens[:count].tolist() == (order[:count] // k).tolist()
    wanted = torch.full_like(local, -1)
    wanted[order[:count]] = torch.arange(count, dtype=wanted.dtype)
    assert position.tolist() == wanted.tolist()


CODES = torch.zeros(5, 32).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("w_gate_up", {"w_gate_up": torch.zeros(4, 31, 32).bfloat16()}),
        ("w_gate_up", {"format": FP8_TENSOR}),
        ("w_down", {"w_down": torch.zeros(4, 32, 15).bfloat16()}),
        ("topk_ids", {"topk_ids": torch.zeros(5, 2, dtype=torch.int64)}),
        ("topk_weights", {"topk_weights": torch.zeros(5, 3)}),
        ("x_scale", {"x_scale": torch.ones(5)}),
        ("w_gate_up", {"x": CODES}),
        ("activation", {"activation": "relu"}),
        ("expert_offset", {"expert_offset": -1}),
        ("shared_output", {"shared_output": torch.zeros(5, 32)}),
        ("out", {"out": torch.zeros(4, 32).bfloat16()}),
        ("w_down_scale", {"w_down_scale": torch.ones(1)}),
    ],
)
def test_errors_name_the_argument(name, change):
    with pytest.raises(ContractError, match=f"`{name}`"):
        fused_moe(**layer() | change)


def test_compiled_function_agrees():
    def function(**arguments):
        return fused_moe(**arguments) + 1

    arguments = layer()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(**arguments)
    assert torch.equal(compiled, function(**arguments))
