"""What all tests of the server share: one live server, and the same model without one."""

import logging

import pytest

from penstock import LLM
from tests.serve.server.servers import command


@pytest.fixture(scope="session")
def live():
    """One server for all tests that leave it as they found it."""
    with command("--max-num-seqs", "64") as running:
        yield running


@pytest.fixture(scope="session")
def offline():
    """The same model without a server."""
    return LLM("demo", device="cpu", dtype="float32", max_num_seqs=64)


@pytest.fixture(autouse=True)
def loggers_as_before():
    """`penstock serve` sends the logs of its process to stderr; this process is ours."""
    kept = [(logging.getLogger(name), dict(vars(logging.getLogger(name)))) for name in ("penstock", "uvicorn")]
    yield
    for logger, before in kept:
        logger.handlers, logger.propagate = before["handlers"], before["propagate"]
        logger.setLevel(before["level"])
