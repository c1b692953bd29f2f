"""The CPU path reads pages that follow each other in place, others through a copy: the results are the same."""

import pytest
import torch

from penstock.ops import attention_decode, attention_prefill_paged


@pytest.mark.parametrize("lengths", [[37], [37, 37, 37], [37, 5, 48], [1, 33]])
@pytest.mark.parametrize("ids", ["ascending", "shuffled"])
@pytest.mark.parametrize("head_major", [False, True])
def test_pages_in_any_order_with_nan_past_the_end(lengths: list[int], ids: str, head_major: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    S, Hkv, D, width = 16, 2, 32, 3
    numbers = torch.arange(20) if ids == "ascending" else torch.randperm(20, generator=generator)
    table = numbers[: len(lengths) * width].view(len(lengths), width).int()
    # A larger storage around the cache: a view that starts at the wrong place reads NaN.
    held = torch.full((22, Hkv, S, D) if head_major else (22, S, Hkv, D), float("nan"))[1:21]
    cache = held.transpose(1, 2) if head_major else held
    for row, length in zip(table.tolist(), lengths, strict=True):
        for at in range(length):
            cache[row[at // S], at % S] = torch.randn(Hkv, D, generator=generator)
    q = torch.randn(len(lengths), 4, D, generator=generator)
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    wanted = attention_decode(q, cache, cache, table, seqlens, impl="reference")
    torch.testing.assert_close(attention_decode(q, cache, cache, table, seqlens), wanted)
    ends = torch.arange(len(lengths) + 1, dtype=torch.int32)
    prefill = attention_prefill_paged(q, cache, cache, table, ends, seqlens, max_seqlen_q=1)
    torch.testing.assert_close(prefill, wanted)
