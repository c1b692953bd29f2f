"""KVLayout: strides by name, bytes, and that the values of a cache do not depend on its order."""

import pytest
import torch

from penstock.core.formats import FP8_TOKEN
from penstock.ops import copy_pages, gather_kv, store_kv
from penstock.ops.kvcache.layout import KVLayout, order_of

FP8 = torch.float8_e4m3fn
GPU = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = pytest.mark.parametrize(("impl", "device"), [("cpu", "cpu"), ("triton", GPU)])


def test_orders_are_strides_of_one_shape():
    layout = KVLayout(16, 3, 8, 24, dtype=FP8, order="HND", v_order="HDN", k_scales=True)
    k, v, k_scale = layout.allocate(5)
    assert (k.shape, v.shape, k_scale.shape) == ((5, 16, 3, 8), (5, 16, 3, 24), (5, 16, 3))
    assert k.permute(0, 2, 1, 3).is_contiguous()
    assert v.permute(0, 2, 3, 1).is_contiguous()
    assert k_scale.permute(0, 2, 1).is_contiguous()
    assert (order_of(k), order_of(v)) == ("HND", "HDN")
    assert sum(tensor.untyped_storage().nbytes() for tensor in (k, v, k_scale)) == 5 * layout.page_bytes
    plain = KVLayout(16, 3, 8).allocate(2)
    assert plain.k_scale is None
    assert plain.k.is_contiguous()
    assert order_of(plain.k) == order_of(plain.v) == "NHD"
    assert order_of(plain.k[:, :, :2]) is None


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("page_size", {"page_size": 24}),
        ("page_size", {"page_size": 512}),
        ("num_kv_heads", {"num_kv_heads": 0}),
        ("order", {"order": "HDN"}),
        ("v_order", {"v_order": "DNH", "dtype": FP8}),
        ("v_order", {"v_order": "HDN"}),
        ("v_order", {"v_order": "HDN", "dtype": FP8, "page_size": 8}),
        ("k_scales", {"k_scales": True}),
    ],
)
def test_errors_name_the_argument(name, change):
    with pytest.raises(ValueError, match=f"`{name}`"):
        KVLayout(**{"page_size": 16, "num_kv_heads": 2, "head_dim": 8} | change)


@RUNS
def test_a_transposed_cache_stores_copies_and_gathers_what_any_other_does(impl, device):
    torch.manual_seed(0)
    seqlens = torch.tensor([21, 0, 34], dtype=torch.int32, device=device)
    starts = torch.tensor([0, 21, 21, 55], dtype=torch.int32, device=device)
    table = torch.tensor([[4, 0, 7], [0, 0, 0], [2, 6, 1]], dtype=torch.int32, device=device)
    pairs = torch.tensor([[4, 3], [6, 5]], dtype=torch.int32, device=device)
    slots = torch.cat(
        [table[b].repeat_interleave(16)[:n] * 16 + torch.arange(n, device=device) % 16 for b, n in ((0, 21), (2, 34))]
    )
    kv = torch.randn(55, 2, 48, device=device, dtype=torch.bfloat16)
    gathered = []
    for orders in ({}, {"order": "HND"}, {"order": "HND", "v_order": "HDN"}):
        caches = KVLayout(16, 2, 24, dtype=FP8, k_scales=True, **orders).allocate(8, device=device)
        v_scale = torch.tensor([0.01, 0.02], device=device)
        k, v = kv[..., :24], kv[..., 24:]
        store_kv(k, v, caches.k, caches.v, slots.int(), format=FP8_TOKEN, k_scale=caches.k_scale, v_scale=v_scale, impl=impl)
        tensors = caches.k, caches.v, caches.k_scale.unsqueeze(-1)
        for tensor in tensors:
            copy_pages(tensor, pairs, impl=impl)
        moved = table.clone()
        moved[0, 0], moved[2, 1] = 3, 5
        results = [gather_kv(tensor, moved, seqlens, starts, impl=impl) for tensor in tensors]
        gathered.append([result.contiguous().view(torch.uint8) for result in results])
    for other in gathered[1:]:
        assert all(torch.equal(one, two) for one, two in zip(gathered[0], other, strict=True))
    k8, v8, scale = results
    assert torch.equal(scale.squeeze(-1), FP8_TOKEN.dynamic_scale(kv[..., :24].float()))
    assert (k8.float() * scale - kv[..., :24]).abs().max() < 0.2
    assert (v8.float() * v_scale[:, None] - kv[..., 24:]).abs().max() < 0.2
