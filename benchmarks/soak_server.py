"""Keeps a server busy for minutes with clients of all kinds, and records its memory.

    python benchmarks/soak_server.py --minutes 10 --output soak.json

Clients stream, ask for whole answers, leave in the middle, ask for JSON by a schema, and send what is refused. At the end no
page may be held; the memory at the end stands against that after the first tenth of the time.
"""

import argparse
import asyncio
import json
import os
import random
import re
import sys
import time
from pathlib import Path

import httpx

from penstock.bench.serve_command import started

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
FORMAT = {"type": "json_schema", "json_schema": {"name": "number", "schema": SCHEMA}}
WORDS = ("a", "the", "list", "of", "value", "function", "returns", "object", "key", "error", "is", "in", "to", "class", "name")


def resident_bytes(process_id: int) -> int:
    """Memory that a process has in RAM."""
    fields = Path(f"/proc/{process_id}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


class Clients:
    """Many clients, each with one request after another until the end."""

    def __init__(self, url: str, model: str, count: int, seed: int) -> None:
        self.url, self.model, self.count = url, model, count
        self.random = random.Random(seed)
        self.done: dict[str, int] = {}
        self.wrong: list[str] = []

    async def run(self, end: float) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=120, limits=limits) as client:
            await asyncio.gather(*(self._one(client, end) for _ in range(self.count)))

    async def _one(self, client: httpx.AsyncClient, end: float) -> None:
        kinds = [self._stream, self._whole, self._leave, self._schema, self._refused]
        while time.monotonic() < end:
            kind = self.random.choices(kinds, weights=(5, 3, 2, 1, 1))[0]
            name = kind.__name__.removeprefix("_")
            try:
                await kind(client)
                self.done[name] = self.done.get(name, 0) + 1
            except (AssertionError, httpx.HTTPError) as error:
                self.wrong.append(f"{name}: {type(error).__name__}: {error}"[:500])

    def _body(self, **more: object) -> dict:
        words = self.random.choices(WORDS, k=self.random.choice((3, 20, 150, 500)))
        tokens = self.random.choice((4, 32, 128))
        return {"model": self.model, "prompt": " ".join(words), "max_tokens": tokens, "ignore_eos": True, **more}

    async def _stream(self, client: httpx.AsyncClient) -> None:
        body = self._body(stream=True, return_token_ids=True)
        made = 0
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    made += sum(len(choice["token_ids"]) for choice in json.loads(line[6:])["choices"])
        assert made == body["max_tokens"], f"{made} tokens of {body['max_tokens']}"

    async def _whole(self, client: httpx.AsyncClient) -> None:
        body = self._body(n=self.random.choice((1, 1, 3)), logprobs=self.random.choice((None, 2)))
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == body["max_tokens"] * body["n"]

    async def _leave(self, client: httpx.AsyncClient) -> None:
        async with client.stream("POST", "/v1/completions", json=self._body(stream=True, max_tokens=1000)) as answer:
            async for _ in answer.aiter_lines():
                if self.random.random() < 0.1:
                    break

    async def _schema(self, client: httpx.AsyncClient) -> None:
        messages = [{"role": "user", "content": "A number?"}]
        body = {"model": self.model, "messages": messages, "response_format": FORMAT, "max_tokens": 40}
        answer = (await client.post("/v1/chat/completions", json=body)).json()
        if answer["choices"][0]["finish_reason"] == "stop":
            assert isinstance(json.loads(answer["choices"][0]["message"]["content"])["n"], int)

    async def _refused(self, client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/completions", json=self._body(temperature=self.random.choice((-1, 99, "hot"))))
        assert answer.status_code == 400, answer.text


async def soak(process_id: int, clients: Clients, minutes: float) -> list[tuple[float, int]]:
    """(seconds, resident bytes) through the run."""
    begin = time.monotonic()
    end = begin + 60 * minutes
    running = asyncio.ensure_future(clients.run(end))
    samples = []
    every = min(5.0, 60 * minutes / 60)
    while not running.done():
        samples.append((round(time.monotonic() - begin, 1), resident_bytes(process_id)))
        await asyncio.wait({running}, timeout=every)
    await running
    return samples


def metric(text: str, name: str) -> float:
    """One metric without labels."""
    found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    assert found, name
    return float(found[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("serve", nargs="*", help="arguments for penstock serve, after --")
    options = parser.parse_args()
    with started(options.model, options.serve) as server:
        clients = Clients(server.url, server.model, options.clients, options.seed)
        samples = asyncio.run(soak(server.process.pid, clients, options.minutes))
        time.sleep(1)  # for the last who left to be noticed
        text = httpx.get(server.url + "/metrics").text
    code = server.process.returncode
    settled = [bytes_ for seconds, bytes_ in samples if seconds >= 6 * options.minutes]
    tenth = max(1, len(settled) // 9)
    first, last = sum(settled[:tenth]) / tenth, sum(settled[-tenth:]) / tenth
    report = {
        "minutes": options.minutes,
        "clients": options.clients,
        "requests": clients.done,
        "wrong": clients.wrong,
        "tokens": metric(text, "penstock_generation_tokens_total"),
        "preemptions": metric(text, "penstock_num_preemptions_total"),
        "share_of_pages_held_at_the_end": metric(text, "penstock_kv_cache_usage_ratio"),
        "exit_code": code,
        "resident_MiB_after_a_tenth": round(first / 2**20, 1),
        "resident_MiB_at_the_end": round(last / 2**20, 1),
        "resident_MiB_highest": round(max(bytes_ for _, bytes_ in samples) / 2**20, 1),
        "samples": [(seconds, round(bytes_ / 2**20, 1)) for seconds, bytes_ in samples],
    }
    print(json.dumps({name: value for name, value in report.items() if name != "samples"}, indent=1))
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if clients.wrong or code or report["share_of_pages_held_at_the_end"] else 0


if __name__ == "__main__":
    sys.exit(main())
