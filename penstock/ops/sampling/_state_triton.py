"""Slots of what one kernel leaves of a row for the next: arrays [B, FLOATS], [B, INTS] and [B, MASSES]."""

import triton.language as tl

# Records of a row that one pass over its logits decides; their slots come first.
SLOTS = tl.constexpr(4)
# Floats, after the logits of the records: largest logit, scale. For the exact filter: last logit kept, first bounds of the
# candidates (low <= logit < high), the bounds that the gathering pass used.
TOP = tl.constexpr(4)
SCALE = tl.constexpr(5)
CUT = tl.constexpr(6)
LOW = tl.constexpr(7)
HIGH = tl.constexpr(8)
USED_LOW = tl.constexpr(9)
USED_HIGH = tl.constexpr(10)
FLOATS = tl.constexpr(16)
# Integers, after ids and turns of the records: whether the id is still to be decided, whether most tiles are to be read. For
# the exact filter: what the filters are, number of candidates, last id kept at the cut, whether the first bounds are too wide.
PENDING = tl.constexpr(8)
DENSE = tl.constexpr(9)
MODE = tl.constexpr(10)
COUNT = tl.constexpr(11)
CUT_ID = tl.constexpr(12)
WIDE = tl.constexpr(13)
INTS = tl.constexpr(16)
# Masses, after those before the records: what top-p asks for. For the exact filter: what the filters keep; above the
# candidates, from the gathering pass and from the narrowing one.
NEEDED = tl.constexpr(4)
KEPT = tl.constexpr(5)
SURE = tl.constexpr(6)
FIRST_SURE = tl.constexpr(7)
MASSES = tl.constexpr(8)
# Modes: one id is certain; cut by top-k, whose cut is known; not cut; cut by top-p.
CERTAIN = tl.constexpr(0)
COUNTED = tl.constexpr(1)
WHOLE = tl.constexpr(2)
BY_MASS = tl.constexpr(3)
# Parts of wide bounds.
BINS = tl.constexpr(64)
