"""Where the values of a paged cache lie: allocation and strides of K, V and the scales of K."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
ORDERS = ("NHD", "HND", "HDN")
LARGEST_PAGE = 256


class KVCache(NamedTuple):
    """The tensors of one layer's cache; k_scale is None unless each token and head of K has its own scale."""

    k: Tensor  # [P, S, Hkv, D]
    v: Tensor  # [P, S, Hkv, Dv]
    k_scale: Tensor | None  # [P, S, Hkv] float32


@dataclass(frozen=True)
class KVLayout:
    """The shape, dtype and order in memory of a paged cache.

        layout = KVLayout(page_size=64, num_kv_heads=8, head_dim=128, dtype=torch.float8_e4m3fn, order="HND", v_order="HDN",
                          k_scales=True)
        k_cache, v_cache, k_scale = layout.allocate(num_pages, device="cuda")

    Args:
        page_size: S, a power of two up to 256.
        num_kv_heads: Hkv.
        head_dim: D.
        head_dim_v: Dv; None for D.
        dtype: of K and V.
        order: of K and V, "NHD" or "HND".
        v_order: of V where it differs from K's: "HDN", transposed inside each page and head; needs FP8 and S >= 16, so that a
            dimension's run of slots is at least the 16 bytes that TMA copies.
        k_scales: with FP8, a scale of each token and head of K is kept beside it.
    Raises: ValueError with the argument, the wanted and the got.
    """

    page_size: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int | None = None
    dtype: torch.dtype = torch.bfloat16
    order: str = "NHD"
    v_order: str | None = None
    k_scales: bool = False

    def __post_init__(self) -> None:
        size = self.page_size
        if not 1 <= size <= LARGEST_PAGE or size & (size - 1):
            raise ValueError(f"KVLayout: `page_size` must be a power of two from 1 to {LARGEST_PAGE}, got {size}")
        for name in ("num_kv_heads", "head_dim", "head_dim_v"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"KVLayout: `{name}` must be at least 1, got {value}")
        if self.order not in ("NHD", "HND"):
            raise ValueError(f"KVLayout: `order` must be 'NHD' or 'HND', got {self.order!r}")
        if self.v_order not in (None, *ORDERS):
            raise ValueError(f"KVLayout: `v_order` must be None, {', '.join(map(repr, ORDERS))}, got {self.v_order!r}")
        if self.v_order == "HDN" and (self.dtype is not FP8 or size < 16):
            raise ValueError(f"KVLayout: `v_order` 'HDN' needs float8_e4m3fn and page_size >= 16, got {self.dtype}, {size}")
        if self.k_scales and self.dtype is not FP8:
            raise ValueError(f"KVLayout: `k_scales` must be False unless dtype is float8_e4m3fn, got {self.dtype}")

    @property
    def k_strides(self) -> tuple[int, int, int, int]:
        """Strides in elements of [P, S, Hkv, D]."""
        return _strides(self.order, self.page_size, self.num_kv_heads, self.head_dim)

    @property
    def v_strides(self) -> tuple[int, int, int, int]:
        """Strides in elements of [P, S, Hkv, Dv]."""
        return _strides(self.v_order or self.order, self.page_size, self.num_kv_heads, self.head_dim_v or self.head_dim)

    @property
    def k_scale_strides(self) -> tuple[int, int, int]:
        """Strides in elements of the scales [P, S, Hkv]: head-major."""
        return self.num_kv_heads * self.page_size, 1, self.page_size

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: K, V and scales."""
        row = (self.head_dim + (self.head_dim_v or self.head_dim)) * self.dtype.itemsize + 4 * self.k_scales
        return self.page_size * self.num_kv_heads * row

    def allocate(self, num_pages: int, *, device: torch.device | str | None = None) -> KVCache:
        """Caches of this many pages, which hold anything until they are written."""
        shape = (num_pages, self.page_size, self.num_kv_heads)
        k = torch.empty_strided((*shape, self.head_dim), self.k_strides, dtype=self.dtype, device=device)
        v = torch.empty_strided((*shape, self.head_dim_v or self.head_dim), self.v_strides, dtype=self.dtype, device=device)
        if not self.k_scales:
            return KVCache(k, v, None)
        return KVCache(k, v, torch.empty_strided(shape, self.k_scale_strides, dtype=torch.float32, device=device))


def _strides(order: str, S: int, H: int, D: int) -> tuple[int, int, int, int]:
    sizes = {"N": S, "H": H, "D": D}
    slot, head, dimension = (math.prod(sizes[after] for after in order[order.index(letter) + 1 :]) for letter in "NHD")
    return S * H * D, slot, head, dimension


def order_of(cache: Tensor) -> str | None:
    """The order in which a page [S, H, D] of the cache lies: "NHD", "HND" or "HDN"; None when its pages are not so packed.

    Where a dimension of size 1 makes several true, the first of them.
    """
    sizes, strides = tuple(cache.shape[1:]), tuple(cache.stride()[1:])
    for order in ORDERS:
        wanted = _strides(order, *sizes)[1:]
        if all(size == 1 or got == want for size, got, want in zip(sizes, strides, wanted, strict=True)):
            return order
    return None
