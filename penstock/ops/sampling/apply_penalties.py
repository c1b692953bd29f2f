"""logit (÷ or × repetition if seen) - frequency · count - presence · (count > 0)."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost, nbytes
from penstock.core.check import DENSE, FLOATS, anything
from penstock.core.op import op
from penstock.ops.sampling._options import OPTION, Range, check_rows, rows_of, split

SPEC = {
    "logits": ("B V", FLOATS, DENSE),
    "output_counts": ("B V", (torch.int32, torch.int16, torch.uint8), DENSE),
    "prompt_mask?": ("B V", torch.bool, DENSE),
    "repetition?": ("B", OPTION),
    "presence?": ("B", OPTION),
    "frequency?": ("B", OPTION),
    "out?": ("B V", "logits", DENSE),
    "repetition_value": anything,
    "presence_value": anything,
    "frequency_value": anything,
}
RANGES: dict[str, Range] = {
    "repetition": (lambda x: (x > 0) & (x < math.inf), "a finite number > 0"),
    "presence": (lambda x: abs(x) < math.inf, "a finite number"),
    "frequency": (lambda x: abs(x) < math.inf, "a finite number"),
}


@op(
    "(Tensor(a!) out, Tensor logits, Tensor output_counts, Tensor? prompt_mask, Tensor? repetition, Tensor? presence, "
    "Tensor? frequency, float repetition_value, float presence_value, float frequency_value) -> ()",
    SPEC,
)
def apply_penalties(
    logits: Tensor,
    output_counts: Tensor,
    prompt_mask: Tensor | None,
    *,
    repetition: float | Tensor = 1.0,
    presence: float | Tensor = 0.0,
    frequency: float | Tensor = 0.0,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Lowers the logits of tokens that the prompt or the output already holds.

    First the repetition penalty: the logit of an id in the prompt or the output is divided by it when above zero, multiplied
    otherwise. Then frequency · count and presence · (count > 0) are subtracted, where the count is of the output alone. The
    arithmetic is float32 without fused steps, so that all implementations round alike.

    Args:
        logits: [B, V] float32, bfloat16 or float16; stride 1 along V.
        output_counts: [B, V] int32, int16 or uint8, how often each id was generated.
        prompt_mask: [B, V] bool, the ids of the prompt; None when no row has any.
        repetition: number or [B] float32 above 0; 1 changes nothing.
        presence, frequency: number or [B] float32; 0 changes nothing, negative values encourage.
        out: [B, V] in logits.dtype, may be logits itself.
        impl: "auto", "triton", "cpu" or "reference".
    Returns: [B, V] in logits.dtype.
    Raises: ContractError when shapes, dtypes or scalar options disagree; NotSupported when no implementation takes the call.
    Source: Keskar et al., arXiv:1909.05858 (repetition); the OpenAI API reference (presence, frequency).
    """
    options = {"repetition": repetition, "presence": presence, "frequency": frequency}
    tensors, values = split(apply_penalties, RANGES, options, logits)
    launch = apply_penalties.pick(impl, logits, output_counts, prompt_mask, *tensors, out, *values)
    out = torch.empty_like(logits) if out is None else out
    launch(out, logits, output_counts, prompt_mask, *tensors, *values)
    return out


@apply_penalties.check_values
def _check_values(**arguments: Any) -> None:
    check_rows(apply_penalties, RANGES, arguments)


@apply_penalties.reference
def _reference(
    logits: Tensor,
    output_counts: Tensor,
    prompt_mask: Tensor | None,
    repetition: Tensor | None,
    presence: Tensor | None,
    frequency: Tensor | None,
    repetition_value: float,
    presence_value: float,
    frequency_value: float,
) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    by_repetition = rows_of(repetition, repetition_value, logits).to(wide.dtype)[:, None]
    by_presence = rows_of(presence, presence_value, logits).to(wide.dtype)[:, None]
    by_frequency = rows_of(frequency, frequency_value, logits).to(wide.dtype)[:, None]
    generated = output_counts > 0
    seen = generated if prompt_mask is None else generated | prompt_mask
    penalised = torch.where(wide > 0, wide / by_repetition, wide * by_repetition)
    wide = torch.where(seen, penalised, wide)
    wide = wide - by_frequency * output_counts.to(wide.dtype)
    return (wide - by_presence * generated.to(wide.dtype)).to(logits.dtype)


@apply_penalties.impl("triton", needs=("triton",))
def _triton(out: Tensor, *arguments: Any) -> None:
    from penstock.ops.sampling.apply_penalties_triton import launch

    launch(out, *arguments)


@apply_penalties.impl("cpu", needs=("cpu",))
def _cpu(out: Tensor, *arguments: Any) -> None:
    out.copy_(_reference(*arguments))


@apply_penalties.cost
def _cost(logits: Tensor, output_counts: Tensor, prompt_mask: Tensor | None, **options: object) -> Cost:
    return Cost(bytes=2 * nbytes(logits) + nbytes(output_counts, prompt_mask))


@apply_penalties.cases
def cases() -> Iterable[Case]:
    """Options for all rows and one a row, with and without a prompt."""

    def case(
        name: str,
        B: int,
        V: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        counts: torch.dtype = torch.int32,
        prompt: bool = True,
        bench: bool = False,
        **options: object,
    ) -> Case:
        def build(make: Any) -> dict[str, Any]:
            given = {
                key: make.tensor(option, torch.float32) if isinstance(option, list) else option
                for key, option in options.items()
            }
            return {
                "logits": make.randn(B, V, dtype=dtype, scale=4.0),
                "output_counts": make.integers(-6, 4, B, V).clamp(min=0).to(counts),
                "prompt_mask": make.integers(0, 8, B, V) == 0 if prompt else None,
                **given,
            }

        return Case(name, build, bench)

    rows: dict[str, Any] = {"repetition": [1.0, 1.3, 0.8], "presence": [0.0, 0.5, -1.0], "frequency": [0.0, 0.25, 2.0]}
    yield case("rows_ragged", 3, 1000, **rows)
    yield case("rows_float32_no_prompt", 3, 257, dtype=torch.float32, prompt=False, **rows)
    yield case("scalars_float16_uint8", 4, 4096, dtype=torch.float16, counts=torch.uint8, repetition=1.1, frequency=0.3)
    yield case("int16_one_column", 5, 1, counts=torch.int16, presence=1.5)
    yield case("nothing_padded", 2, 300)
    yield case("empty", 0, 512)
    yield case("decode_64x128k", 64, 131072, dtype=torch.float32, bench=True, repetition=1.1, presence=0.5, frequency=0.5)
    yield case("decode_512x128k", 512, 131072, bench=True, repetition=1.1, presence=0.5, frequency=0.5)
