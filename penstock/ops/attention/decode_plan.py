"""Requests cut into tiles of 64 keys; contiguous ranges of equal work, to within one tile, for a fixed number of programs."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost, Make, nbytes
from penstock.core.check import DENSE, INDICES, count
from penstock.core.device import num_sms
from penstock.core.op import op
from penstock.ops.attention import _options

TILE = 64
# Query rows (heads of one group × q_len) that one program of the decode kernel takes at most.
MAX_ROWS = 64
# Those that one takes at least, where there are more.
FEWEST_ROWS = 32
# A request costs this many tiles more than it has: to find its pages and fill the load pipeline. Programs with many short
# requests would otherwise be the last to finish.
LEAD = 2
# Fewest units of a program: a long request alone is cut into half as many pieces, which are summed one after another.
SHARE = 2
# The decode kernel's registers and shared memory leave room for two programs on a multiprocessor, up to this head dimension;
# a program of MLA fills one.
PROGRAMS_PER_SM = 2
WIDEST_OF_TWO = 256


class DecodePlan(NamedTuple):
    """A schedule of attention_decode; all int32, on the device of the lengths.

    Unit u of the work belongs to the request b with unit_start[b] <= u < unit_start[b+1]. A request's first two units stand for
    the cost of beginning it; each of the others is a tile of 64 keys, the first of them from key 64 · first_tile[b]. Of C
    programs, n = min(C, ⌈units in all / 2⌉) have work; program c takes the units from c · units // n to (c + 1) · units // n.

    Args:
        unit_start: [B+1] units of the requests before b.
        first_tile: [B] tiles at the front that the window hides.
        first_request: [C] the request of each program's first unit; B for a program with no work.
        tickets: zeros, in which a kernel counts the pieces of requests, and which it leaves zero: calls that share a plan must
            follow one another.
    """

    unit_start: Tensor
    first_tile: Tensor
    first_request: Tensor
    tickets: Tensor


def _at_least_one(value: object) -> str | None:
    return None if count(value) is None and value != 0 else "an integer >= 1"


SPEC = {
    "seqlens_k": ("B", INDICES, DENSE),
    "num_heads_q": _at_least_one,
    "num_heads_kv": _at_least_one,
    "head_dim": _at_least_one,
    "page_size": _at_least_one,
    "q_len": _at_least_one,
    "window_left": _options.window_size,
}


@op(
    "(Tensor(a!) out_unit_start, Tensor(b!) out_first_tile, Tensor(c!) out_first_request, Tensor(d!) out_tickets,"
    " Tensor seqlens_k, int num_heads_q, int num_heads_kv, int head_dim, int page_size, int q_len, int window_left) -> ()",
    SPEC,
)
def attention_decode_plan(
    seqlens_k: Tensor,
    *,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    page_size: int,
    q_len: int = 1,
    window: tuple[int, int] = (-1, -1),
    device: torch.device | str | None = None,
    impl: str = "auto",
) -> DecodePlan:
    """Schedules attention_decode: one plan serves every layer of a step whose heads and window are these.

    Computed on the device, without reading it from the host: a CUDA graph that holds the call makes a new plan at each
    replay. A plan made without a window is right for every window, and slower where the window hides much.

    Args:
        seqlens_k: [B] int32, each request's keys; 0 for a padding row.
        num_heads_q: query heads.
        num_heads_kv: KV heads, which divide num_heads_q.
        head_dim: of the keys.
        page_size: slots in a page.
        q_len: tokens of each request.
        window: as in attention_decode.
        device: where to plan; the device of seqlens_k by default.
        impl: "auto", "triton" or "reference".
    Returns: DecodePlan, four int32 tensors; the length of the last two depends on the device and the heads alone.
    Raises: ContractError when arguments disagree; NotSupported when no implementation takes the call.
    Source: uniform tiles dealt out in advance, as in FlashInfer, arXiv:2501.01005, section 3.3.
    """
    left, _ = _options.split_window(attention_decode_plan.contract, window)
    if device is not None:
        seqlens_k = seqlens_k.to(device)
    options = (num_heads_q, num_heads_kv, head_dim, page_size, q_len, left)
    launch = attention_decode_plan.pick(impl, seqlens_k, *options)
    B = seqlens_k.shape[0]
    C = num_programs(seqlens_k.device, num_heads_q, num_heads_kv, head_dim, q_len)
    plan = DecodePlan(
        seqlens_k.new_empty(B + 1),
        seqlens_k.new_empty(B),
        seqlens_k.new_empty(C),
        seqlens_k.new_empty(num_tickets(C, num_heads_q, num_heads_kv, q_len)),
    )
    launch(*plan, seqlens_k, *options)
    return plan


def row_blocks(rows: int) -> int:
    """Blocks of query rows of one KV head."""
    return -(-rows // MAX_ROWS)


def num_programs(device: torch.device, num_heads_q: int, num_heads_kv: int, head_dim: int, q_len: int) -> int:
    """Programs for each KV head and block of query rows, so that all together fill the device once."""
    side = num_heads_kv * row_blocks(num_heads_q // num_heads_kv * q_len)
    per_sm = PROGRAMS_PER_SM if head_dim <= WIDEST_OF_TWO else 1
    return max(1, per_sm * num_sms(device) // side)


def num_tickets(programs: int, num_heads_q: int, num_heads_kv: int, q_len: int) -> int:
    """For each program, KV head and 32 query rows two: a request was begun before the program, another begins in it."""
    return 2 * programs * num_heads_kv * -(-(num_heads_q // num_heads_kv) * q_len // FEWEST_ROWS)


@attention_decode_plan.relation
def _relation(num_heads_q: int, num_heads_kv: int, **others: object) -> tuple[str, str] | None:
    if num_heads_q % num_heads_kv:
        return "num_heads_q", f"must be a multiple of num_heads_kv = {num_heads_kv}, got {num_heads_q}"
    return None


@attention_decode_plan.reference
def _reference(
    seqlens_k: Tensor, num_heads_q: int, num_heads_kv: int, head_dim: int, page_size: int, q_len: int, window_left: int
) -> tuple[Tensor, ...]:
    lengths = seqlens_k.long()
    hidden = (lengths - q_len - window_left).clamp(min=0) if window_left >= 0 else torch.zeros_like(lengths)
    first_tile = hidden // TILE
    tiles = (lengths + TILE - 1) // TILE - first_tile
    unit_end = torch.where(tiles > 0, tiles + LEAD, 0).cumsum(0)
    unit_start = torch.cat([unit_end.new_zeros(1), unit_end])
    total = int(unit_start[-1])
    C = num_programs(seqlens_k.device, num_heads_q, num_heads_kv, head_dim, q_len)
    working = min(C, -(-total // SHARE))
    starts = torch.arange(C, device=seqlens_k.device) * total // max(working, 1)
    first_request = torch.searchsorted(unit_end, starts, right=True)
    first_request[working:] = len(lengths)
    tickets = first_request.new_zeros(num_tickets(C, num_heads_q, num_heads_kv, q_len))
    return unit_start.int(), first_tile.int(), first_request.int(), tickets.int()


@attention_decode_plan.impl("triton", needs=("triton",))
def _triton(
    unit_start: Tensor,
    first_tile: Tensor,
    first_request: Tensor,
    tickets: Tensor,
    seqlens_k: Tensor,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    page_size: int,
    q_len: int,
    window_left: int,
) -> None:
    from penstock.ops.attention.decode_plan_triton import launch

    launch(unit_start, first_tile, first_request, tickets, seqlens_k, q_len, window_left)


@attention_decode_plan.cost
def _cost(seqlens_k: Tensor, **options: object) -> Cost:
    return Cost(bytes=3 * nbytes(seqlens_k))


@attention_decode_plan.cases
def cases() -> Iterable[Case]:
    """Batches of a server, and the awkward ones."""

    def case(name: str, seqlens: list[int], heads: tuple[int, int] = (32, 8), bench: bool = False, **options: object) -> Case:
        def build(make: Make) -> dict[str, object]:
            shape = {"num_heads_q": heads[0], "num_heads_kv": heads[1], "head_dim": 128, "page_size": 64}
            return {"seqlens_k": make.tensor(seqlens), **shape, **options}

        return Case(name, build, bench)

    yield case("ragged", [5, 130, 0, 64, 257, 1], (8, 1))
    yield case("ragged_window", [5, 1300, 0, 64, 2570, 1], (8, 1), window=(100, -1), q_len=2)
    yield case("skewed", [131072] + [4096] * 31, (2, 1))
    yield case("many_requests", [(37 * b) % 300 for b in range(1500)], (4, 2))
    yield case("padded_rows_only", [0] * 5)
    yield case("one_program", [1000, 10], (64, 64), q_len=8)
    yield case("empty", [])
    yield case("1x128k_31x4k", [131072] + [4096] * 31, bench=True)
