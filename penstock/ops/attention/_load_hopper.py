"""The warp that fetches for the others: which tile comes next, its queries, its keys and values, block after block.

Rows outside a request, and keys after its last, are never read: the copies are cut there. A descriptor steps over rows in two
dimensions, so that the first chooses where the second ends; a third takes back what the second begins with, by wrapping around
2^64 (triton.tools.ragged_tma shows how). What is cut off is zero in shared memory, and left alone in global memory.
"""

from torch import Tensor

from penstock.core.gluon import TensorDescriptor, gl, gluon, mbarrier, reinterpret, thread_barrier, tma_load
from penstock.ops.attention import _tiles_hopper as tiles
from penstock.ops.attention._tiles_hopper import Boxes, Tile

# Where the second dimension of rows ends.
END = gl.constexpr(1 << 30)


def rows_descriptor(rows: Tensor, tile: Tile) -> TensorDescriptor:
    """[END, end of the rows, row before it, head, column] of queries or results [T, Hq, D]."""
    columns = 128 // rows.element_size()
    return _descriptor(rows, stride(rows, 0), rows.shape[1], stride(rows, 1), [1, 1, tile.part_tokens, tile.group, columns])


def keys_descriptor(keys: Tensor, tile: Boxes) -> tuple[TensorDescriptor, int]:
    """[END, end of the rows, row before it, page and head, column] of keys or values [P, S, Hkv, D] or [T, Hkv, D].

    Also how many steps of the fourth dimension make a page.
    """
    box = [1, 1, tile.span, 1, tile.columns]
    if keys.dim() == 3:
        return _descriptor(keys, stride(keys, 0), keys.shape[1], stride(keys, 1), box), 0
    heads, head, page = _page_steps(keys)
    return _descriptor(keys, stride(keys, 1), heads, head, box), page


def dealt_descriptor(keys: Tensor, tile: Tile) -> tuple[TensorDescriptor, int]:
    """[page and head, sixteen, four, key of four, column] of keys [P, S, Hkv, D]; also the steps of a page.

    A copy takes two keys of every four, so that of each sixteen keys of a block those that a thread multiplies with values
    next to each other are those whose scores it holds.
    """
    heads, head, page = _page_steps(keys)
    row = stride(keys, 1)
    layout = gl.NVMMASharedLayout(128, tile.bits, rank=5)
    shape, box = [heads, keys.shape[1] // 16, 4, 4, keys.shape[3]], [1, tile.block_n // 16, 4, 2, tile.columns]
    return TensorDescriptor(keys, shape, [head, 16 * row, 4 * row, row, 1], box, layout), page


def turned_descriptor(values: Tensor, tile: Boxes) -> tuple[TensorDescriptor, int]:
    """[page and head, column, slot] of values [P, S, Hkv, Dv] whose slots are next to each other; also the steps of a page."""
    heads, head, page = _page_steps(values)
    layout = gl.NVMMASharedLayout(min(128, tile.block_n * tile.itemsize), tile.bits, rank=3)
    shape, box = [heads, values.shape[3], values.shape[1]], [1, tile.dv, tile.block_n]
    return TensorDescriptor(values, shape, [head, stride(values, 3), 1], box, layout), page


def scales_descriptor(scales: Tensor, tile: Boxes) -> tuple[TensorDescriptor, int]:
    """[page and head, slot] of the scales of keys [P, S, Hkv] whose slots are next to each other; also the steps of a page."""
    heads, head, page = _page_steps(scales)
    layout = gl.NVMMASharedLayout(0, 32, rank=2)
    return TensorDescriptor(scales, [heads, scales.shape[1]], [head, 1], [1, tile.block_n], layout), page


def _page_steps(pages: Tensor) -> tuple[int, int, int]:
    """(steps of a dimension that runs through pages and heads, its stride, how many steps make a page)."""
    count, heads = pages.shape[0], pages.shape[2]
    head = pages.stride(2) if heads > 1 else stride(pages, 0)
    page = pages.stride(0) if count > 1 else heads * head
    return max(count, 1) * page // head, head, page // head


def stride(tensor: Tensor, dim: int) -> int:
    """The stride, or one that a descriptor takes where there is nothing to step over."""
    return tensor.stride(dim) if tensor.shape[dim] > 1 else 16


def _descriptor(tensor: Tensor, row: int, heads: int, head: int, box: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(128, 8 * tensor.element_size(), rank=5)
    shape = [0x7FFF0000, 0x7FFF0000, END.value, heads, tensor.shape[-1]]
    return TensorDescriptor(tensor, shape, [2**34 - row, row, row, head, 1], box, layout)


@gluon.jit
def rows_as_pieces(buffer, COUNT: gl.constexpr, BITS: gl.constexpr, C: gl.constexpr):
    """A buffer of queries or results as the pieces, 128 bytes wide, that single copies move."""
    layout: gl.constexpr = gl.NVMMASharedLayout(128, BITS, rank=5)
    return reinterpret(buffer, buffer.dtype, [COUNT, 1, 1, C.part_tokens, C.group, 1024 // BITS], layout)


@gluon.jit
def _keys_as_pieces(buffer, WIDTH: gl.constexpr, C: gl.constexpr):
    layout: gl.constexpr = gl.NVMMASharedLayout(128, C.bits, rank=5)
    COUNT: gl.constexpr = C.stages * C.parts * WIDTH // C.columns
    if C.kind == "fp8":
        pieces = reinterpret(buffer, buffer.dtype, [2 * C.stages, 1, C.block_n // 16, 4, 2, C.columns], layout)
    else:
        pieces = reinterpret(buffer, buffer.dtype, [COUNT, 1, 1, C.span, 1, C.columns], layout)
    return pieces


@gluon.jit
def _values_as_pieces(buffer, C: gl.constexpr):
    if C.kind == "fp8":
        layout: gl.constexpr = gl.NVMMASharedLayout(C.values_swizzle, 8, rank=3)
        pieces = reinterpret(buffer, buffer.dtype, [C.stages, 1, C.dv, C.block_n], layout)
    else:
        pieces = _keys_as_pieces(buffer, C.dv, C)
    return pieces


@gluon.jit
def filled(full, turn, there, STAGES: gl.constexpr):
    """Waits until what the turn-th use of its stages brings has arrived, if there is one."""
    mbarrier.wait(full.index(turn % STAGES), (turn // STAGES) & 1, pred=there)


@gluon.jit
def emptied(empty, turn, STAGES: gl.constexpr):
    """Waits until all have read what the stage of the turn-th use held; a new barrier says so of the phase before its first."""
    mbarrier.wait(empty.index(turn % STAGES), ((turn // STAGES) & 1) ^ 1)


@gluon.jit
def _post(mail, row, q_len, k_len, q_end, head, walk, C: gl.constexpr):
    """Tells the consumers about a tile; row -1 ends their work. `walk` says which blocks of a mask's list are seen whole."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    index = gl.arange(0, 8, layout=layout)
    note = gl.where(index == 1, q_len, gl.where(index == 0, row, head))
    note = gl.where(index == 2, k_len, gl.where(index == 3, q_end, note))
    if C.has_blocks:
        full_first, full_end, end = walk
        note = gl.where(index == 5, full_first, gl.where(index == 6, full_end, gl.where(index == 7, end, note)))
    mail.store(note)
    thread_barrier()


@gluon.jit
def read(mail):
    """What _post wrote. Every thread loads all of it, so that taking it apart costs nothing."""
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    note = mail.load(layout)
    index = gl.arange(0, 8, layout=layout)
    row = gl.sum(gl.where(index == 0, note, 0), axis=0)
    q_len = gl.sum(gl.where(index == 1, note, 0), axis=0)
    k_len = gl.sum(gl.where(index == 2, note, 0), axis=0)
    q_end = gl.sum(gl.where(index == 3, note, 0), axis=0)
    head = gl.sum(gl.where(index == 4, note, 0), axis=0)
    full_first = gl.sum(gl.where(index == 5, note, 0), axis=0)
    full_end = gl.sum(gl.where(index == 6, note, 0), axis=0)
    end = gl.sum(gl.where(index == 7, note, 0), axis=0)
    return row, q_len, k_len, q_end, head, full_first, full_end, end


@gluon.jit
def _post_block(walked, block):
    """Tells the consumers which block of keys a stage holds."""
    walked.store(gl.full([1], 0, gl.int32, layout=gl.BlockedLayout([1], [32], [1], [0])) + block)
    thread_barrier()


@gluon.jit
def block_held(walked):
    """What _post_block wrote."""
    return gl.sum(walked.load(gl.BlockedLayout([1], [32], [4], [0])), axis=0)


@gluon.jit
def _fetch_queries(desc, pieces, bar, stage, head, begin, length, first, WIDTH: gl.constexpr, FROM: gl.constexpr,
                   C: gl.constexpr):  # fmt: skip
    """Copies WIDTH columns of a tile's queries, starting at column FROM."""
    COUNT: gl.constexpr = WIDTH // C.columns
    for consumer in gl.static_range(C.consumers):
        token = first + consumer * C.part_tokens
        inside = tiles.rows_inside(length, token, C.part_tokens)
        for column in gl.static_range(COUNT):
            piece = pieces.index((stage * C.consumers + consumer) * COUNT + column)
            tma_load(desc, [END, begin + token + inside, END - inside, head * C.group, FROM + column * C.columns], bar, piece)


@gluon.jit
def _fetch_keys(desc, pieces, bar, stage, source, first, WIDTH: gl.constexpr, FROM: gl.constexpr, C: gl.constexpr):
    """Copies WIDTH columns of a block of keys or values, starting at column FROM."""
    table, page_step, head, begin, length, low = source
    COUNT: gl.constexpr = WIDTH // C.columns
    for part in gl.static_range(C.parts):
        key = first + part * C.span
        inside = tiles.rows_inside(length, key, C.span)
        at = head
        row = begin + key + inside
        if C.page_size > 0:
            # A server frees the pages that the window has left behind.
            if C.has_left:
                inside = gl.where(key + C.span <= low, 0, inside)
            at += gl.load(table + key // C.page_size, inside > 0, other=0) * page_step
            row = key % C.page_size + inside
        for column in gl.static_range(COUNT):
            piece = pieces.index((stage * COUNT + column) * C.parts + part)
            tma_load(desc, [END, row, END - inside, at, FROM + column * C.columns], bar, piece)


@gluon.jit
def _place(source, first, C: gl.constexpr):
    """(page and head, slot) of a block that one page holds; where none is needed, a page beyond the last, which reads as 0."""
    table, page_step, head, _, length, low = source
    wanted = first < length
    if C.has_left:
        wanted = wanted & (first + C.block_n > low)
    at = head + gl.load(table + first // C.page_size, wanted, other=0) * page_step
    return gl.where(wanted, at, tiles.ABOVE_ALL), first % C.page_size


@gluon.jit
def produce(args, C: gl.constexpr):
    """Deals out the tiles of this program and fetches for them, until there are none."""
    (descs, buffers, bars, mail, cu_seqlens_q, lengths, table_ptr, table_row, page_steps, num_requests, heads, section,
     kv_group, left, right, blocks) = args  # fmt: skip
    q_desc, k_desc, v_desc, scale_desc = descs
    k_pages, v_pages, scale_pages = page_steps
    q_buf, q_tail, k_buf, k_tail, v_buf, scale_buf, walked = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    SCALE_BYTES: gl.constexpr = C.block_n * 4 if C.token_scales else 0
    KEY_BYTES: gl.constexpr = C.block_n * (C.d + C.tail) * C.itemsize + SCALE_BYTES
    VALUE_BYTES: gl.constexpr = C.block_n * C.dv * C.itemsize
    QUERY_BYTES: gl.constexpr = C.consumers * C.rows * (C.d + C.tail) * C.itemsize
    q_pieces = rows_as_pieces(q_buf, C.q_stages * C.consumers * C.d // C.columns, C.bits, C)
    k_pieces = _keys_as_pieces(k_buf, C.d, C)
    v_pieces = _values_as_pieces(v_buf, C)
    if C.tail > 0:
        q_tail_pieces = rows_as_pieces(q_tail, C.q_stages * C.consumers, C.bits, C)
        k_tail_pieces = _keys_as_pieces(k_tail, C.tail, C)

    section_tiles = tiles.count_tiles(cu_seqlens_q, lengths, num_requests, C) * section
    section_end = gl.to_tensor(0)
    base = gl.to_tensor(0)
    count = gl.to_tensor(0)
    level = gl.to_tensor(-1)
    step = gl.to_tensor(0)
    kc = gl.to_tensor(0)
    vc = gl.to_tensor(0)
    running = gl.to_tensor(1)
    while running > 0:
        position = tiles.position_of(step, gl.program_id(0), gl.num_programs(0))
        if position >= section_end:
            section_end = (position // gl.maximum(section_tiles, 1) + 1) * section_tiles
            base = gl.to_tensor(0)
            level, count = tiles.next_level(cu_seqlens_q, lengths, num_requests, tiles.ABOVE_ALL, C)
        within = position - (section_end - section_tiles)
        pair = within // section
        head = (section_end // gl.maximum(section_tiles, 1) - 1) * section + within - pair * section
        while (level >= 0) & (pair >= base + count):
            base += count
            level, count = tiles.next_level(cu_seqlens_q, lengths, num_requests, level, C)
        q_stage = step % C.q_stages
        if (head >= heads) | (section_tiles == 0):
            emptied(q_empty, step, C.q_stages)
            _post(mail.index(q_stage), -1, 0, 0, 0, 0, (0, 0, 0), C)
            mbarrier.arrive(q_full.index(q_stage), count=2)
            running = gl.to_tensor(0)
        else:
            request, lowest = tiles.request_at(cu_seqlens_q, lengths, num_requests, level, pair - base, C)
            q_begin, q_len, k_begin, k_len = tiles.lengths_at(cu_seqlens_q, lengths, request, True, C)
            row = (level - lowest) * C.tokens
            first, full_first, full_end, end = tiles.key_range(row, q_len, k_len, left, right, C)
            if C.has_blocks:
                listed, before, mask_rows, columns = blocks
                mask_row = (request * heads + head).to(gl.int64) * mask_rows + row // tiles.MASK_BLOCK
                listed += mask_row * columns
                before += mask_row * (columns + 1)
                skipped = tiles.listed_before(before, first, columns, C)
                full_first = tiles.listed_before(before, full_first, columns, C) - skipped
                full_end = tiles.listed_before(before, full_end, columns, C) - skipped
                end = tiles.listed_before(before, end, columns, C) - skipped
                first = gl.to_tensor(0)
                # Where no block is left the consumers are given one, of a request without keys.
                met = end > 0
                k_len = gl.where(met, k_len, 0)
                end = gl.maximum(end, 1)
            low = gl.maximum(row + k_len - q_len - left, 0)
            table = table_ptr + request.to(gl.int64) * table_row
            keys = (table, k_pages, head // kv_group, k_begin, k_len, low)
            values = (table, v_pages, head // kv_group, k_begin, k_len, low)
            scales = (table, scale_pages, head // kv_group, k_begin, k_len, low)
            # Keys run one block ahead of values: their product comes first.
            for block in range(end - first + 1):
                if block < end - first:
                    stage = kc % C.stages
                    emptied(k_empty, kc, C.stages)
                    if C.has_blocks:
                        listed_block = tiles.listed_at(listed, skipped + end - 1 - block, met, C)
                        _post_block(walked.index(stage), listed_block)
                    mbarrier.expect(k_full.index(stage), KEY_BYTES)
                    key = (end - 1 - block) * C.block_n
                    if C.has_blocks:
                        key = listed_block * C.block_n
                    if C.kind == "fp8":
                        page, slot = _place(keys, key, C)
                        for half in gl.static_range(2):
                            at = [page, slot // 16, 0, 2 * half, 0]
                            tma_load(k_desc, at, k_full.index(stage), k_pieces.index(2 * stage + half))
                    else:
                        _fetch_keys(k_desc, k_pieces, k_full.index(stage), stage, keys, key, C.d, 0, C)
                    if C.tail > 0:
                        _fetch_keys(k_desc, k_tail_pieces, k_full.index(stage), stage, keys, key, C.tail, C.d, C)
                    if C.token_scales:
                        page, slot = _place(scales, key, C)
                        tma_load(scale_desc, [page, slot], k_full.index(stage), scale_buf.index(stage))
                    kc += 1
                if block == 0:
                    # After the keys: the memory of the queries may be in use for longer.
                    emptied(q_empty, step, C.q_stages)
                    walk = (full_first, full_end, end)
                    _post(mail.index(q_stage), row, q_len, k_len, q_begin + q_len, head, walk, C)
                    mbarrier.arrive(q_full.index(q_stage), count=1)
                    mbarrier.expect(q_full.index(q_stage), QUERY_BYTES)
                    bar = q_full.index(q_stage)
                    _fetch_queries(q_desc, q_pieces, bar, q_stage, head, q_begin, q_len, row, C.d, 0, C)
                    if C.tail > 0:
                        _fetch_queries(q_desc, q_tail_pieces, bar, q_stage, head, q_begin, q_len, row, C.tail, C.d, C)
                else:
                    stage = vc % C.stages
                    emptied(v_empty, vc, C.stages)
                    mbarrier.expect(v_full.index(stage), VALUE_BYTES)
                    key = (end - block) * C.block_n
                    if C.has_blocks:
                        key = tiles.listed_at(listed, skipped + end - block, met, C) * C.block_n
                    if C.kind == "fp8":
                        page, slot = _place(values, key, C)
                        tma_load(v_desc, [page, 0, slot], v_full.index(stage), v_pieces.index(stage))
                    else:
                        _fetch_keys(v_desc, v_pieces, v_full.index(stage), stage, values, key, C.dv, 0, C)
                    vc += 1
        step += 1
