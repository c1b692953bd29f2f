"""What one step computes besides its token ids."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class Batch:
    """Decode rows first, then prefill rows: T tokens and B requests, of which num_decodes are decodes of q_len tokens each."""

    positions: Tensor  # [T] int32
    slots: Tensor  # [T] int32, where each token's key and value go; negative: nowhere
    page_table: Tensor  # [B, maxpages] int32
    seqlens_k: Tensor  # [B] int32, the new tokens included
    num_decodes: int
    cu_seqlens_q: Tensor | None = None  # [B - num_decodes + 1] int32, of the prefill rows; None without any
    max_seqlen_q: int = 1
    decode_plan: tuple[Tensor, ...] | None = None
    state_slots: Tensor | None = None  # [B] int32, of the requests' recurrent states; negative: nowhere
    q_len: int = 1  # more than 1 only without prefill rows
