"""What all tests of the server share: one live server, and the same model without one."""

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
