"""Carries requests to the scheduler, plans to the runner and tokens to text.

    engine.add_request("a", "The pipe that feeds a turbine is called", SamplingParams(max_tokens=8))
    while engine.has_unfinished():
        for output in engine.step(): ...

Every request accepted ends in exactly one output with `finished`, whatever happens: its end, an abort, an interruption
or a failure of the runner. One thread at a time.
"""

import hashlib
import operator
import random
import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from penstock.serve.config import EngineConfig, SchedulerConfig
from penstock.serve.grammar import Grammar, GrammarCompiler, GrammarError
from penstock.serve.outputs import CompletionOutput, EngineStatistics, FinishReason, Logprob, RequestMetrics, RequestOutput
from penstock.serve.packages import MissingPackage
from penstock.serve.params import SamplingParams
from penstock.serve.plan import StepPlan, StepResult, TokenLogprobs
from penstock.serve.scheduler import Event, FinishedEvent, Scheduler, TokenEvent
from penstock.serve.text import IncrementalDetokenizer, StopScanner, Tokenizer


class InvalidPrompt(ValueError):
    """A prompt that no request can be made of: the reason in one sentence."""


class Runner(Protocol):
    """What computes the plans."""

    @property
    def num_pages(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_token_ids(self) -> Sequence[int]: ...
    def execute(self, plan: StepPlan) -> StepResult:
        """Do all of the plan and answer with one token for each Work that samples."""
        ...


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt checked and turned into tokens; `text` is None when it came as tokens."""

    text: str | None
    token_ids: list[int]
    grammar: Grammar | None = None  # at its beginning


def child_seed(seed: int, index: int) -> int:
    """The seed of completion `index` of a request: its own for the first, one derived from both for the others."""
    if index == 0:
        return seed % 2**63
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class _Completion:
    """One of a request's completions while it grows."""

    def __init__(self, index: int, params: SamplingParams, tokenizer: Tokenizer | None, prompt: EncodedPrompt) -> None:
        self.index = index
        self.grammar = None if prompt.grammar is None else prompt.grammar.copy()
        self.text = ""
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self._params = params
        self._tokenizer = tokenizer
        self._logprobs: list[dict[int, Logprob]] = []
        self._cumulative_logprob = 0.0
        self._detokenizer = None
        if tokenizer is not None and params.detokenize:
            skip = params.skip_special_tokens
            self._detokenizer = IncrementalDetokenizer(tokenizer, prompt.token_ids, skip_special_tokens=skip)
        self._given = 0, 0  # characters and tokens of the increments so far
        self._scanner = StopScanner(params.stop_strings, include=params.include_stop_str_in_output)

    def append(self, event: TokenEvent) -> str | None:
        """Take in a token; the stop string that it completes, if it does."""
        self.token_ids.append(event.token_id)
        if event.logprobs is not None:
            self._logprobs.append(self._readable(event.token_id, event.logprobs))
            self._cumulative_logprob += event.logprobs.sampled_logprob
        if self.grammar is not None and not event.is_stop_token:
            self.grammar.accept(event.token_id)
        hidden = event.is_stop_token and not self._params.include_stop_str_in_output
        if self._detokenizer is None or hidden:
            return None
        text = self._detokenizer.feed(event.token_id)
        if len(self.token_ids) < self._params.min_tokens:
            self.text += text
            return None
        return self._scan(text)

    def end(self, reason: FinishReason, stop_reason: int | str | None) -> None:
        """The last of the text, and why it is the last; a stop string found before has the last word."""
        if self.finish_reason is not None:
            return
        found = self._scan(self._detokenizer.flush()) if self._detokenizer is not None else None
        self.text += self._scanner.flush()
        if found is None:
            self.close(reason, stop_reason)
        else:
            self.close("stop", found)

    def close(self, reason: FinishReason, stop_reason: int | str | None) -> None:
        """End with the text as it is; the first reason given stays."""
        if self.finish_reason is None:
            self.finish_reason, self.stop_reason = reason, stop_reason

    def output(self, *, increment: bool = False) -> CompletionOutput:
        """What there is so far, or what has come since this was last asked."""
        wanted = self._params.logprobs is not None
        text, tokens = self._given if increment else (0, 0)
        self._given = len(self.text), len(self.token_ids)
        return CompletionOutput(
            index=self.index,
            text=self.text[text:],
            token_ids=self.token_ids[tokens:],
            cumulative_logprob=self._cumulative_logprob if wanted else None,
            logprobs=self._logprobs[tokens:] if wanted else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def _scan(self, text: str) -> str | None:
        shown, found = self._scanner.feed(text)
        self.text += shown
        return found

    def _readable(self, sampled: int, logprobs: TokenLogprobs) -> dict[int, Logprob]:
        entries = {sampled: Logprob(logprobs.sampled_logprob, logprobs.sampled_rank, self._token_text(sampled))}
        for rank, (token_id, logprob) in enumerate(zip(logprobs.token_ids, logprobs.logprobs, strict=True), start=1):
            entries.setdefault(token_id, Logprob(logprob, rank, self._token_text(token_id)))
        return entries

    def _token_text(self, token_id: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.token_text(token_id)


class _Group:
    """A request: its prompt and its n completions."""

    def __init__(
        self, request_id: str, prompt: EncodedPrompt, completions: list[_Completion], *, stream: bool, increments: bool
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.stream = stream
        self.increments = increments
        self.completions = completions
        self.metrics = RequestMetrics(arrival_time=time.monotonic())

    @property
    def finished(self) -> bool:
        return all(completion.finish_reason is not None for completion in self.completions)

    def note_token(self) -> None:
        if self.metrics.first_token_time is None:
            self.metrics = replace(self.metrics, first_token_time=time.monotonic())

    def output(self, touched: Container[int] | None = None) -> RequestOutput:
        """Its completions; of increments only those touched, when that is known."""
        if self.finished and self.metrics.finished_time is None:
            self.metrics = replace(self.metrics, finished_time=time.monotonic())
        outputs = [
            completion.output(increment=self.increments)
            for completion in self.completions
            if not self.increments or touched is None or completion.index in touched
        ]
        text, token_ids = self.prompt.text, self.prompt.token_ids
        return RequestOutput(self.request_id, text, token_ids, outputs, self.finished, self.metrics)


class Engine:
    """Requests in, outputs out, one step at a time."""

    def __init__(self, config: EngineConfig, runner: Runner, tokenizer: Tokenizer | None) -> None:
        self.config = config
        self.runner = runner
        self.tokenizer = tokenizer
        self.max_model_len = min(runner.max_model_len, config.max_model_len or runner.max_model_len)
        self.eos_token_ids = tuple(dict.fromkeys([*runner.eos_token_ids, *(tokenizer.eos_token_ids if tokenizer else ())]))
        self.scheduler = Scheduler(
            SchedulerConfig(
                num_pages=runner.num_pages,
                page_size=runner.page_size,
                max_model_len=self.max_model_len,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_prefill_chunk=config.max_prefill_chunk,
            )
        )
        self._seeds = random.Random(config.seed)
        self._groups: dict[str, _Group] = {}
        self._children: dict[str, tuple[_Group, _Completion]] = {}  # the scheduler's names
        self._undelivered: list[RequestOutput] = []
        self._grammar_compiler: GrammarCompiler | None = None
        self._constrained: dict[int, Grammar] = {}  # of the slots whose output follows one

    def encode(self, prompt: Any, params: SamplingParams) -> EncodedPrompt:
        """The prompt in tokens, if a request with these parameters can run.

        Args:
            prompt: text, token ids, {"prompt": text} or {"prompt_token_ids": token ids}.
        Raises: InvalidPrompt with the reason why it cannot.
        """
        text, token_ids = self._tokens(prompt)
        if text == "":
            raise InvalidPrompt("the prompt is empty text; a request needs at least one character")
        for token_id in token_ids:
            if not 0 <= token_id < self.runner.vocab_size:
                raise InvalidPrompt(f"token id {token_id} is not in the vocabulary, 0 … {self.runner.vocab_size - 1}")
        if params.stop_strings and self.tokenizer is None:
            raise InvalidPrompt(f"stop={params.stop_strings!r} is searched for in text, but there is no tokenizer")
        for token_id, _ in params.token_biases:
            if token_id >= self.runner.vocab_size:
                raise InvalidPrompt(f"logit_bias: token id {token_id} is not in the vocabulary of {self.runner.vocab_size}")
        if (params.logprobs or 0) > self.runner.vocab_size:
            raise InvalidPrompt(f"logprobs={params.logprobs} is more than the vocabulary of {self.runner.vocab_size}")
        reason = self.scheduler.why_refused(len(token_ids), params)
        if reason is not None:
            raise InvalidPrompt(reason)
        return EncodedPrompt(text, token_ids, None if params.grammar is None else self._compile(params.grammar))

    def _compile(self, grammar: str) -> Grammar:
        if self.tokenizer is None:
            raise InvalidPrompt("a grammar is one of text, but there is no tokenizer")
        try:
            if self._grammar_compiler is None:
                self._grammar_compiler = GrammarCompiler(self.tokenizer, self.runner.vocab_size, self.eos_token_ids)
            return self._grammar_compiler.compile(grammar)
        except (GrammarError, MissingPackage) as error:
            raise InvalidPrompt(str(error)) from error

    def add_request(
        self,
        request_id: str,
        prompt: Any,
        params: SamplingParams | None = None,
        *,
        stream: bool = True,
        increments: bool = False,
    ) -> None:
        """Accept a request, or raise and leave everything as it was.

        Args:
            prompt: as for `encode`, or what it returned for the same parameters.
            stream: give an output after every token, not only at the end; each holds all there is so far.
            increments: each holds only what is new, and of n completions only those that have something new.
        Raises: InvalidPrompt with the reason.
        """
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise InvalidPrompt(f"request {request_id!r}: params must be SamplingParams, got {type(params).__name__}")
        if request_id in self._groups:
            raise InvalidPrompt(f"request {request_id!r} is already here")
        encoded = prompt if isinstance(prompt, EncodedPrompt) else self.encode(prompt, params)
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        completions = [_Completion(index, params, self.tokenizer, encoded) for index in range(params.n)]
        group = _Group(request_id, encoded, completions, stream=stream, increments=increments)
        self._groups[request_id] = group
        for completion in completions:
            name = f"{request_id}/{completion.index}"
            self._children[name] = group, completion
            self.scheduler.add(name, encoded.token_ids, params, child_seed(seed, completion.index), self.eos_token_ids)

    def abort(self, request_id: str) -> bool:
        """End a request; its last output comes with the next step. False if it is not here (any more)."""
        group = self._groups.get(request_id)
        if group is None:
            return False
        aborted = [self.scheduler.abort(f"{request_id}/{completion.index}") for completion in group.completions]
        return any(aborted)

    def abort_all(self, reason: FinishReason = "abort") -> None:
        """End every request and take back every page, also after an interruption in the middle of a step."""
        self.scheduler.reset()
        for group in self._groups.values():
            for completion in group.completions:
                completion.close(reason, None)
            self._undelivered.append(group.output())
        self._groups.clear()
        self._children.clear()
        self._constrained.clear()

    def has_unfinished(self) -> bool:
        """Whether a step would give anything."""
        return bool(self._groups or self._undelivered)

    def statistics(self) -> EngineStatistics:
        """What was done since the engine was made, and how things are now."""
        return self.scheduler.statistics()

    def step(self) -> list[RequestOutput]:
        """Compute one step; the outputs of the requests that got further.

        When the runner fails, or at Ctrl-C, every request is ended, its last output comes with the next step, and the
        exception goes on to the caller. The engine can be used again.
        """
        if self._undelivered:
            outputs, self._undelivered = self._undelivered, []
            return outputs
        try:
            plan = self.scheduler.step()
            if plan is None:
                return self._take(self.scheduler.drain())
            self._constrain(plan)
            return self._take(self.scheduler.commit(self.runner.execute(plan)))
        except BaseException as error:
            self.abort_all("error" if isinstance(error, Exception) else "abort")
            raise

    def _constrain(self, plan: StepPlan) -> None:
        """Masks for the outputs that follow a grammar."""
        for slot in plan.freed:
            self._constrained.pop(slot, None)
        for new in plan.new:
            completion = self._children[new.request_id][1]
            if completion.grammar is not None:
                self._constrained[new.slot] = completion.grammar
        if not self._constrained:
            return
        for work in (*plan.decodes, *plan.prefills):
            grammar = self._constrained.get(work.slot)
            if grammar is not None and work.sample:
                plan.masks[work.slot] = grammar.masks()

    def _take(self, events: list[Event]) -> list[RequestOutput]:
        """Give events to their completions; the outputs of the requests they belong to."""
        touched: dict[str, _Group] = {}
        which: dict[str, set[int]] = {}
        while events:
            for event in events:
                group, completion = self._children[event.request_id]
                touched[group.request_id] = group
                which.setdefault(group.request_id, set()).add(completion.index)
                if isinstance(event, FinishedEvent):
                    completion.end(event.reason, event.stop_reason)
                    continue
                group.note_token()
                if (found := completion.append(event)) is not None:
                    completion.close("stop", found)
                    self.scheduler.finish(event.request_id, "stop", found)
                elif completion.grammar is not None and completion.grammar.finished:
                    self.scheduler.finish(event.request_id, "error" if completion.grammar.fault else "stop")
            events = self.scheduler.drain()
        outputs = [group.output(which[name]) for name, group in touched.items() if group.stream or group.finished]
        for group in touched.values():
            if group.finished:
                del self._groups[group.request_id]
                for completion in group.completions:
                    del self._children[f"{group.request_id}/{completion.index}"]
        return outputs

    def _tokens(self, prompt: Any) -> tuple[str | None, list[int]]:
        """(text, token ids) of a prompt in any of its forms."""
        if isinstance(prompt, Mapping):
            text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
            if text is None and token_ids is None:
                raise InvalidPrompt(f'a dict must have "prompt" or "prompt_token_ids", got {sorted(map(str, prompt))}')
            if text is not None and not isinstance(text, str):
                raise InvalidPrompt(f'"prompt" must be a string, got {type(text).__name__}')
        else:
            text, token_ids = (prompt, None) if isinstance(prompt, str) else (None, prompt)
        if text is not None and token_ids is None:
            return text, self._encode_text(text)
        if not isinstance(token_ids, (list, tuple)):
            wanted = "a string, a list of token ids, or a dict with one of them"
            raise InvalidPrompt(f"a prompt must be {wanted}, got {type(token_ids).__name__}")
        if any(isinstance(token_id, bool) or not hasattr(token_id, "__index__") for token_id in token_ids):
            raise InvalidPrompt("a list of token ids must hold integers only")
        return text, [operator.index(token_id) for token_id in token_ids]

    def _encode_text(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise InvalidPrompt("the prompt is text, but there is no tokenizer; give prompt_token_ids")
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise InvalidPrompt("the prompt holds a lone surrogate, which is no Unicode text")
        return self.tokenizer.encode(text)
