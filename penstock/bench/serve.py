"""Latency against load of an OpenAI-compatible server: requests arrive at random (Poisson), one rate after another.

TTFT  from the planned arrival to the first chunk          E2E   to the last
ITL   between one chunk and the next, all requests pooled  TPOT  (E2E - TTFT) / (tokens - 1), one for each request

Arrivals are planned before the run and do not wait for answers (open loop), so a server that falls behind shows it. Goodput is
the rate of the requests that kept every objective.
"""

import asyncio
import json
import math
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Workload:
    """What one run sends.

    Args:
        rate: requests a second; inf sends all at once.
        prompt_tokens, output_tokens: exact lengths; prompts are random token ids, the end token is ignored.
    """

    rate: float
    requests: int
    prompt_tokens: int
    output_tokens: int
    seed: int = 0

    def arrivals(self) -> list[float]:
        """Seconds after the start, ascending."""
        chance = random.Random(self.seed)
        at, planned = 0.0, []
        for _ in range(self.requests):
            planned.append(at)
            at += 0.0 if math.isinf(self.rate) else chance.expovariate(self.rate)
        return planned

    def prompts(self) -> list[list[int]]:
        """Token ids that every vocabulary of a thousand has."""
        chance = random.Random(self.seed + 1)
        return [[chance.randrange(10, 1000) for _ in range(self.prompt_tokens)] for _ in range(self.requests)]


@dataclass
class Measured:
    """One request; times in seconds after the start of the run."""

    planned: float
    chunks: list[float] = field(default_factory=list)
    tokens: int = 0
    fault: str = ""

    @property
    def first(self) -> float:
        """TTFT."""
        return self.chunks[0] - self.planned

    @property
    def whole(self) -> float:
        """E2E."""
        return self.chunks[-1] - self.planned

    @property
    def per_token(self) -> float:
        """TPOT."""
        return (self.whole - self.first) / max(1, self.tokens - 1)


@dataclass(frozen=True)
class Objectives:
    """What a request must keep to count for goodput, in seconds; None asks nothing."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    def kept(self, request: Measured) -> bool:
        """Whether a request that was answered kept them."""
        pairs = ((self.ttft, request.first), (self.tpot, request.per_token), (self.e2e, request.whole))
        return all(limit is None or value <= limit for limit, value in pairs)


@dataclass(frozen=True)
class Row:
    """One rate; seconds, and {mean, p50, p90, p99} of each latency."""

    rate: float | None  # None: all at once
    requests: int
    failed: int
    seconds: float
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    goodput: float
    ttft: dict[str, float]
    tpot: dict[str, float]
    itl: dict[str, float]
    e2e: dict[str, float]
    faults: list[str]

    @property
    def line(self) -> str:
        """For people."""
        offered = "all at once" if self.rate is None else f"{self.rate:g} requests/s"
        latencies = ", ".join(
            f"{name.upper()} {getattr(self, name)['p50'] * 1e3:.1f}/{getattr(self, name)['p99'] * 1e3:.1f}"
            for name in ("ttft", "tpot", "itl", "e2e")
        )
        return (
            f"{offered}: served {self.requests_per_second:.2f} requests/s, {self.output_tokens_per_second:.0f} tokens/s, "
            f"goodput {self.goodput:.2f}, {latencies} ms (p50/p99), {self.failed} failed"
        )


async def send(client: Any, model: str, prompt: Sequence[int], output_tokens: int, begin: float, measured: Measured) -> None:
    """One streamed request."""
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            measured.fault = f"HTTP {answer.status_code}: {(await answer.aread()).decode(errors='replace')[:200]}"
            return
        async for event in _events(answer):
            if "error" in event:
                measured.fault = str(event["error"].get("message"))[:200]
            elif event["choices"]:
                measured.chunks.append(time.perf_counter() - begin)
            else:
                measured.tokens = event["usage"]["completion_tokens"]
    if not measured.fault and measured.tokens != output_tokens:
        measured.fault = f"{measured.tokens} tokens of {output_tokens}"


async def _events(answer: Any) -> AsyncIterator[dict[str, Any]]:
    async for line in answer.aiter_lines():
        if line.startswith("data: {"):
            yield json.loads(line[6:])


async def run(url: str, model: str, workload: Workload, objectives: Objectives, *, key: str = "", timeout: float = 600) -> Row:
    """Send a workload and measure it."""
    import httpx

    headers = {"authorization": f"Bearer {key}"} if key else {}
    requests = [Measured(planned) for planned in workload.arrivals()]

    async def one(client: httpx.AsyncClient, measured: Measured, prompt: list[int], begin: float) -> None:
        await asyncio.sleep(max(0.0, measured.planned - (time.perf_counter() - begin)))
        try:
            await send(client, model, prompt, workload.output_tokens, begin, measured)
        except httpx.HTTPError as error:
            measured.fault = f"{type(error).__name__}: {error}"[:200]

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=timeout, limits=limits) as client:
        begin = time.perf_counter()
        pairs = zip(requests, workload.prompts(), strict=True)
        await asyncio.gather(*(one(client, measured, prompt, begin) for measured, prompt in pairs))
    return summarise(workload, requests, objectives)


def summarise(workload: Workload, requests: Sequence[Measured], objectives: Objectives) -> Row:
    """The numbers of a run; requests that failed count in none of them but `failed`."""
    good = [request for request in requests if not request.fault]
    seconds = max((request.chunks[-1] for request in good), default=math.nan)
    output = sum(request.tokens for request in good)
    gaps = [gap for request in good for gap in np.diff(request.chunks)]
    return Row(
        rate=None if math.isinf(workload.rate) else workload.rate,
        requests=len(requests),
        failed=len(requests) - len(good),
        seconds=seconds,
        requests_per_second=len(good) / seconds,
        output_tokens_per_second=output / seconds,
        total_tokens_per_second=(output + len(good) * workload.prompt_tokens) / seconds,
        goodput=sum(map(objectives.kept, good)) / seconds,
        ttft=_spread([request.first for request in good]),
        tpot=_spread([request.per_token for request in good]),
        itl=_spread(gaps),
        e2e=_spread([request.whole for request in good]),
        faults=sorted({request.fault for request in requests if request.fault})[:5],
    )


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not len(values):
        return dict.fromkeys(("mean", "p50", "p90", "p99"), math.nan)
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    return {"mean": float(np.mean(values)), "p50": float(p50), "p90": float(p90), "p99": float(p99)}


def as_json(row: Row) -> dict[str, Any]:
    """A row as data, to the microsecond; None for what nothing was measured of."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: rounded(each) for name, each in value.items()}
        if isinstance(value, float):
            return None if math.isnan(value) else round(value, 6)
        return value

    return {name: rounded(value) for name, value in asdict(row).items()}
