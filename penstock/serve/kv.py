"""The pool of key and value pages that all requests share, and how large it is made."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from penstock.serve.models.spec import LayerSpec, ModelError, ModelSpec

CUDA_UTILISATION = 0.9
CPU_SHARE = 0.25
SMALLEST_USEFUL_LENGTH = 128


@dataclass(frozen=True, slots=True)
class PoolSize:
    """What a pool holds: pages of all layers, and the longest request that the pool is made for."""

    num_pages: int
    max_model_len: int


class KVPool:
    """Pages of keys and values for every layer, in one allocation.

    layers[i] is (k_cache, v_cache), each [P, S, Hkv, D]; with latent attention both are one cache of latent rows. Pages hold
    anything until they are written.
    """

    def __init__(self, spec: ModelSpec, num_pages: int, page_size: int, *, dtype: torch.dtype, device: str | torch.device):
        heads = {(layer.num_kv_heads, layer.head_dim) for layer in spec.layers}
        if len(heads) != 1:
            raise ModelError(f"the layers must agree in KV heads and head_dim, got {sorted(heads)}")
        parts = {_parts(layer) for layer in spec.layers}
        if len(parts) != 1:
            raise ModelError("either all layers have latent attention, or none")
        shape = (len(spec.layers), parts.pop(), num_pages, page_size, *heads.pop())
        self.num_pages = num_pages
        self.page_size = page_size
        self.data = torch.empty(shape, dtype=dtype, device=device)
        self.layers: list[tuple[Tensor, Tensor]] = [(pages[0], pages[-1]) for pages in self.data]


def _parts(layer: LayerSpec) -> int:
    """Caches of a layer: keys and values, or latent rows that are both."""
    return 2 if layer.latent is None else 1


def page_bytes(spec: ModelSpec, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page in all layers, keys and values."""
    return sum(_parts(layer) * page_size * layer.num_kv_heads * layer.head_dim for layer in spec.layers) * dtype.itemsize


def size_pool(
    spec: ModelSpec,
    *,
    page_size: int,
    dtype: torch.dtype,
    available: int,
    max_model_len: int | None,
    max_num_seqs: int,
    fill: bool,
) -> PoolSize:
    """How many pages fit in `available` bytes, and the longest request they serve.

    Args:
        max_model_len: tokens that one request must be able to have; None takes the model's, less where memory is short.
        fill: take all that is available, although max_num_seqs requests of full length may need less.
    Raises: ModelError with the bytes needed and available when the pool cannot hold one request.
    """
    each = page_bytes(spec, page_size, dtype)
    pages = available // each
    longest = max_model_len or spec.max_position_embeddings
    needed = longest if max_model_len else min(longest, SMALLEST_USEFUL_LENGTH)
    if pages < -(-needed // page_size):
        why = "max_model_len" if max_model_len else "the smallest useful length"
        raise ModelError(
            f"the KV cache needs {_readable(-(-needed // page_size) * each)} for one request of {needed} tokens ({why}), "
            f"{_readable(available)} is available; give more kv_cache_memory or a smaller max_model_len"
        )
    longest = min(longest, pages * page_size)
    if not fill:
        pages = min(pages, max_num_seqs * -(-longest // page_size))
    return PoolSize(pages, longest)


def available_memory(
    spec: ModelSpec, *, device: torch.device, dtype: torch.dtype, max_num_batched_tokens: int, max_num_seqs: int
) -> int:
    """Bytes that a pool may take on the device once the weights are there."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        activations = activation_bytes(spec, dtype, max_num_batched_tokens, max_num_seqs)
        return max(0, int(free - (1 - CUDA_UTILISATION) * total) - activations)
    return int(CPU_SHARE * host_memory())


def activation_bytes(spec: ModelSpec, dtype: torch.dtype, tokens: int, rows: int) -> int:
    """An upper estimate of what one step allocates: the widest layer's intermediates, then logits and their copies."""
    widest = max((layer.num_heads * 2 + layer.num_kv_heads * 2) * layer.head_dim + 3 * layer.mlp_size for layer in spec.layers)
    return tokens * (widest + 6 * spec.hidden_size) * dtype.itemsize + rows * spec.vocab_size * (4 * 4 + dtype.itemsize)


def host_memory() -> int:
    """Bytes of memory this process may still take: what the system has available, less where a control group is tighter."""
    lines = Path("/proc/meminfo")
    available = 4 << 30
    if lines.is_file():
        fields = dict(line.split(":", 1) for line in lines.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        available = min(available, max(0, int(limit.read_text()) - int(used.read_text())))
    return available


def _readable(size: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size / 1024:.2f} KiB"
