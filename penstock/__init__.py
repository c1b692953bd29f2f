"""Penstock: LLM-inference operators at the limit of the hardware, and a compact serving runtime built from them.

    from penstock.ops import rms_norm            # one operator inside your own engine
    from penstock import LLM, SamplingParams     # the runtime

Importing this package does nothing: no CUDA context, no device query, no patching, no heavy import.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from penstock.serve.llm import LLM
    from penstock.serve.params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]

_HOMES = {"LLM": "penstock.serve.llm", "SamplingParams": "penstock.serve.params"}


def __getattr__(name: str):
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'penstock' has no attribute {name!r}; it has {', '.join(__all__)}")
