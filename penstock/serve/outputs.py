"""What a request gives back; the names are vLLM's."""

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """The log-probability of one token at one position, and its rank among all (1 is the most likely)."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One completion of a prompt, as far as it has come."""

    index: int  # which of the request's n completions
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None  # of the sampled tokens; None unless params.logprobs asks
    logprobs: list[dict[int, Logprob]] | None  # per output token: the sampled one first, then the most likely
    finish_reason: FinishReason | None = None  # None while running
    stop_reason: int | str | None = None  # the stop string or stop token that ended it; None for the end token

    @property
    def finished(self) -> bool:
        """Whether this completion has ended."""
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """When things happened, in seconds of `time.monotonic()`."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A request and its completions; `finished` when every one of them has ended."""

    request_id: str
    prompt: str | None  # None when the request came as token ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """An engine at one moment, and what it has done since it was built."""

    num_running: int
    num_waiting: int
    num_pages: int
    num_free_pages: int  # held by no request
    num_preemptions: int
    prompt_tokens: int  # of the requests that were admitted, once for each completion
    output_tokens: int
