"""What an engine is built from: every field checked, every reason given at once."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
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
class SpeculativeConfig:
    """Guess the next tokens cheaply, compute them together, keep those that are right.

    Args:
        method: "ngram" looks up how the last tokens went on when they came before; "draft" asks a smaller model.
        num_tokens: guesses in one step at most.
        model: the folder of the smaller model, which must have the same tokenizer.
        min_ngram, max_ngram: how many of the last tokens must have come before; the longest match counts.
        verification: "match" keeps the guesses that the model itself draws, so that the output is what it would be without
            speculation; "rejection" keeps more of them when the temperature is not 0, with the same distribution.
        kv_cache_memory: of the smaller model, as in EngineConfig.
    Raises: InvalidConfig listing every field that is wrong.
    """

    method: str
    num_tokens: int = 4
    model: str | Path | None = None
    min_ngram: int = 2
    max_ngram: int = 4
    verification: str = "match"
    kv_cache_memory: int | str = "1GiB"

    def __post_init__(self) -> None:
        wanted = "a folder" if self.method == "draft" else 'None unless method="draft"'
        rules = [
            ("method", '"ngram" or "draft"', self.method in ("ngram", "draft")),
            ("num_tokens", "an integer from 1 to 64", _is_int(self.num_tokens, 1) and self.num_tokens <= 64),
            ("model", wanted, isinstance(self.model, (str, Path)) if self.method == "draft" else self.model is None),
            ("min_ngram", "an integer ≥ 1", _is_int(self.min_ngram, 1)),
            ("max_ngram", f"an integer ≥ min_ngram={self.min_ngram}", _is_int(self.max_ngram, self.min_ngram or 1)),
            ("verification", '"match" or "rejection"', self.verification in ("match", "rejection")),
        ]
        reasons = [f"`{name}` must be {wanted}, got {getattr(self, name)!r}" for name, wanted, right in rules if not right]
        try:
            object.__setattr__(self, "kv_cache_memory", parse_bytes(self.kv_cache_memory))
        except ValueError as error:
            reasons.append(f"`kv_cache_memory` must be {error}")
        if reasons:
            raise InvalidConfig("speculative:\n" + "\n".join(f"  {reason}" for reason in reasons))

    @classmethod
    def of(cls, options: "Mapping[str, Any] | SpeculativeConfig") -> "SpeculativeConfig":
        """From {"method": …, …}."""
        if isinstance(options, cls):
            return options
        names = [field.name for field in fields(cls)]
        if not isinstance(options, Mapping) or "method" not in options or not set(options) <= set(names):
            raise InvalidConfig(f'speculative must be a dict with "method" and any of {", ".join(names[1:])}, got {options!r}')
        return cls(**options)


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
        speculative: None, or the fields of SpeculativeConfig, such as {"method": "ngram", "num_tokens": 4}.
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
    speculative: Mapping[str, Any] | SpeculativeConfig | None = None

    def __post_init__(self) -> None:
        reasons = [
            f"`{name}` must be {wanted}, got {getattr(self, name)!r}" for name, wanted, right in self._rules() if not right
        ]
        if self.kv_cache_memory is not None:
            try:
                object.__setattr__(self, "kv_cache_memory", parse_bytes(self.kv_cache_memory))
            except ValueError as error:
                reasons.append(f"`kv_cache_memory` must be {error}")
        if self.speculative is not None:
            try:
                object.__setattr__(self, "speculative", SpeculativeConfig.of(self.speculative))
            except InvalidConfig as error:
                reasons += str(error).splitlines()
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
    def speculation(self) -> SpeculativeConfig | None:
        """`speculative` as it was checked, typed as what it is."""
        assert self.speculative is None or isinstance(self.speculative, SpeculativeConfig)
        return self.speculative

    @property
    def num_draft_tokens(self) -> int:
        """Guesses in one step at most; 0 without speculation."""
        return 0 if self.speculation is None else self.speculation.num_tokens

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
