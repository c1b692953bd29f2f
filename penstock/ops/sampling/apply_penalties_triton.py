"""One pass: a program penalises a block of one row."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _apply_penalties_kernel(
    out_ptr,
    logits_ptr,
    counts_ptr,
    mask_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    repetition,
    presence,
    frequency,
    V,
    out_stride,
    logits_stride,
    counts_stride,
    mask_stride,
    HAS_PROMPT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    if repetition_ptr is not None:
        repetition = tl.load(repetition_ptr + row).to(tl.float32)
    if presence_ptr is not None:
        presence = tl.load(presence_ptr + row).to(tl.float32)
    if frequency_ptr is not None:
        frequency = tl.load(frequency_ptr + row).to(tl.float32)
    logits = tl.load(logits_ptr + row * logits_stride + columns, inside, other=0.0).to(tl.float32)
    counts = tl.load(counts_ptr + row * counts_stride + columns, inside, other=0).to(tl.float32)
    generated = counts > 0
    seen = generated
    if HAS_PROMPT:
        seen = seen | (tl.load(mask_ptr + row * mask_stride + columns, inside, other=0) != 0)
    divided = tl.div_rn(logits, tl.zeros_like(logits) + repetition)
    penalised = tl.where(logits > 0, divided, logits * repetition)
    logits = tl.where(seen, penalised, logits)
    logits = logits - frequency * counts
    logits = logits - tl.where(generated, presence, 0.0)
    tl.store(out_ptr + row * out_stride + columns, logits.to(out_ptr.dtype.element_ty), inside)


def launch(
    out: Tensor,
    logits: Tensor,
    output_counts: Tensor,
    prompt_mask: Tensor | None,
    repetition: Tensor | None,
    presence: Tensor | None,
    frequency: Tensor | None,
    repetition_value: float,
    presence_value: float,
    frequency_value: float,
) -> None:
    """Launches over blocks and rows."""
    B, V = logits.shape
    if logits.numel() == 0:
        return
    _apply_penalties_kernel[(B, triton.cdiv(V, BLOCK))](
        out,
        logits,
        output_counts,
        prompt_mask,
        repetition,
        presence,
        frequency,
        float(repetition_value),
        float(presence_value),
        float(frequency_value),
        V,
        out.stride(0),
        logits.stride(0),
        output_counts.stride(0),
        0 if prompt_mask is None else prompt_mask.stride(0),
        HAS_PROMPT=prompt_mask is not None,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )
