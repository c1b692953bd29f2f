"""`penstock serve`: load, listen, drain, exit code.

The first SIGTERM or SIGINT drains: new requests get 503, running ones are finished, at most `drain_seconds`; a second one ends
those that run. The process then ends with 0. When the engine fails it ends with 1, after /health has told for a moment.
"""

import asyncio
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

import uvicorn

from penstock.serve.engine import Engine
from penstock.serve.server.app import Options, Service, build_app
from penstock.serve.server.engine_loop import EngineLoop
from penstock.serve.server.errors import ApiError

logger = logging.getLogger("penstock.server")

LAST_ANSWERS_SECONDS = 5  # for answers to leave once no request is left
TOLD_SECONDS = 3.0  # between the engine's failure and the end, for /health to be read
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Listening:
    """Where, and for how long after the word to end."""

    host: str = "127.0.0.1"
    port: int = 8000
    drain_seconds: float = 30.0


def serve(build: Callable[[], Engine], options: Options, listening: Listening) -> int:
    """Serve until told to end.

    Args:
        build: makes the engine, in the thread that will use it.
    Returns: the exit code.
    Raises: what `build` raises; OSError when the address cannot be had.
    """
    bound = _bind(listening)
    loop = EngineLoop(build)
    try:
        loop.start()
    except BaseException:
        bound.close()
        raise
    app = build_app(loop, options)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=LAST_ANSWERS_SECONDS,
    )
    server = _Server(config, app.state.service, listening.drain_seconds)
    host, port = bound.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    logger.info("listening", extra={"facts": {"url": address, "model": options.model}})
    server.run(sockets=[bound])
    return 1 if loop.failure is not None else 0


def _bind(listening: Listening) -> socket.socket:
    family = socket.AF_INET6 if ":" in listening.host else socket.AF_INET
    return socket.create_server((listening.host, listening.port), family=family, backlog=2048)


class _Server(uvicorn.Server):
    """uvicorn's, which ends when the requests have."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float) -> None:
        super().__init__(config)
        self._service = service
        self._drain_seconds = drain_seconds
        self._told = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The word to end; called as a signal handler."""
        self._told += 1
        self._service.dispatch.draining = True

    async def main_loop(self) -> None:
        """Serve, then drain; what comes after is uvicorn's shutdown."""
        ticking = asyncio.ensure_future(super().main_loop())
        while not self._told and self._service.loop.alive:
            await asyncio.sleep(POLL_SECONDS)
        if self._told:
            await self._drain()
        else:
            await asyncio.sleep(TOLD_SECONDS)
        self.should_exit = True
        await ticking

    async def _drain(self) -> None:
        dispatch = self._service.dispatch
        logger.info("draining", extra={"facts": {"completions": dispatch.num_open, "seconds": self._drain_seconds}})
        idle = asyncio.ensure_future(dispatch.idle())
        end = asyncio.get_running_loop().time() + self._drain_seconds
        while not idle.done() and self._told < 2 and asyncio.get_running_loop().time() < end:
            await asyncio.wait({idle}, timeout=POLL_SECONDS)
        idle.cancel()
        if dispatch.num_open:
            logger.warning("requests are ended before they are done", extra={"facts": {"completions": dispatch.num_open}})
            dispatch.fail_all(ApiError(503, "the server ended the request before it was done", code="aborted"))
