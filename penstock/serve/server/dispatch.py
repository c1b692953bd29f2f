"""Requests on the event loop: who may enter, who gets which output, who has left, and when all are done.

Everything here runs on one event loop; outputs arrive from the engine's thread one batch a step.
"""

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock.serve.engine import EncodedPrompt
from penstock.serve.outputs import RequestOutput
from penstock.serve.params import SamplingParams
from penstock.serve.server.engine_loop import Delivery, EngineLoop, Refused
from penstock.serve.server.errors import ApiError, bad_request
from penstock.serve.server.metrics import Metrics

RETRY_AFTER = "1"  # seconds


@dataclass(slots=True)
class _Open:
    """A request in the engine."""

    outputs: "Outputs"
    prompt_index: int
    sequences: int
    arrived: float
    last_token: float | None = None
    made: int = 0  # tokens


@dataclass(slots=True, eq=False)
class Outputs:
    """What comes back for one HTTP request, in the order of arrival: (index of the prompt, output)."""

    dispatch: "Dispatch"
    names: list[str]
    inbox: list[tuple[int, RequestOutput]] = field(default_factory=list)
    unfinished: int = 0
    failure: ApiError | None = None
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    async def take(self) -> list[tuple[int, RequestOutput]]:
        """All that has come since the last call, at least one output; empty once everything has come."""
        while not self.inbox and self.failure is None:
            if not self.unfinished:
                return []
            self.arrived.clear()
            await self.arrived.wait()
        if self.failure is not None:
            raise self.failure
        taken, self.inbox = self.inbox, []
        return taken

    def close(self) -> None:
        """Nobody wants the rest."""
        self.dispatch.leave(self)


class Dispatch:
    """Admits requests, carries outputs to them.

    Args:
        max_queue: completions that may wait beyond the max_num_seqs that run.
    """

    def __init__(self, loop: EngineLoop, metrics: Metrics, *, max_queue: int) -> None:
        self.engine_loop = loop
        self.metrics = metrics
        self.capacity = loop.engine.config.max_num_seqs + max_queue
        self.draining = False
        self.num_open = 0  # completions
        self._open: dict[str, _Open] = {}
        self._names = itertools.count()
        self._idle = asyncio.Event()
        self._idle.set()

    def check_open(self) -> None:
        """503 when nothing new is taken."""
        if not self.engine_loop.alive:
            raise dead()
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down", headers={"retry-after": RETRY_AFTER})

    def enter(self, prompts: Sequence[EncodedPrompt], params: SamplingParams, *, stream: bool, arrived: float) -> Outputs:
        """Hand prompts to the engine: all of them, or none and the ApiError that says why.

        Args:
            arrived: when the HTTP request did, by time.monotonic().
        """
        self.check_open()
        wanted = len(prompts) * params.n
        if wanted > self.capacity:
            raise bad_request(f"{wanted} completions are asked for; the server holds {self.capacity}", param="n")
        if self.num_open + wanted > self.capacity:
            self.metrics.refused.inc()
            reason = f"{self.num_open} completions run or wait and {self.capacity} may; try again later"
            raise ApiError(429, reason, code="queue_full", headers={"retry-after": RETRY_AFTER})
        outputs = Outputs(self, [])
        for index, prompt in enumerate(prompts):
            name = str(next(self._names))
            self._open[name] = _Open(outputs, index, params.n, arrived)
            outputs.names.append(name)
            outputs.unfinished += 1
            self.num_open += params.n
            self.engine_loop.submit(name, prompt, params, stream=stream)
        self._idle.clear()
        return outputs

    def deliver(self, delivery: Delivery) -> None:
        """Give outputs to those who wait for them."""
        now = time.monotonic()
        for output in delivery:
            request = self._open.get(output.request_id)
            if request is None:
                continue  # it has left
            if isinstance(output, Refused):
                request.outputs.failure = bad_request(output.reason)
                self._forget(output.request_id)
            else:
                self._measure(request, output, now)
                request.outputs.inbox.append((request.prompt_index, output))
                if output.finished:
                    self._forget(output.request_id)
            request.outputs.arrived.set()

    def leave(self, outputs: Outputs) -> None:
        """Abort what is unfinished of an HTTP request."""
        for name in outputs.names:
            if name in self._open:
                self.engine_loop.abort(name)
                self.metrics.finished.labels("abandoned").inc()
                self._forget(name)

    def fail_all(self, error: ApiError) -> None:
        """End every request with an error; what the engine still does for them is stopped."""
        for name, request in list(self._open.items()):
            self.engine_loop.abort(name)
            request.outputs.failure = error
            request.outputs.arrived.set()
            self._forget(name)

    async def idle(self) -> None:
        """Return when no request is left."""
        await self._idle.wait()

    def _forget(self, name: str) -> None:
        request = self._open.pop(name)
        request.outputs.unfinished -= 1
        self.num_open -= request.sequences
        if not self._open:
            self._idle.set()

    def _measure(self, request: _Open, output: RequestOutput, now: float) -> None:
        tokens = sum(len(completion.token_ids) for completion in output.outputs)
        metrics = self.metrics
        if request.last_token is None and tokens:
            first = output.metrics and output.metrics.first_token_time
            metrics.first_token.observe((first or now) - request.arrived)
        elif tokens:
            assert request.last_token is not None
            metrics.inter_token.observe(now - request.last_token)
        if tokens:
            request.last_token = now
            request.made += tokens
        for completion in output.outputs:
            if completion.finish_reason is not None:
                metrics.finished.labels(completion.finish_reason).inc()
        if output.finished:
            metrics.end_to_end.observe(now - request.arrived)
            metrics.prompt_length.observe(len(output.prompt_token_ids))
            metrics.output_length.observe(request.made)


def dead() -> ApiError:
    """503 for an engine that is no more."""
    return ApiError(503, "the engine has failed; the server is ending", code="engine_dead")
