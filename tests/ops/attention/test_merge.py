"""merge_attention: pieces over disjoint keys equal the whole."""

import pytest
import torch

from penstock.core.cases import Make
from penstock.core.check import ContractError
from penstock.ops.attention import _cases
from penstock.ops.attention.merge import merge_attention
from penstock.ops.attention.prefill import attention_prefill

IMPLS = ["triton", "reference"] if torch.cuda.is_available() else ["triton", "cpu", "reference"]


@pytest.mark.parametrize("impl", IMPLS)
def test_pieces_equal_the_whole(device, impl):
    n, m = 6, 45
    whole = _cases.prefill("whole", [(n, m)], 4, 2, 32, dtype=torch.float32, causal=False, return_lse=True).build(Make(device))
    want, want_lse = attention_prefill(**whole, impl="reference")
    outs, lses = [], []
    for keys in (slice(0, 1), slice(1, 1), slice(1, 30), slice(30, m)):
        length = keys.stop - keys.start
        part = {**whole, "k": whole["k"][keys], "v": whole["v"][keys], "max_seqlen_k": length}
        part["cu_seqlens_k"] = torch.tensor([0, length], dtype=torch.int32, device=device)
        out, lse = attention_prefill(**part, impl="reference")
        outs.append(out)
        lses.append(lse)
    out, lse = merge_attention(torch.stack(outs), torch.stack(lses), impl=impl)
    torch.testing.assert_close(out, want, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(lse, want_lse, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_extreme_lse(device, impl):
    outs = torch.tensor([[1.0], [2.0], [float("nan")]], device=device).view(3, 1, 1, 1)
    lses = torch.tensor([500.0, 500.0, float("-inf")], device=device).view(3, 1, 1)
    out, lse = merge_attention(outs, lses, impl=impl)
    torch.testing.assert_close(out.item(), 1.5)
    torch.testing.assert_close(lse.item(), 500.0 + 0.6931472)


def test_strides(device):
    make = Make(device)
    outs, lses = make.randn(3, 5, 4, 40), make.randn(3, 5, 4, dtype=torch.float32)
    want = merge_attention(outs, lses, impl="triton")
    strided = outs.transpose(0, 2).contiguous().transpose(0, 2)
    out = torch.empty(5, 4, 80, dtype=torch.bfloat16, device=device)[..., 40:]
    got = merge_attention(strided, torch.stack([lses] * 2)[1], out=out, impl="triton")
    assert got[0] is out and torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_contract_errors_name_the_argument(device):
    make = Make(device)
    outs, lses = make.randn(3, 5, 4, 40), make.randn(3, 5, 4, dtype=torch.float32)
    with pytest.raises(ContractError, match="merge_attention: `lses` must be float32 or float64"):
        merge_attention(outs, lses.bfloat16())
    with pytest.raises(ContractError, match=r"merge_attention: `lses` must be \[n=3, T=5, Hq=4\]"):
        merge_attention(outs, lses[:2])
