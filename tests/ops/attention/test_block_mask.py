"""Block-sparse prefill: skipped tiles, rows that see nothing, and the masks that are refused."""

import pytest
import torch

from penstock.core.cases import Make
from penstock.core.check import ContractError
from penstock.ops import attention_prefill_paged

CASES = {case.name: case for case in attention_prefill_paged.all_cases()}


def _call(name="block_mask_float32"):
    return CASES[name].build(Make())


@pytest.mark.parametrize("impl", ["cpu", "triton", "reference"])
def test_a_mask_of_ones_changes_nothing(impl):
    call = _call()
    mask = torch.ones_like(call.pop("block_mask"))
    whole = attention_prefill_paged(**call, impl=impl)
    assert torch.allclose(attention_prefill_paged(**call, block_mask=mask, impl=impl), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["cpu", "triton", "reference"])
def test_rows_whose_blocks_are_all_masked_are_zero(impl):
    call = _call()
    call["block_mask"][0, 0] = 1
    call["block_mask"][0, 1, 1] = 0
    out, lse = attention_prefill_paged(**call, return_lse=True, impl=impl)
    assert bool((out[128:, 1] == 0).all()) and bool((lse[128:, 1] == float("-inf")).all())
    assert bool((out[128:, 0] != 0).any())


@pytest.mark.parametrize("impl", ["cpu", "triton", "reference"])
def test_what_a_masked_block_holds_does_not_matter(impl):
    call = _call()
    call["block_mask"][:, :, :, 0] = 0
    call["block_mask"][:, :, :, 1:] = 1
    before = attention_prefill_paged(**call, impl=impl)
    for page in call["page_table"][0, : 128 // 16].tolist():
        call["k_cache"][page] = float("nan")
        call["v_cache"][page] = float("nan")
    assert torch.equal(attention_prefill_paged(**call, impl=impl), before)


def test_masks_that_do_not_reach_are_refused():
    call = _call()
    mask = call.pop("block_mask")
    with pytest.raises(ContractError, match=r"`block_mask` must be \[1, 2, 2, 3\] or have more blocks, got \[1, 2, 2, 2\]"):
        attention_prefill_paged(**call, block_mask=mask[..., :2].contiguous())
    with pytest.raises(ContractError, match="block_mask"):
        attention_prefill_paged(**call, block_mask=mask.bool())
