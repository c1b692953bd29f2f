"""What a program of the Hopper kernel of decode works on: its shape, its run of units, what of a request lies in that."""

from dataclasses import dataclass
from typing import Any

from penstock.core.gluon import gl, gluon


@dataclass(frozen=True)
class Shape:
    """Shape and options of a kernel, known when it is compiled.

    Args:
        kind: "bf16", "fp16" or "fp8".
        block_n: keys of a block.
        stages: blocks of keys, and of values, held in shared memory.
        d: columns of queries and keys as they are held; `width` of them exist.
        dv: columns of values as they are held; `out_width` of them exist.
        rows: query rows of a program, the columns of its products.
        kv_heads: of the caches.
        group: query heads of a KV head.
        span: keys of one copy: a block, or a page where that is smaller.
        lead, share: of the plan.
        early: kernels may be launched before the one they follow has ended.
        gather: the last program of a request adds its pieces; otherwise a second kernel does.
    """

    kind: str
    block_n: int
    stages: int
    d: int
    dv: int
    width: int
    out_width: int
    rows: int
    kv_heads: int
    group: int
    q_len: int
    span: int
    page_size: int
    lead: int
    share: int
    has_lse: bool
    has_sinks: bool
    has_left: bool
    has_right: bool
    has_cap: bool
    token_scales: bool
    early: bool
    gather: bool

    @property
    def itemsize(self) -> int:
        """Bytes of an element of queries, keys and values."""
        return 1 if self.kind == "fp8" else 2

    @property
    def bits(self) -> int:
        """Its bits."""
        return 8 * self.itemsize

    @property
    def columns(self) -> int:
        """Columns of a copy: 128 bytes, the widest that shared memory swizzles."""
        return 128 // self.itemsize

    @property
    def parts(self) -> int:
        """Copies that fetch a block of keys, for each 128 bytes of their columns."""
        return self.block_n // self.span

    @property
    def row_blocks(self) -> int:
        """Programs that share the query rows of a KV head."""
        return -(-self.group * self.q_len // self.rows)

    @property
    def shared(self) -> int:
        """Bytes of shared memory, barriers and reductions aside."""
        scales = self.stages * self.block_n * 4 if self.token_scales else 0
        held = self.stages * self.block_n * (self.d + self.dv) + self.rows * (self.d + self.block_n)
        return self.itemsize * held + scales

    @property
    def pieces_at_once(self) -> int:
        """Pieces that are loaded together: 64 values a thread."""
        return max(1, min(16, 8192 // (self.dv * self.rows)))

    @property
    def fetch_registers(self) -> int:
        """Registers of a thread of the fetching warp: most where pages are small, and where the others leave some."""
        return 56 if self.rows * self.dv < 4096 else 40

    @property
    def weights_swizzle(self) -> int:
        """Bytes of a row of P, or of a row of FP8's Vᵀ: what these swizzle."""
        return min(128, self.block_n * self.itemsize)

    @property
    def scores_layout(self) -> Any:
        """Of the accumulator of keys · queries."""
        return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, self.rows, 256 // self.bits])

    @property
    def query_layout(self) -> Any:
        """In which queries pass from global to shared memory: 16 bytes a thread."""
        across = min(32, self.d * self.itemsize // 16)
        return gl.BlockedLayout([1, 16 // self.itemsize], [32 // across, across], [4, 1], [1, 0])


@gluon.jit
def share_of(unit_start, first_request, num_requests, program, programs, C: gl.constexpr):
    """(first request, first unit, end) of a program's run."""
    total = gl.load(unit_start + num_requests)
    request = gl.load(first_request + program)
    working = gl.maximum(gl.minimum(programs, (total + C.share - 1) // C.share), 1)
    wide = gl.cast(program, gl.int64)
    unit = gl.cast(wide * total // working, gl.int32)
    end = gl.minimum(gl.cast((wide + 1) * total // working, gl.int32), total)
    return request, unit, end


@gluon.jit
def part_of(unit_start, first_tile, lengths, request, unit, end, left, C: gl.constexpr):
    """What of a request lies in a run of units.

    Returns: (its next unit, whether it begins here, whether it ends here, whether it has tiles here, its keys, first key to
    look at, key to stop before, lowest key that a query sees).
    """
    request_begin = gl.load(unit_start + request) + C.lead
    request_end = gl.load(unit_start + request + 1)
    hidden = gl.load(first_tile + request)
    k_len = gl.load(lengths + request)
    start = gl.maximum(unit, request_begin)
    stop = gl.minimum(request_end, end)
    first_key = (hidden + start - request_begin) * 64
    stop_key = gl.minimum((hidden + stop - request_begin) * 64, k_len)
    low = gl.to_tensor(0)
    if C.has_left:
        low = gl.maximum(k_len - C.q_len - left, 0)
        first_key = gl.maximum(first_key, low // 64 * 64)
    return stop, start == request_begin, stop == request_end, stop > start, k_len, first_key, stop_key, low


@gluon.jit
def blocks_of(first_key, stop_key, C: gl.constexpr):
    return gl.maximum(stop_key - first_key + C.block_n - 1, 0) // C.block_n


@gluon.jit
def place_of(program_id, C: gl.constexpr):
    """(KV head, block of query rows, program of the plan)."""
    side = program_id // C.kv_heads
    return program_id % C.kv_heads, side % C.row_blocks, side // C.row_blocks
