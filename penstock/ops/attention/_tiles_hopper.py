"""What a persistent program of prefill works on: the order of tiles, the keys of a tile, the rows of a copy.

A tile is `Tile.tokens` queries of one request for one head, or for the heads of one KV head when these are packed. Tiles are
numbered without gaps over the lengths that the requests turn out to have, those that end on the latest key first, all heads of
a tile next to each other. Program p takes tiles p, 2n - 1 - p, 2n + p, ... of n programs, so that long and short ones even out.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from penstock.core.gluon import gl, gluon

# Requests looked at together by the one warp that deals out tiles.
REQUESTS = gl.constexpr(64)
ABOVE_ALL = gl.constexpr(1 << 30)
# Queries and keys that one element of a block mask stands for.
MASK_BLOCK = gl.constexpr(128)


class Boxes(Protocol):
    """What of a kernel's shape the copies of its keys and values depend on; as in Tile."""

    @property
    def block_n(self) -> int: ...
    @property
    def span(self) -> int: ...
    @property
    def dv(self) -> int: ...
    @property
    def itemsize(self) -> int: ...
    @property
    def bits(self) -> int: ...
    @property
    def columns(self) -> int: ...


@dataclass(frozen=True)
class Tile:
    """Shape and options of a kernel, known when it is compiled.

    Args:
        kind: "bf16", "fp16" or "fp8".
        consumers: warpgroups that compute, 64 rows each.
        block_n: keys of a block.
        stages: blocks of keys, and of values, held in shared memory.
        d: columns of queries and keys in one piece, 64, 128 or 256.
        tail: columns after these, 0 or 64.
        dv: columns of values.
        group: heads packed into a tile, a power of two; 1 for none.
        span: keys of one copy: a block, or a page where that is smaller.
        page_size: 0 where keys are packed.
        q_stages: tiles whose queries are held, 1 or 2.
        reuse: results leave through the shared memory of the queries.
        pingpong: warpgroups take turns at the tensor cores.
        codes: FP8 weights are rounded as soon as they are made, and kept four to a register until their product.
        chains: the maximum of a row is taken in two chains a thread instead of one.
        token_scales: FP8 keys have a scale each.
        has_blocks: a block mask says which blocks of keys a tile walks.
    """

    kind: str
    consumers: int
    block_n: int
    stages: int
    d: int
    tail: int
    dv: int
    group: int
    span: int
    page_size: int
    q_stages: int
    reuse: bool
    pingpong: bool
    codes: bool
    chains: bool
    has_left: bool
    has_right: bool
    has_cap: bool
    token_scales: bool
    has_blocks: bool

    @property
    def itemsize(self) -> int:
        """Bytes of a query's, key's or value's element."""
        return 1 if self.kind == "fp8" else 2

    @property
    def bits(self) -> int:
        """Its bits."""
        return 8 * self.itemsize

    @property
    def values_swizzle(self) -> int:
        """Bytes of a row of values that shared memory swizzles; FP8's lie turned, a block of keys wide."""
        return min(128, self.block_n) if self.kind == "fp8" else 128

    @property
    def columns(self) -> int:
        """Columns of a copy: 128 bytes, the widest that shared memory swizzles."""
        return 128 // self.itemsize

    @property
    def rows(self) -> int:
        """Rows of a warpgroup's part of a tile."""
        return 64

    @property
    def tokens(self) -> int:
        """Queries of a tile."""
        return self.consumers * self.rows // self.group

    @property
    def part_tokens(self) -> int:
        """Queries of a warpgroup's part."""
        return self.rows // self.group

    @property
    def parts(self) -> int:
        """Copies that fetch a block of keys, for each 128 bytes of their columns."""
        return self.block_n // self.span

    @property
    def out_width(self) -> int:
        """Columns of the shared memory that results leave through."""
        return self.d if self.reuse else self.dv

    @property
    def out_parts(self) -> int:
        """Warpgroups' parts in it."""
        return self.q_stages * self.consumers if self.reuse else self.consumers

    @property
    def shared(self) -> int:
        """Bytes of shared memory, barriers aside."""
        queries = self.q_stages * self.consumers * self.rows * (self.d + self.tail)
        results = 0 if self.reuse else self.consumers * self.rows * self.dv
        keys = self.stages * self.block_n * (self.d + self.tail + self.dv)
        scales = self.stages * self.block_n * 4 if self.token_scales else 0
        return self.itemsize * (queries + keys) + 2 * results + scales

    @property
    def scores_layout(self) -> Any:
        """Of the accumulator of queries · keys."""
        return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, self.block_n, 256 // self.bits])

    @property
    def result_layout(self) -> Any:
        """Of the accumulator of weights · values."""
        return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, self.dv, 256 // self.bits])


@dataclass(frozen=True)
class Constants:
    """A tile, or another kernel's shape, as kernels see it: each attribute a compile-time constant."""

    tile: Any

    def __getattr__(self, name: str) -> Any:
        return gl.constexpr(getattr(self.tile, name))


@gluon.jit
def lengths_at(cu_seqlens_q, lengths, request, inside, C: gl.constexpr):
    """(first row, queries, first key, keys) of requests; keys in pages count from 0."""
    q_begin = gl.load(cu_seqlens_q + request, inside, other=0)
    q_len = gl.load(cu_seqlens_q + request + 1, inside, other=0) - q_begin
    k_begin = gl.load(lengths + request, inside, other=0)
    k_len = k_begin
    if C.page_size == 0:
        k_len = gl.load(lengths + request + 1, inside, other=0) - k_begin
    return q_begin, q_len, k_begin, k_len


@gluon.jit
def levels_of(cu_seqlens_q, lengths, start, num_requests, C: gl.constexpr):
    """(request, lowest level, highest) of a run of requests; the lowest is above the highest where there are no queries.

    A tile's level says how late its last query stands, in tiles: the more keys, the higher.
    """
    lane: gl.constexpr = gl.BlockedLayout([REQUESTS // 32], [32], [1], [0])
    request = start + gl.arange(0, REQUESTS, layout=lane)
    _, q_len, _, k_len = lengths_at(cu_seqlens_q, lengths, request, request < num_requests, C)
    lowest = gl.maximum(k_len - q_len, 0) // C.tokens
    highest = lowest + (q_len + C.tokens - 1) // C.tokens - 1
    return request, lowest, highest


@gluon.jit
def next_level(cu_seqlens_q, lengths, num_requests, below, C: gl.constexpr):
    """(highest level under `below` that has tiles, how many requests have one there); -1 when none is left."""
    level = gl.to_tensor(-1)
    for start in range(0, num_requests, REQUESTS):
        _, lowest, highest = levels_of(cu_seqlens_q, lengths, start, num_requests, C)
        reached = gl.minimum(highest, below - 1)
        level = gl.maximum(level, gl.max(gl.where((reached >= lowest) & (highest >= lowest), reached, -1), axis=0))
    count = gl.to_tensor(0)
    for start in range(0, num_requests, REQUESTS):
        _, lowest, highest = levels_of(cu_seqlens_q, lengths, start, num_requests, C)
        count += gl.sum(((lowest <= level) & (level <= highest)).to(gl.int32), axis=0)
    return level, count


@gluon.jit
def add(a, b):
    """For a running sum."""
    return a + b


@gluon.jit
def request_at(cu_seqlens_q, lengths, num_requests, level, rank, C: gl.constexpr):
    """(the request, in order, that has `rank` others with a tile at this level before it; its place among levels)."""
    found = gl.to_tensor(0)
    lowest_found = gl.to_tensor(0)
    before = gl.to_tensor(0)
    for start in range(0, num_requests, REQUESTS):
        request, lowest, highest = levels_of(cu_seqlens_q, lengths, start, num_requests, C)
        here = ((lowest <= level) & (level <= highest)).to(gl.int32)
        place = gl.associative_scan(here, 0, add) + before
        match = (here == 1) & (place == rank + 1)
        found += gl.sum(gl.where(match, request, 0), axis=0)
        lowest_found += gl.sum(gl.where(match, lowest, 0), axis=0)
        before += gl.sum(here, axis=0)
    return found, lowest_found


@gluon.jit
def count_tiles(cu_seqlens_q, lengths, num_requests, C: gl.constexpr):
    """Tiles of all requests, for one head."""
    count = gl.to_tensor(0)
    for start in range(0, num_requests, REQUESTS):
        _, lowest, highest = levels_of(cu_seqlens_q, lengths, start, num_requests, C)
        count += gl.sum(highest - lowest + 1, axis=0)
    return count


@gluon.jit
def position_of(step, program, programs):
    """The number of the tile that a program takes in its step-th turn."""
    return step * programs + gl.where(step % 2 == 1, programs - 1 - program, program)


@gluon.jit
def key_range(row, q_len, k_len, left, right, C: gl.constexpr):
    """(first, full_first, full_end, end): blocks of keys of the tile whose first query is `row`, at least one.

    Some query sees keys of blocks first..end-1; all queries see all keys of blocks full_first..full_end-1.
    """
    own_first = row + k_len - q_len
    own_last = gl.minimum(row + C.tokens, q_len) - 1 + k_len - q_len
    low = gl.to_tensor(0)
    full_low = gl.to_tensor(0)
    high = k_len
    full_high = k_len
    if C.has_left:
        low = gl.maximum(own_first - left, 0)
        full_low = gl.maximum(own_last - left, 0)
    if C.has_right:
        high = gl.minimum(k_len, gl.maximum(own_last + right + 1, 0))
        full_high = gl.minimum(k_len, gl.maximum(own_first + right + 1, 0))
    first = low // C.block_n
    end = gl.maximum((high + C.block_n - 1) // C.block_n, first + 1)
    full_first = gl.minimum((full_low + C.block_n - 1) // C.block_n, end)
    full_end = gl.minimum(gl.maximum(full_high // C.block_n, full_first), end)
    return first, full_first, full_end, end


@gluon.jit
def steps_of(first, full_first, full_end, end):
    """How many blocks follow the last one, from right to left: cut on the right, seen whole, cut on the left."""
    cut_right = gl.maximum(end - 1 - full_end, 0)
    whole = gl.maximum(gl.minimum(full_end, end - 1) - full_first, 0)
    cut_left = end - 1 - first - cut_right - whole
    return cut_right, whole, cut_left


@gluon.jit
def listed_before(before, block, columns, C: gl.constexpr):
    """How many blocks of keys stand before this one in the list of a row of the mask."""
    PER: gl.constexpr = MASK_BLOCK // C.block_n
    count = gl.load(before + gl.minimum(block // PER, columns))
    following = gl.load(before + gl.minimum(block // PER + 1, columns))
    return count * PER + (following - count) * (block % PER)


@gluon.jit
def listed_at(listed, place, there, C: gl.constexpr):
    """The block of keys at this place of a row's list, if there is one."""
    PER: gl.constexpr = MASK_BLOCK // C.block_n
    return gl.load(listed + place // PER, there, other=0) * PER + place % PER


@gluon.jit
def rows_inside(length, start, ROWS: gl.constexpr):
    """How many of the ROWS rows from `start` on lie within a request of this length."""
    return gl.minimum(gl.maximum(length - start, 0), ROWS)


@gluon.jit
def clear(out_ptr, lse_ptr, cu_seqlens_q, num_requests, num_rows, heads, has_lse, out_token, out_head, out_width,
           C: gl.constexpr):  # fmt: skip
    """Zero and -inf for the rows after the last request."""
    column = gl.arange(0, C.dv, layout=gl.BlockedLayout([1], [32], [4], [0]))
    zero = gl.zeros([C.dv], out_ptr.dtype.element_ty, layout=gl.BlockedLayout([1], [32], [4], [0]))
    begin = gl.load(cu_seqlens_q + num_requests)
    for row in range(begin + gl.program_id(0), num_rows, gl.num_programs(0)):
        for head in range(heads):
            at = out_ptr + gl.cast(row, gl.int64) * out_token + head * out_head
            gl.store(at + column, zero, column < out_width)
            gl.store(lse_ptr + gl.cast(row, gl.int64) * heads + head, float("-inf"), has_lse > 0)
