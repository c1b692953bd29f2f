"""Every environment variable Penstock reads: name, allowed values, default, one sentence. A bad value raises."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Variable:
    """One environment variable whose value is one of a few words; without choices it is any text, and a secret."""

    name: str
    choices: tuple[str, ...]
    default: str
    meaning: str

    def read(self) -> str:
        """The value in force; raises ValueError when it is not one of the choices."""
        value = os.environ.get(self.name, self.default)
        if self.choices and value not in self.choices:
            wanted = " or ".join(repr(choice) for choice in self.choices)
            raise ValueError(f"environment variable {self.name} must be {wanted}, got {value!r}")
        return value


CHECK = Variable(
    "PENSTOCK_CHECK",
    ("static", "values"),
    "static",
    "'values' also checks what tensors hold (index ranges, offsets); it reads device data and is slow.",
)
API_KEY = Variable("PENSTOCK_API_KEY", (), "", "What clients of `penstock serve` must send; empty asks for nothing.")
HPC = Variable(
    "PENSTOCK_HPC",
    ("0", "1"),
    "0",
    "'1' makes our operators the module `hpc` in worker processes of vLLM and SGLang, in place of hpc-ops.",
)
VLLM = Variable("PENSTOCK_VLLM", ("0", "1"), "0", "'1' gives vLLM our attention, norms and activations.")
SGLANG = Variable("PENSTOCK_SGLANG", ("0", "1"), "0", "'1' gives SGLang our attention backend.")
VARIABLES = (CHECK, API_KEY, HPC, VLLM, SGLANG)
