"""What every request passes: a request id, the API key, the limit of the body; and one line in the log at the end."""

import hmac
import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.serve.server.errors import ApiError, response
from penstock.serve.server.metrics import Metrics

logger = logging.getLogger("penstock.server")

OPEN_PATHS = ("/health", "/ready", "/metrics")
QUIET_PATHS = OPEN_PATHS
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass
class Visit:
    """One request, for its handler and the log; handlers add `facts`."""

    request_id: str
    arrived: float = field(default_factory=time.monotonic)
    facts: dict[str, Any] = field(default_factory=dict)


class Gate:
    """ASGI middleware.

    Args:
        api_key: asked for as `authorization: Bearer KEY` except at OPEN_PATHS; "" asks for none.
        max_body: bytes.
    """

    def __init__(self, app: ASGIApp, *, api_key: str, max_body: int, metrics: Metrics) -> None:
        self.app = app
        self._key = api_key.encode()
        self._max_body = max_body
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        visit = Visit(given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex)
        scope["penstock.visit"] = visit
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = visit.request_id
            await send(message)

        try:
            refused = self._refusal(scope["path"], headers)
            if refused is not None:
                await response(refused)(scope, receive, send_with_id)
            else:
                await self.app(scope, self._limited(receive), send_with_id)
        finally:
            self._note(scope, visit, status)

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        if self._key and path not in OPEN_PATHS:
            given = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, b"Bearer " + self._key):
                message = "an API key is needed: authorization: Bearer KEY"
                return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length) > self._max_body:
            return ApiError(413, self._too_large(), code="body_too_large", headers={"connection": "close"})
        return None

    def _limited(self, receive: Receive) -> Receive:
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._max_body:
                    # Of the exceptions that reading a body may raise, this is the one FastAPI passes on.
                    raise HTTPException(413, self._too_large())
            return message

        return limited

    def _too_large(self) -> str:
        return f"the body is larger than {self._max_body} bytes"

    def _note(self, scope: Scope, visit: Visit, status: int) -> None:
        route = getattr(scope.get("route"), "path", "none")
        self._metrics.answers.labels(route, str(status)).inc()
        facts = {
            "request_id": visit.request_id,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "milliseconds": round((time.monotonic() - visit.arrived) * 1e3, 1),
            **visit.facts,
        }
        level = logging.DEBUG if scope["path"] in QUIET_PATHS else logging.INFO
        logger.log(level, "request", extra={"facts": facts})
