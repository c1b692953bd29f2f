"""The routes."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, PlainTextResponse, Response

from penstock.serve.engine import EncodedPrompt, InvalidPrompt
from penstock.serve.params import SamplingParams
from penstock.serve.server import errors
from penstock.serve.server.chat import ChatReply, logprobs_of, max_tokens_of, render, shape_of
from penstock.serve.server.completions import CompletionReply, prompts_of
from penstock.serve.server.dispatch import Dispatch, dead
from penstock.serve.server.engine_loop import EngineLoop
from penstock.serve.server.errors import ApiError, bad_request
from penstock.serve.server.gate import Gate, Visit
from penstock.serve.server.metrics import Metrics
from penstock.serve.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    SamplingRequest,
    TokenizeRequest,
)
from penstock.serve.server.replies import EventStream, answer, json_response
from penstock.serve.server.sampling import format_grammar, sampling_params
from penstock.serve.text import Tokenizer

T = TypeVar("T")
logger = logging.getLogger("penstock.server")


@dataclass(frozen=True)
class Options:
    """What a server is told.

    Args:
        model: the name that requests must use.
        api_key: "" for none.
        max_queue: completions that may wait beyond those that run.
        max_body: bytes of a request.
        max_output_tokens: the most a request may ask for; None for what the model's length leaves.
    """

    model: str
    api_key: str = field(default="", repr=False)
    max_queue: int = 1024
    max_body: int = 4 << 20
    max_output_tokens: int | None = None


class ErrorFields(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorObject(BaseModel):
    error: ErrorFields


FAULTS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorObject, "description": "What is wrong with the request."},
    "5XX": {"model": ErrorObject, "description": "The server fails or ends."},
}
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer, or with stream: true its chunks.", "content": {"text/event-stream": {}}},
    **FAULTS,
}


class Service:
    """What the routes share."""

    def __init__(self, loop: EngineLoop, options: Options) -> None:
        self.loop = loop
        self.options = options
        self.metrics = Metrics(loop, options.model)
        self.dispatch = Dispatch(loop, self.metrics, max_queue=options.max_queue)
        self.created = 0
        # Text is prepared here: a megabyte of prompt or a large grammar must not stop the event loop.
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="prepare")

    @property
    def tokenizer(self) -> Tokenizer:
        """The engine's."""
        tokenizer = self.loop.engine.tokenizer
        assert tokenizer is not None, "the server is started with a tokenizer"
        return tokenizer

    def check(self, model: str | None) -> None:
        """503 when nothing is taken, 404 for a model that is not served."""
        self.dispatch.check_open()
        if model is not None and model != self.options.model:
            message = f"the model {model!r} is not served here; {self.options.model!r} is"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def prepare(self, work: Callable[[], T]) -> T:
        """The result of work done outside of the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._preparing, work)

    def limit(self, wanted: int | None) -> int | None:
        """max_tokens within the server's limit."""
        limit = self.options.max_output_tokens
        if limit is not None and wanted is not None and wanted > limit:
            raise bad_request(f"max_tokens must be at most {limit} on this server, got {wanted}", param="max_tokens")
        return limit if wanted is None else wanted

    def tokens(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The tokens of a text; 400 when it is none."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise bad_request(f"the text holds a lone surrogate at character {error.start}, which is no Unicode") from error
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def encode(self, prompt: str | list[int], params: SamplingParams, *, add_special_tokens: bool = True) -> EncodedPrompt:
        """A prompt that the engine will take; 400 when it cannot."""
        tokens = prompt if isinstance(prompt, list) else self.tokens(prompt, add_special_tokens=add_special_tokens)
        engine = self.loop.engine
        asked = params.max_tokens or 1
        if len(tokens) + asked > engine.max_model_len:
            room = f"the context is {engine.max_model_len} tokens"
            message = f"{room}; the prompt has {len(tokens)} and {asked} of output are asked for"
            raise bad_request(message, param="max_tokens", code="context_length_exceeded")
        text = None if isinstance(prompt, list) else prompt
        try:
            return engine.encode({"prompt": text, "prompt_token_ids": tokens}, params)
        except InvalidPrompt as error:
            raise bad_request(str(error)) from error

    async def respond(
        self,
        request: Request,
        body: SamplingRequest,
        prompts: list[EncodedPrompt],
        params: SamplingParams,
        reply: CompletionReply | ChatReply,
    ) -> Response:
        """Run prompts and answer, whole or streamed."""
        visit: Visit = request.scope["penstock.visit"]
        outputs = self.dispatch.enter(prompts, params, stream=bool(body.stream), arrived=visit.arrived)

        def close() -> None:
            visit.facts |= reply.reply.usage()
            outputs.close()

        if body.stream:
            return EventStream(reply.chunks(outputs), close)
        return await answer(request, reply.whole(outputs), close)

    def engine_died(self) -> None:
        """Every request ends in an error; /health tells."""
        logger.critical("the engine has failed", exc_info=self.loop.failure)
        self.dispatch.fail_all(dead())


def build_app(loop: EngineLoop, options: Options) -> FastAPI:
    """The application over a loop that was started; `app.state.service` is its Service."""
    service = Service(loop, options)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        here = asyncio.get_running_loop()
        loop.attach(
            lambda delivery: _call(here, lambda: service.dispatch.deliver(delivery)),
            lambda: _call(here, service.engine_died),
        )
        yield
        await here.run_in_executor(None, loop.stop)

    app = FastAPI(title="Penstock", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = service
    errors.install(app)
    app.add_middleware(Gate, api_key=options.api_key, max_body=options.max_body, metrics=service.metrics)
    _inference(app, service)
    _models_and_tokens(app, service)
    _operations(app, service)
    return app


def _call(event_loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    """Run something on the event loop, unless the server has gone."""
    if not event_loop.is_closed():
        event_loop.call_soon_threadsafe(function)


def _inference(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", responses=STREAMED, response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Go on from one prompt or several."""
        service.check(body.model)
        _check_stream_options(body)
        if body.echo and body.logprobs is not None:
            raise bad_request("echo gives no log-probabilities of the prompt; leave one of the two", param="echo")

        def prepare() -> tuple[SamplingParams, list[EncodedPrompt], list[str]]:
            grammar = format_grammar(body.response_format)
            limit = service.limit(16 if body.max_tokens is None else body.max_tokens)
            params = sampling_params(body, max_tokens=limit, logprobs=body.logprobs, grammar=grammar)
            prompts = [service.encode(prompt, params) for prompt in prompts_of(body)]
            decode = service.tokenizer.decode
            texts = [decode(each.token_ids) if each.text is None else each.text for each in prompts] if body.echo else []
            return params, prompts, texts

        params, prompts, texts = await service.prepare(prepare)
        return await service.respond(request, body, prompts, params, CompletionReply(body, body.model, prompts, texts))

    @app.post("/v1/chat/completions", responses=STREAMED, response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        service.check(body.model)
        _check_stream_options(body)

        def prepare() -> tuple[SamplingParams, EncodedPrompt, ChatReply]:
            shape = shape_of(body)
            limit = service.limit(max_tokens_of(body))
            params = sampling_params(body, max_tokens=limit, logprobs=logprobs_of(body), grammar=shape.grammar)
            text = render(service.tokenizer, body.messages, tools=shape.tools, more=body.chat_template_kwargs)
            return params, service.encode(text, params, add_special_tokens=False), ChatReply(body, body.model, shape)

        params, prompt, reply = await service.prepare(prepare)
        return await service.respond(request, body, [prompt], params, reply)


def _check_stream_options(body: SamplingRequest) -> None:
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options needs stream: true", param="stream_options")


def _models_and_tokens(app: FastAPI, service: Service) -> None:
    def model() -> dict[str, Any]:
        length = service.loop.engine.max_model_len
        name = service.options.model
        return {"id": name, "object": "model", "created": 0, "owned_by": "penstock", "max_model_len": length}

    @app.get("/v1/models", responses=FAULTS, response_model=None)
    async def models() -> Response:
        """The one model."""
        return json_response({"object": "list", "data": [model()]})

    @app.get("/v1/models/{name:path}", responses=FAULTS, response_model=None)
    async def one_model(name: str) -> Response:
        """The one model, by its name."""
        service.check(name)
        return json_response(model())

    @app.post("/tokenize", responses=FAULTS, response_model=None)
    async def tokenize(body: TokenizeRequest) -> Response:
        """The tokens of a prompt, or of what the chat template makes of messages."""
        service.check(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise bad_request("give one of prompt and messages", param="prompt")

        def prepare() -> list[int]:
            if body.messages is None:
                return service.tokens(body.prompt or "", add_special_tokens=body.add_special_tokens)
            text = render(service.tokenizer, body.messages, add_generation_prompt=body.add_generation_prompt)
            return service.tokens(text, add_special_tokens=False)

        tokens = await service.prepare(prepare)
        length = service.loop.engine.max_model_len
        return json_response({"tokens": tokens, "count": len(tokens), "max_model_len": length})

    @app.post("/detokenize", responses=FAULTS, response_model=None)
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of tokens, special ones included."""
        service.check(body.model)
        vocabulary = service.loop.engine.runner.vocab_size
        if wrong := [token for token in body.tokens if token >= vocabulary]:
            raise bad_request(f"token id {wrong[0]} is not in the vocabulary of {vocabulary}", param="tokens")
        text = await service.prepare(lambda: service.tokenizer.decode(body.tokens, skip_special_tokens=False))
        return json_response({"prompt": text})


def _operations(app: FastAPI, service: Service) -> None:
    @app.get("/health", responses={503: {"description": "The engine has failed."}}, response_model=None)
    async def health() -> Response:
        """200 while the engine lives, also while it drains."""
        if service.loop.alive:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "engine failed", "reason": repr(service.loop.failure)}, 503)

    @app.get("/ready", responses={503: {"description": "New requests are refused."}}, response_model=None)
    async def ready() -> Response:
        """200 while new requests are taken."""
        taking = service.loop.alive and not service.dispatch.draining
        return JSONResponse({"ready": taking}, 200 if taking else 503)

    @app.get("/metrics", response_class=PlainTextResponse, response_model=None)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
