"""Every error as the object that OpenAI's clients read: {"error": {"message", "type", "param", "code"}}."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

logger = logging.getLogger("penstock.server")

TYPES = {401: "authentication_error", 429: "overloaded_error", 500: "server_error", 503: "server_error"}
SHOWN = 3  # faults of one request; a union of types has one for each


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body = error_object(status, message, param=param, code=code)


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """400."""
    return ApiError(400, message, param=param, code=code)


def error_object(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    # A message may quote what a client sent, which need not be Unicode text.
    text = message.encode("utf-8", "replace").decode()
    return {"error": {"message": text, "type": TYPES.get(status, "invalid_request_error"), "param": param, "code": code}}


def response(error: ApiError) -> JSONResponse:
    """An error as an answer."""
    return JSONResponse(error.body, error.status, error.headers)


def install(app: FastAPI) -> None:
    """Lets an app answer every exception with an error object."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return response(describe(error))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        return response(ApiError(error.status_code, str(error.detail), headers=error.headers))

    @app.exception_handler(Exception)
    async def failure(request: Request, error: Exception) -> JSONResponse:
        logger.error("a request failed", exc_info=error)
        return response(ApiError(500, f"the server failed ({type(error).__name__}); its log has the reason"))


def describe(error: RequestValidationError) -> ApiError:
    """What is wrong with a request's fields."""
    faults = error.errors()
    if faults[0]["type"] == "json_invalid":
        return bad_request(f"the body is no JSON: {faults[0]['ctx']['error']} at byte {faults[0]['loc'][-1]}")
    if isinstance(error.body, bytes):
        return bad_request("the body must be JSON, sent with content-type: application/json")
    lines = [f"{_place(fault['loc'])}: {fault['msg']}" for fault in faults[:SHOWN]]
    if len(faults) > SHOWN:
        lines.append(f"and {len(faults) - SHOWN} more")
    names = [str(part) for part in faults[0]["loc"][1:]]
    return bad_request("; ".join(lines), param=names[0] if names else None)


def _place(location: tuple[Any, ...]) -> str:
    return ".".join(map(str, location[1:])) or str(location[0])
