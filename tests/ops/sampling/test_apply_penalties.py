"""apply_penalties: the formula, and that all implementations round alike."""

import pytest
import torch

from penstock.core.check import ContractError
from penstock.ops import apply_penalties


def test_one_row_by_hand():
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0, 1.0]])
    counts = torch.tensor([[3, 1, 0, 0, 0]], dtype=torch.int32)
    prompt = torch.tensor([[False, False, True, True, False]])
    got = apply_penalties(logits, counts, prompt, repetition=2.0, presence=0.5, frequency=0.25)
    assert got.tolist() == [[1.0 - 0.75 - 0.5, -4.0 - 0.25 - 0.5, 1.0, -4.0, 1.0]]


@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_implementations_are_equal_to_the_last_bit(impl, dtype):
    if impl == "triton" and torch.cuda.is_available():
        pytest.skip("the interpreter is for machines with no GPU")
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(4, 777, generator=generator) * 5).to(dtype)
    logits[0, :5] = -torch.inf
    counts = torch.randint(0, 3, (4, 777), generator=generator, dtype=torch.int32)
    prompt = torch.rand(4, 777, generator=generator) < 0.2
    rows = {"repetition": torch.tensor([1.0, 1.7, 0.3, 1.1]), "presence": 0.3, "frequency": torch.tensor([0.0, 0.1, 0.7, -0.2])}
    wanted = apply_penalties(logits, counts, prompt, **rows, impl="reference")
    assert torch.equal(wanted, apply_penalties(logits, counts, prompt, **rows, impl=impl))
    in_place = logits.clone()
    assert apply_penalties(in_place, counts, prompt, **rows, out=in_place, impl=impl) is in_place
    assert torch.equal(wanted, in_place)


def test_scalars_and_tensors_agree():
    logits, counts = torch.randn(3, 40), torch.ones(3, 40, dtype=torch.int32)
    by_scalar = apply_penalties(logits, counts, None, repetition=1.2, presence=0.1, frequency=0.2)
    tensors = {"repetition": torch.full((3,), 1.2), "presence": torch.full((3,), 0.1), "frequency": torch.full((3,), 0.2)}
    assert torch.equal(by_scalar, apply_penalties(logits, counts, None, **tensors))


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("repetition", 0.0),
        ("presence", float("nan")),
        ("frequency", "much"),
        ("repetition", torch.ones(2)),
        ("output_counts", torch.zeros(3, 4)),
        ("prompt_mask", torch.zeros(3, 5, dtype=torch.bool)),
    ],
)
def test_contract_errors_name_the_argument(name, bad):
    arguments = {"logits": torch.zeros(3, 4), "output_counts": torch.zeros(3, 4, dtype=torch.int32), "prompt_mask": None}
    with pytest.raises(ContractError, match=f"apply_penalties: `{name}` must"):
        apply_penalties(**arguments | {name: bad})
