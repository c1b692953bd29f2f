"""mla_decode against the attention that it absorbs, and its contract."""

import pytest
import torch

from penstock.core.cases import Make
from penstock.core.check import ContractError
from penstock.ops import attention_decode_plan, mla_decode

CASES = {case.name: case for case in mla_decode.all_cases()}


def test_it_is_the_attention_of_uncompressed_heads():
    """Keys c·W_uk with the rotated part, values c·W_uv: what the model defines, before the projections are absorbed."""
    draw = torch.Generator().manual_seed(0)
    H, Dc, Dr, Dn, n = 3, 24, 8, 16, 21
    latent, rope = (torch.randn(n, width, generator=draw, dtype=torch.float64) for width in (Dc, Dr))
    up_k, up_v = (torch.randn(H, Dn, Dc, generator=draw, dtype=torch.float64) for _ in range(2))
    q, q_rope = (torch.randn(1, H, width, generator=draw, dtype=torch.float64) for width in (Dn, Dr))
    scores = torch.einsum("bhd,hdc,nc->bhn", q, up_k, latent) + torch.einsum("bhr,nr->bhn", q_rope, rope)
    weights = torch.softmax(scores * (Dn + Dr) ** -0.5, -1)
    wanted = torch.einsum("bhn,nc,hdc->bhd", weights, latent, up_v)

    cache = torch.zeros(2, 16, Dc + Dr, dtype=torch.float64)
    cache.view(32, -1)[:n] = torch.cat([latent, rope], -1)
    q_latent = torch.einsum("bhd,hdc->bhc", q, up_k)
    table, lengths = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([n], dtype=torch.int32)
    out = mla_decode(q_latent, q_rope, cache, table, lengths, scale=(Dn + Dr) ** -0.5)
    assert torch.allclose(torch.einsum("bhc,hdc->bhd", out, up_v), wanted, rtol=1e-12, atol=1e-12)


def test_a_plan_made_beforehand_gives_the_same_bits():
    call = CASES["ragged_q_len_3"].build(Make())
    plan = attention_decode_plan(
        call["seqlens_k"], num_heads_q=16, num_heads_kv=1, head_dim=160, page_size=64, q_len=3, impl="triton"
    )
    assert torch.equal(mla_decode(**call, plan=plan, impl="triton")[0], mla_decode(**call, impl="triton")[0])


def test_bad_input_is_named():
    call = CASES["ragged_small"].build(Make())
    with pytest.raises(ContractError, match=r"`cache` must have rows of Dc \+ Dr = 40 \+ 24 values, got 63"):
        mla_decode(**{**call, "cache": call["cache"][..., :63]})
    with pytest.raises(ContractError, match=r"`q_latent` must have B·q_len = 6·2 rows, got 6"):
        mla_decode(**{**call, "q_len": 2})
    with pytest.raises(ContractError, match="`plan` must be what attention_decode_plan returned"):
        mla_decode(**call, plan="soon")
