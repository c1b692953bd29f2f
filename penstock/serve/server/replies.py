"""What answers are made of: usage, log-probabilities, server-sent events; and noticing that a client has left."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from penstock.serve.outputs import FinishReason, Logprob, RequestOutput
from penstock.serve.server.errors import ApiError

T = TypeVar("T")
CLIENT_LEFT = 499


@dataclass
class Reply:
    """What all objects of one answer share, and the tokens it has cost."""

    id: str
    object: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))
    prompt_tokens: dict[int, int] = field(default_factory=dict)  # by prompt
    completion_tokens: int = 0

    @classmethod
    def begin(cls, prefix: str, kind: str, model: str) -> "Reply":
        """A new answer."""
        return cls(f"{prefix}-{uuid.uuid4().hex}", kind, model)

    def count(self, prompt_index: int, output: RequestOutput) -> None:
        """Take note of an output's tokens."""
        self.prompt_tokens[prompt_index] = len(output.prompt_token_ids)
        self.completion_tokens += sum(len(completion.token_ids) for completion in output.outputs)

    def usage(self) -> dict[str, int]:
        """The tokens so far."""
        prompts = sum(self.prompt_tokens.values())
        return {
            "prompt_tokens": prompts,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompts + self.completion_tokens,
        }

    def holding(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """The answer, or a chunk of it."""
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }


def finish_reason(reason: FinishReason | None) -> str | None:
    """ "stop" or "length"; an ApiError where the server itself ended the output."""
    if reason == "abort":
        raise ApiError(503, "the server ended the request before it was done", code="aborted")
    if reason == "error":
        raise ApiError(500, "the output could not be continued", code="engine_error")
    return reason


def chosen(entries: dict[int, Logprob]) -> tuple[Logprob, list[Logprob]]:
    """The sampled token's entry, and those of the most likely tokens, most likely first."""
    first = next(iter(entries.values()))
    return first, sorted(entries.values(), key=lambda entry: entry.rank or 0)


class EventStream(Response):
    """Server-sent events, sent as they come until the client leaves.

    Args:
        chunks: lists of JSON objects; those of one list travel together. An ApiError ends them with an error object.
        close: called at the end, whatever it was.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[list[dict[str, Any]]], close: Callable[[], None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_left(receive, self._send_all(send))
        finally:
            self._close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for chunks in self._chunks:
                body = b"".join(map(event, chunks))
                await send({"type": "http.response.body", "body": body, "more_body": True})
        except ApiError as error:
            await send({"type": "http.response.body", "body": event(error.body), "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n\n"


async def until_left(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of work, which is cancelled when the client leaves; None then."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    doing, watching = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({doing, watching}, return_when=asyncio.FIRST_COMPLETED)
        return doing.result() if doing.done() else None
    finally:
        for task in (doing, watching):
            task.cancel()
        await asyncio.gather(doing, watching, return_exceptions=True)


async def answer(request: Request, work: Coroutine[Any, Any, dict[str, Any]], close: Callable[[], None]) -> Response:
    """A whole answer as JSON; nothing when the client has left."""
    try:
        made = await until_left(request.receive, work)
    finally:
        close()
    if made is None:
        return Response(status_code=CLIENT_LEFT)
    return json_response(made)


def json_response(value: dict[str, Any]) -> Response:
    """JSON; a lone surrogate, which no text decoder accepts, becomes a question mark."""
    body = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    return Response(body, media_type="application/json")
