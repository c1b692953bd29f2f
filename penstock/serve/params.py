"""How one request is sampled and when it ends; the names are vLLM's."""

import math
from collections.abc import ItemsView, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


class InvalidParameter(ValueError):
    """A sampling parameter has a value that no request can use."""


def _refuse(name: str, wanted: str, got: Any) -> InvalidParameter:
    return InvalidParameter(f"SamplingParams: `{name}` must be {wanted}, got {got!r}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_token(value: Any) -> bool:
    return _is_int(value) and value >= 0


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Parameters of one request, checked and normalised on construction.

    Args:
        n: completions to make for the prompt.
        temperature: 0 takes the most likely token; larger is more random.
        top_k: sample from the k most likely tokens; 0 or -1 keeps all.
        top_p: sample from the smallest set of tokens with this much probability; 1 keeps all.
        min_p: drop tokens less likely than this fraction of the most likely one.
        repetition_penalty: > 1 makes tokens of the prompt and the output less likely.
        presence_penalty: subtracted from the logit of each token already in the output.
        frequency_penalty: subtracted once per occurrence in the output.
        logit_bias: {token id: what to add to its logit}.
        seed: the same seed gives the same tokens, whatever else is in the batch.
        stop: a string, or several, that end the output.
        stop_token_ids: tokens that end the output.
        max_tokens: tokens to make at most; None goes on up to the model's length.
        min_tokens: tokens to make before anything but a length limit may end the output.
        ignore_eos: go on after the model's end token.
        logprobs: number of most likely tokens to report per position; 0 reports the sampled one alone.
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: keep the stop string or stop token in the text.
        detokenize: make text; without it outputs hold token ids only.
        grammar: the output follows it; made by a function of penstock.serve.grammar, such as json_schema.
    Raises: InvalidParameter naming the field, what it must be and what it was.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | Iterable[tuple[int, float]] | None = ()
    seed: int | None = None
    stop: str | Iterable[str] | None = ()
    stop_token_ids: Iterable[int] | None = ()
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    detokenize: bool = True
    grammar: str | None = None

    def __post_init__(self) -> None:
        self._integer("n", 1)
        self._number("temperature", "a number ≥ 0", 0.0, math.inf)
        if self.top_k == -1 and _is_int(self.top_k):
            self._set("top_k", 0)
        self._integer("top_k", 0, wanted="an integer ≥ 1, or 0 or -1 for no limit")
        if not _is_finite_number(self.top_p) or not 0 < self.top_p <= 1:
            raise _refuse("top_p", "a number in (0, 1]", self.top_p)
        self._number("min_p", "a number in [0, 1]", 0.0, 1.0)
        if not _is_finite_number(self.repetition_penalty) or self.repetition_penalty <= 0:
            raise _refuse("repetition_penalty", "a number > 0", self.repetition_penalty)
        self._number("presence_penalty", "a number in [-2, 2]", -2.0, 2.0)
        self._number("frequency_penalty", "a number in [-2, 2]", -2.0, 2.0)
        if self.seed is not None and not (_is_int(self.seed) and -(2**63) <= self.seed < 2**63):
            raise _refuse("seed", "None or a 64-bit integer", self.seed)
        if self.max_tokens is not None:
            self._integer("max_tokens", 1, wanted="None or an integer ≥ 1")
        self._integer("min_tokens", 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _refuse("min_tokens", f"at most max_tokens={self.max_tokens}", self.min_tokens)
        if self.logprobs is not None:
            self._integer("logprobs", 0, wanted="None or an integer ≥ 0")
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "detokenize"):
            if not isinstance(getattr(self, name), bool):
                raise _refuse(name, "True or False", getattr(self, name))
        self._set("logit_bias", self._biases())
        self._set("stop", self._stop_strings())
        self._set("stop_token_ids", self._stop_tokens())
        if self.stop and not self.detokenize:
            raise _refuse("detokenize", f"True, because stop={self.stop!r} is searched for in the text", False)
        if self.grammar is not None:
            self._check_grammar()

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as normalised, typed as the tuple they are."""
        assert isinstance(self.stop, tuple)
        return self.stop

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The stop token ids as normalised, typed as the tuple they are."""
        assert isinstance(self.stop_token_ids, tuple)
        return self.stop_token_ids

    @property
    def token_biases(self) -> tuple[tuple[int, float], ...]:
        """The logit biases as normalised, typed as the tuple they are."""
        assert isinstance(self.logit_bias, tuple)
        return self.logit_bias

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _integer(self, name: str, smallest: int, *, wanted: str | None = None) -> None:
        value = getattr(self, name)
        if not _is_int(value) or value < smallest:
            raise _refuse(name, wanted or f"an integer ≥ {smallest}", value)

    def _number(self, name: str, wanted: str, smallest: float, largest: float) -> None:
        value = getattr(self, name)
        if not _is_finite_number(value) or not smallest <= value <= largest:
            raise _refuse(name, wanted, value)

    def _biases(self) -> tuple[tuple[int, float], ...]:
        wanted = "None or a mapping of token ids to finite numbers"
        if self.logit_bias is None:
            return ()
        pairs = self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else self.logit_bias
        for pair in pairs if isinstance(pairs, (tuple, ItemsView)) else [None]:
            if not (isinstance(pair, tuple) and len(pair) == 2 and _is_token(pair[0]) and _is_finite_number(pair[1])):
                raise _refuse("logit_bias", wanted, self.logit_bias)
        return tuple(pairs)

    def _check_grammar(self) -> None:
        if not isinstance(self.grammar, str) or not self.grammar:
            raise _refuse("grammar", "None or a non-empty string", self.grammar)
        if self.ignore_eos:
            raise _refuse("ignore_eos", "False with a grammar, which says where the output ends", True)
        if self.min_tokens:
            raise _refuse("min_tokens", "0 with a grammar, which says where the output ends", self.min_tokens)

    def _stop_strings(self) -> tuple[str, ...]:
        wanted = "None, a non-empty string or a list of non-empty strings"
        if self.stop is None:
            return ()
        if isinstance(self.stop, str):
            strings: tuple[Any, ...] = (self.stop,)
        elif isinstance(self.stop, (list, tuple)):
            strings = tuple(self.stop)
        else:
            raise _refuse("stop", wanted, self.stop)
        if not all(isinstance(text, str) and text for text in strings):
            raise _refuse("stop", wanted, self.stop)
        return strings

    def _stop_tokens(self) -> tuple[int, ...]:
        if self.stop_token_ids is None:
            return ()
        if not isinstance(self.stop_token_ids, (list, tuple)) or not all(
            _is_token(token_id) for token_id in self.stop_token_ids
        ):
            raise _refuse("stop_token_ids", "None or a list of integers ≥ 0", self.stop_token_ids)
        return tuple(self.stop_token_ids)
