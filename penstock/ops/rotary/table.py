"""cos_sin[p] = factor · [cos(p · f), sin(p · f)] for the model's frequencies f."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from penstock.ops.rotary.scaling import RopeConfig, frequencies, read_config


def rope_table(
    config: Any = None,
    *,
    max_position: int | None = None,
    head_dim: int | None = None,
    layer_type: str | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> Tensor:
    """The table of cosines and sines that `rope` reads.

        rope_table(RopeConfig(rotary_dim=128, max_position=8192, theta=500000.0))
        rope_table(rotary_dim=128, max_position=8192, theta=500000.0)
        rope_table(AutoConfig.from_pretrained(model), max_position=16384)
        rope_table({"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}, head_dim=128, max_position=8192)

    Angles are computed in float32, as models are trained with, so that the table equals transformers' bit for bit.

    Dynamic NTK depends on the current length; a table has one length. Up to the original context the table is exact: what
    transformers computes for any such sequence. A longer table is what transformers computes when the sequence is
    `max_position` long. LongRoPE likewise takes its long divisors when max_position passes the original context.

    Args:
        config: a RopeConfig, a Hugging Face config, or its rope_parameters or rope_scaling dictionary; None when the fields
            of RopeConfig are given by keyword.
        max_position: rows; default: what the config states.
        head_dim: D, where the config does not state it.
        layer_type: which of several parameter sets ("full_attention", "sliding_attention"), where the config nests them.
        device: of the table.
        options: fields of RopeConfig, when config is None.
    Returns: [max_position, R] float32: R/2 cosines, then R/2 sines.
    Raises: ValueError when a needed fact is missing; NotSupported for an unknown scaling.
    Source: Su et al., arXiv:2104.09864; Chen et al., arXiv:2306.15595 (linear); Peng et al., arXiv:2309.00071 (YaRN, NTK);
        Ding et al., arXiv:2402.13753 (LongRoPE); Llama 3.1's published scaling rule.
    """
    if config is None:
        if max_position is None:
            raise ValueError("rope_table: `max_position` must be given")
        facts = RopeConfig(max_position=max_position, **options)
    elif options:
        raise ValueError(f"rope_table: {', '.join(options)} cannot be combined with a config")
    elif not isinstance(config, RopeConfig):
        facts = read_config(config, max_position=max_position, head_dim=head_dim, layer_type=layer_type)
    elif max_position is not None:
        facts = replace(config, max_position=max_position, original_max_position=config.original)
    else:
        facts = config
    values, factor = frequencies(facts)
    angles = torch.arange(facts.max_position, dtype=torch.float32)[:, None] * values
    table = torch.cat((angles.cos(), angles.sin()), 1)
    return (table * factor if factor != 1.0 else table).to(device or "cpu")
