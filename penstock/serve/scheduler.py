"""Which tokens of which requests the next step computes; pages, slots, preemption and the end of requests.

Requests live in one first-come order, cut in two: `running` holds the older ones, each with a slot and pages,
`waiting` the younger ones. Admission moves the cut right, preemption moves it left; nothing ever overtakes. The oldest
request can take pages from all others and `add` refuses what would not fit alone, so every step makes progress.

Nothing here knows tensors, time or chance: the plans depend on the calls alone.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock.serve.config import SchedulerConfig
from penstock.serve.outputs import EngineStatistics, FinishReason
from penstock.serve.pages import PageAllocator
from penstock.serve.params import SamplingParams
from penstock.serve.plan import SlotInit, StepPlan, StepResult, TokenLogprobs, Work


class RequestRefused(ValueError):
    """A request that can never run: the reason in one sentence."""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """A request got one more token."""

    request_id: str
    token_id: int
    logprobs: TokenLogprobs | None
    is_stop_token: bool  # the token ended the request: the end token or one of stop_token_ids


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """A request ended; the last event with its name."""

    request_id: str
    reason: FinishReason
    stop_reason: int | str | None


Event = TokenEvent | FinishedEvent


@dataclass(slots=True, eq=False)
class _Request:
    request_id: str
    arrival: int
    tokens: list[int]  # prompt and output
    num_prompt: int
    params: SamplingParams
    seed: int
    eos_token_ids: tuple[int, ...]
    max_output: int
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    was_preempted: bool = False

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def remaining(self) -> int:
        return len(self.tokens) - self.num_computed


class Scheduler:
    """Continuous batching over a paged pool: `add` and `abort` at any time, then `step` and `commit` in turn."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.num_preemptions = 0
        self._prompt_tokens = self._output_tokens = 0
        self._arrivals = 0
        self.reset()

    def reset(self) -> None:
        """Drop every request and take back every page and slot, without events.

        It asks nothing of the state it replaces, so it is safe after an interruption at any line.
        """
        config = self.config
        self._pages = PageAllocator(config.num_pages)
        self._watermark = max(1, config.num_pages // 100) if config.watermark is None else config.watermark
        self._free_slots = deque(range(config.max_num_seqs))
        self._freed = list(range(config.max_num_seqs)) if self._arrivals else []
        self._requests: dict[str, _Request] = {}
        self._running: list[_Request] = []
        self._waiting: OrderedDict[str, _Request] = OrderedDict()
        self._in_flight: list[tuple[_Request, Work]] | None = None
        self._events: list[Event] = []

    # Requests come and go

    def why_refused(self, num_prompt: int, params: SamplingParams) -> str | None:
        """The reason why a prompt of this length can never run, or None."""
        config = self.config
        if num_prompt == 0:
            return "the prompt is empty; a request needs at least one token"
        if num_prompt >= config.max_model_len:
            return (
                f"the prompt has {num_prompt} tokens; max_model_len={config.max_model_len} "
                f"takes at most {config.max_model_len - 1} and one token of output"
            )
        total = min(num_prompt + (params.max_tokens or 1), config.max_model_len)
        if total > config.max_tokens_in_pool:
            return (
                f"the prompt of {num_prompt} tokens may grow to {total}; the KV cache holds "
                f"{config.max_tokens_in_pool} ({config.num_pages} pages of {config.page_size})"
            )
        return None

    def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        seed: int,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        """Put a request at the end of the waiting queue, or raise RequestRefused if it can never run."""
        if request_id in self._requests:
            raise RequestRefused(f"request {request_id!r} is already here")
        reason = self.why_refused(len(prompt_token_ids), params)
        if reason is not None:
            raise RequestRefused(f"request {request_id!r}: {reason}")
        longest = min(self.config.max_model_len, self.config.max_tokens_in_pool) - len(prompt_token_ids)
        request = _Request(
            request_id=request_id,
            arrival=self._arrivals,
            tokens=list(prompt_token_ids),
            num_prompt=len(prompt_token_ids),
            params=params,
            seed=seed,
            eos_token_ids=tuple(eos_token_ids),
            max_output=longest if params.max_tokens is None else min(longest, params.max_tokens),
        )
        self._arrivals += 1
        self._requests[request_id] = request
        self._waiting[request_id] = request

    def abort(self, request_id: str) -> bool:
        """End a request wherever it is; False if it is not here (any more)."""
        return self.finish(request_id, "abort")

    def finish(self, request_id: str, reason: FinishReason, stop_reason: int | str | None = None) -> bool:
        """End a request for a reason found outside, such as a stop string; False if it is not here (any more)."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        if request.slot >= 0:
            self._running.remove(request)
            self._release(request)
        else:
            del self._waiting[request_id]
        self._events.append(FinishedEvent(request_id, reason, stop_reason))
        return True

    # One step

    def step(self) -> StepPlan | None:
        """Plan the next step; None when no request is left to compute."""
        if self._in_flight is not None:
            raise RuntimeError("Scheduler.step: the last plan was not committed")
        if not self._requests:
            return None
        new: list[SlotInit] = []
        decodes: list[Work] = []
        prefills: list[Work] = []
        in_flight: list[tuple[_Request, Work]] = []
        budget = self.config.max_num_batched_tokens - sum(request.remaining == 1 for request in self._running)

        index = 0
        while index < len(self._running):  # a preemption shortens the list behind `index`
            request = self._running[index]
            index += 1
            decode = request.remaining == 1
            count = self._make_room(request, 1 if decode else self._chunk(request, budget))
            if count == 0:
                continue
            work = self._work(request, count)
            in_flight.append((request, work))
            if decode:
                decodes.append(work)
            else:
                prefills.append(work)
                budget -= count

        while self._waiting:
            request = next(iter(self._waiting.values()))
            count = self._chunk(request, budget)
            if count == 0 or not self._free_slots or not self._has_room(request, count):
                break
            del self._waiting[request.request_id]
            self._running.append(request)
            request.slot = self._free_slots.popleft()
            new.append(self._slot_init(request))
            if not request.was_preempted:
                self._prompt_tokens += request.num_prompt
            work = self._work(request, count)
            in_flight.append((request, work))
            prefills.append(work)
            budget -= count

        if not in_flight:
            raise RuntimeError(f"Scheduler.step: no progress with {len(self._requests)} requests unfinished")
        self._in_flight = in_flight
        freed, self._freed = self._freed, []
        return StepPlan(new, decodes, prefills, freed)

    def commit(self, result: StepResult) -> list[Event]:
        """Take in what the runner computed; the events since the last commit, in order.

        Results for requests that ended between step and commit are ignored.
        """
        if self._in_flight is None:
            raise RuntimeError("Scheduler.commit: no plan is in flight")
        live = [(request, work) for request, work in self._in_flight if self._is_here(request)]
        missing = [work.slot for _, work in live if work.sample and work.slot not in result.token_ids]
        if missing:
            raise ValueError(f"Scheduler.commit: the result has no token for slots {missing}")
        self._in_flight = None
        for request, work in live:
            request.num_computed += len(work.token_ids)
            if work.sample:
                self._append(request, result.token_ids[work.slot], result.logprobs.get(work.slot))
        return self.drain()

    def drain(self) -> list[Event]:
        """The events since the last call: what abort and finish left while no step was committed."""
        events, self._events = self._events, []
        return events

    # Inside a step

    def _chunk(self, request: _Request, budget: int) -> int:
        return min(request.remaining, budget, self.config.max_prefill_chunk or budget)

    def _make_room(self, request: _Request, count: int) -> int:
        """Preempt the youngest until `request` can compute at least one token; how many of `count` it can.

        The youngest itself gets 0 and waits in place: the older take its pages when they need them, and if they end
        first nothing is computed twice.
        """
        if count <= len(request.pages) * self.config.page_size - request.num_computed:
            return count  # most decodes: the last page has room
        while count > 0:
            room = (len(request.pages) + self._pages.num_free) * self.config.page_size - request.num_computed
            if room > 0:
                return min(count, room)
            if self._running[-1] is request:
                return 0
            self._preempt(self._running[-1])
        return 0

    def _has_room(self, request: _Request, count: int) -> bool:
        """Whether a waiting request may start: pages for its first chunk, or for all of it once it was preempted.

        Were a preempted request let back in chunk by chunk, those running would soon take its pages again.
        """
        if not self._running:
            return True
        tokens = request.remaining if request.was_preempted else count
        return -(-tokens // self.config.page_size) + self._watermark <= self._pages.num_free

    def _preempt(self, request: _Request) -> None:
        self._running.remove(request)
        self._release(request)
        request.num_computed = 0
        request.was_preempted = True
        self._waiting[request.request_id] = request
        self._waiting.move_to_end(request.request_id, last=False)
        self.num_preemptions += 1

    def _release(self, request: _Request) -> None:
        self._pages.release(request.request_id, request.pages)
        request.pages = []
        self._free_slots.append(request.slot)
        self._freed.append(request.slot)
        request.slot = -1

    def _slot_init(self, request: _Request) -> SlotInit:
        prompt, output = request.tokens[: request.num_prompt], request.tokens[request.num_prompt :]
        return SlotInit(request.slot, request.request_id, prompt, output, request.params, request.seed)

    def _work(self, request: _Request, count: int) -> Work:
        start, stop = request.num_computed, request.num_computed + count
        page_index = len(request.pages)
        new_pages: list[int] = []
        if stop > page_index * self.config.page_size:
            new_pages = self._pages.allocate(request.request_id, -(-stop // self.config.page_size) - page_index)
            request.pages += new_pages
        sample = stop == len(request.tokens)
        return Work(request.slot, request.tokens[start:stop], start, page_index, new_pages, sample, request.num_output)

    def _append(self, request: _Request, token_id: int, logprobs: TokenLogprobs | None) -> None:
        request.tokens.append(token_id)
        self._output_tokens += 1
        params = request.params
        is_eos = token_id in request.eos_token_ids and not params.ignore_eos
        is_stop = (is_eos or token_id in params.stop_tokens) and request.num_output >= params.min_tokens
        self._events.append(TokenEvent(request.request_id, token_id, logprobs, is_stop))
        if is_stop:
            self.finish(request.request_id, "stop", None if is_eos else token_id)
        elif request.num_output >= request.max_output:
            self.finish(request.request_id, "length")

    # What it looks like from outside

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_free_pages(self) -> int:
        return self._pages.num_free

    def statistics(self) -> EngineStatistics:
        """What was done since the scheduler was made, and how things are now."""
        return EngineStatistics(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            num_pages=self.config.num_pages,
            num_free_pages=self._pages.num_free,
            num_preemptions=self.num_preemptions,
            prompt_tokens=self._prompt_tokens,
            output_tokens=self._output_tokens,
        )

    def _is_here(self, request: _Request) -> bool:
        return self._requests.get(request.request_id) is request

    def check(self) -> None:
        """Assert everything that holds between calls."""
        self._pages.check()
        order = [*self._running, *self._waiting.values()]
        assert [request.arrival for request in order] == sorted(request.arrival for request in order)
        assert {request.request_id: request for request in order} == self._requests and len(order) == len(self._requests)
        slots = [request.slot for request in self._running]
        assert sorted([*slots, *self._free_slots]) == list(range(self.config.max_num_seqs))
        assert sum(len(request.pages) for request in order) == self.config.num_pages - self._pages.num_free
        planned = {request.request_id: len(work.token_ids) for request, work in self._in_flight or []}
        for request in self._running:
            tokens = request.num_computed + planned.get(request.request_id, 0)
            assert len(request.pages) == -(-tokens // self.config.page_size)
            assert all(self._pages.owner(page) == request.request_id for page in request.pages)
            assert 0 <= request.num_computed < len(request.tokens)
        for request in self._waiting.values():
            assert request.slot == -1 and not request.pages and request.num_computed == 0
