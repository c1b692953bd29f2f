"""What an engine is built from: every field checked, every reason given at once."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DTYPES = ("auto", "float32", "bfloat16", "float16")
_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)}
_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)}


class InvalidConfig(ValueError):
    """A configuration that no engine can be built from, with all the reasons."""


def parse_bytes(value: int | str) -> int:
    """A number of bytes from 1073741824, "1GiB", "1.5 GB" or "512MiB"; ValueError otherwise."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)\s*", value)
        if match and match[2] in _UNITS and (size := math.floor(float(match[1]) * _UNITS[match[2]])) > 0:
            return size
    raise ValueError(f'a positive number of bytes, or a string such as "2GiB" or "512MiB", got {value!r}')


def resolve_model(name: str | Path) -> Path:
    """The folder of a checkpoint: "demo" is the one that comes with the package, anything else is a path."""
    if str(name) == "demo":
        from penstock.serve.demo import PATH

        path = Path(PATH)
    else:
        path = Path(name).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"model {str(name)!r}: there is no such folder; give a folder with config.json and *.safetensors "
            f'(`hf download ORG/NAME --local-dir FOLDER` makes one), or "demo"'
        )
    if not path.is_dir():
        raise NotADirectoryError(f"model {str(name)!r}: give the folder of the checkpoint, not a file in it")
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"model {str(name)!r}: the folder has no config.json")
    return path


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything that decides how an engine is built.

    Args:
        model: folder of a Hugging Face checkpoint, or "demo".
        tokenizer: folder of the tokenizer; None takes the model's.
        device: "auto" takes the first CUDA device if there is one, else "cpu"; or "cpu", "cuda", "cuda:1".
        dtype: "auto" takes the checkpoint's; or float32, bfloat16, float16.
        max_model_len: prompt and output together; None takes the checkpoint's.
        max_num_seqs: requests computed together.
        max_num_batched_tokens: tokens computed in one step.
        max_prefill_chunk: tokens of one prompt computed in one step; None takes what the step has left.
        kv_cache_memory: bytes, or "2GiB"; None lets the runner measure what is free.
        page_size: tokens in one page of the KV cache, a power of two; None takes 64 on a GPU and 16 on a CPU.
        seed: of the seeds drawn for requests that bring none.
        skip_tokenizer_init: token ids in, token ids out.
        enforce_eager: no CUDA graphs.
        enable_prefix_caching: find the pages of earlier requests again; None does so unless the model has a recurrent state.
    Raises: InvalidConfig listing every field that is wrong.
    """

    model: str | Path
    tokenizer: str | Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_prefill_chunk: int | None = None
    kv_cache_memory: int | str | None = None
    page_size: int | None = None
    seed: int = 0
    skip_tokenizer_init: bool = False
    enforce_eager: bool = False
    enable_prefix_caching: bool | None = None

    def __post_init__(self) -> None:
        reasons = [
            f"`{name}` must be {wanted}, got {getattr(self, name)!r}" for name, wanted, right in self._rules() if not right
        ]
        if self.kv_cache_memory is not None:
            try:
                object.__setattr__(self, "kv_cache_memory", parse_bytes(self.kv_cache_memory))
            except ValueError as error:
                reasons.append(f"`kv_cache_memory` must be {error}")
        if reasons:
            raise InvalidConfig("EngineConfig:\n" + "\n".join(f"  {reason}" for reason in reasons))

    def _rules(self) -> list[tuple[str, str, bool]]:
        seqs = self.max_num_seqs if _is_int(self.max_num_seqs, 1) else 1
        return [
            ("model", "a non-empty string or a Path", isinstance(self.model, (str, Path)) and str(self.model) != ""),
            (
                "tokenizer",
                "None, a string or a Path",
                self.tokenizer is None or isinstance(self.tokenizer, (str, Path)),
            ),
            (
                "device",
                '"auto", "cpu", "cuda" or "cuda:N"',
                isinstance(self.device, str) and re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None,
            ),
            ("dtype", f"one of {', '.join(DTYPES)}", self.dtype in DTYPES),
            ("max_model_len", "None or an integer ≥ 2", self.max_model_len is None or _is_int(self.max_model_len, 2)),
            ("max_num_seqs", "an integer ≥ 1", _is_int(self.max_num_seqs, 1)),
            (
                "max_num_batched_tokens",
                f"an integer ≥ max_num_seqs={seqs}, one token for each running request",
                _is_int(self.max_num_batched_tokens, seqs),
            ),
            (
                "max_prefill_chunk",
                "None or an integer ≥ 1",
                self.max_prefill_chunk is None or _is_int(self.max_prefill_chunk, 1),
            ),
            ("page_size", "None or a power of two", _is_page_size(self.page_size)),
            ("seed", "an integer ≥ 0", _is_int(self.seed, 0)),
            ("skip_tokenizer_init", "True or False", isinstance(self.skip_tokenizer_init, bool)),
            ("enforce_eager", "True or False", isinstance(self.enforce_eager, bool)),
            ("enable_prefix_caching", "None, True or False", self.enable_prefix_caching in (None, True, False)),
        ]

    @property
    def model_path(self) -> Path:
        """The folder of the checkpoint; raises if it is not there."""
        return resolve_model(self.model)

    @property
    def tokenizer_path(self) -> Path:
        """The folder of the tokenizer; the model's unless another was named."""
        return self.model_path if self.tokenizer is None else Path(self.tokenizer).expanduser()

    @property
    def kv_cache_bytes(self) -> int | None:
        """`kv_cache_memory` in bytes, or None to measure."""
        return None if self.kv_cache_memory is None else parse_bytes(self.kv_cache_memory)


def _is_page_size(value: object) -> bool:
    return value is None or (isinstance(value, int) and _is_int(value, 1) and value & (value - 1) == 0)


def _is_int(value: Any, smallest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= smallest


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """The limits that every plan keeps."""

    num_pages: int
    page_size: int  # tokens
    max_model_len: int  # prompt and output together
    max_num_seqs: int  # slots
    max_num_batched_tokens: int  # in one step
    max_prefill_chunk: int | None = None  # tokens of one request in one step; None: whatever the step has left
    watermark: int | None = None  # pages kept free at admission for those already running; None: 1 %, at least 1
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        for name in ("num_pages", "page_size", "max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"SchedulerConfig: `{name}` must be ≥ 1, got {getattr(self, name)}")
        if self.max_model_len < 2:
            raise ValueError(f"SchedulerConfig: `max_model_len` must be ≥ 2, got {self.max_model_len}")
        if self.max_prefill_chunk is not None and self.max_prefill_chunk < 1:
            raise ValueError(f"SchedulerConfig: `max_prefill_chunk` must be ≥ 1, got {self.max_prefill_chunk}")
        if self.watermark is not None and self.watermark < 0:
            raise ValueError(f"SchedulerConfig: `watermark` must be ≥ 0, got {self.watermark}")
        if self.max_num_batched_tokens < self.max_num_seqs:  # every slot must be able to decode in every step
            raise ValueError(
                f"SchedulerConfig: `max_num_batched_tokens` must be ≥ max_num_seqs={self.max_num_seqs}, "
                f"got {self.max_num_batched_tokens}"
            )

    @property
    def max_tokens_in_pool(self) -> int:
        """The longest sequence whose keys and values fit in all pages; its last token is never computed."""
        return self.num_pages * self.page_size + 1
