"""One timing protocol: contestants take turns, round after round, on the same rotating inputs; medians, and ratios per round.

On CUDA a contestant is a graph of several calls over input sets that together exceed three times the L2; what cannot be
captured is timed with events and says so. On a CPU the clock is perf_counter. Call, warm-up and capture stay outside.
"""

import itertools
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]

MIN_ROUNDS = 5
WANTED_ROUNDS = 11
MAX_ROUNDS = 31
MAX_GRAPH_CALLS = 512
# Below this a sample is mostly the resolution of the clock and the cost of reading it.
MIN_SAMPLE_US = 300.0
# A spin of about 50 µs before the first event: the host enqueues the timed work while the GPU is still busy.
LEAD_CYCLES = 100_000


@dataclass(frozen=True)
class Series:
    """µs per call of one contestant, one value per round.

    Args:
        method: "cuda graph", "events" or "wall clock".
        calls: calls in one value.
        note: why it is not a graph on CUDA; otherwise empty.
    """

    name: str
    samples_us: tuple[float, ...]
    method: str
    calls: int
    note: str = ""

    @property
    def median_us(self) -> float:
        """The middle value."""
        return statistics.median(self.samples_us)

    @property
    def p10_us(self) -> float:
        """A tenth of the values are below."""
        return percentile(self.samples_us, 0.1)

    @property
    def p90_us(self) -> float:
        """A tenth of the values are above."""
        return percentile(self.samples_us, 0.9)


def percentile(values: Sequence[float], fraction: float) -> float:
    """The value below which `fraction` of the values lie, linear between neighbours."""
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def ratio(peer: Series, ours: Series) -> float:
    """Peer time over our time, the median of the ratios of each round: above 1 means that ours is faster."""
    return statistics.median(p / o for p, o in zip(peer.samples_us, ours.samples_us, strict=True))


def protocol(device: torch.device) -> dict[str, Any]:
    """The protocol in words and numbers, for the record."""
    clock = "CUDA graph replay between events" if device.type == "cuda" else "perf_counter"
    return {
        "clock": clock,
        "order": "contestants alternate within a round; the first one moves on from round to round",
        "rounds": f"{MIN_ROUNDS} to {MAX_ROUNDS}",
        "statistic": "median, p10 and p90 over rounds of µs per call; a ratio is the median of the ratios of each round",
        "inputs": "random; rotating sets that together exceed three times the cache, or as recorded",
        "threads": torch.get_num_threads(),
    }


def measure(
    contestants: Mapping[str, Sequence[Call]],
    device: torch.device,
    *,
    budget: float = 1.0,
) -> dict[str, Series]:
    """Times contestants in alternation.

    Args:
        contestants: for each name its calls, one for each input set, in the same order for all.
        device: where they run.
        budget: seconds for all samples together; warm-up, capture and five long rounds may exceed it.
    Returns: for each name a Series; all have the same number of rounds.
    """
    sizes = {name: len(calls) for name, calls in contestants.items()}
    if not contestants or len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise ValueError(f"every contestant needs a call for every input set, got {sizes}")
    slice_us = max(MIN_SAMPLE_US, budget * 1e6 / (WANTED_ROUNDS * len(contestants)))
    with torch.no_grad():
        prepare = _prepare_cuda if device.type == "cuda" else _prepare_cpu
        lanes = {name: prepare(calls, slice_us, device) for name, calls in contestants.items()}
        round_us = sum(lane.sample_us for lane in lanes.values())
        rounds = int(min(MAX_ROUNDS, max(MIN_ROUNDS, budget * 1e6 / round_us)))
        samples: dict[str, list[float]] = {name: [] for name in lanes}
        names = list(lanes)
        for index in range(rounds):
            turn = index % len(names)
            order = names[turn:] + names[:turn]
            readings = {name: lanes[name].start() for name in order}
            for name, read in readings.items():
                samples[name].append(read() / lanes[name].calls)
    return {name: Series(name, tuple(samples[name]), lane.method, lane.calls, lane.note) for name, lane in lanes.items()}


@dataclass(frozen=True)
class _Lane:
    """A contestant made ready: `start` runs one sample and answers with a function that returns its µs."""

    start: Callable[[], Callable[[], float]]
    calls: int
    sample_us: float
    method: str
    note: str = ""


def _prepare_cpu(calls: Sequence[Call], slice_us: float, device: torch.device) -> _Lane:
    # One rotation runs through all samples, so that a short sample does not come back to the sets it left in the cache.
    turn = itertools.cycle(calls)

    def run(count: int) -> float:
        start = time.perf_counter()
        for call in itertools.islice(turn, count):
            call()
        return (time.perf_counter() - start) * 1e6

    run(1)
    # The least of a few: one interruption by another process must not shrink the samples.
    once = min(run(1) for _ in range(3))
    if once < slice_us / 10:
        once = min(run(5) / 5 for _ in range(3))
    count = max(1, int(slice_us / once))
    count -= count % len(calls) if count >= len(calls) else 0

    def start() -> Callable[[], float]:
        taken = run(count)
        return lambda: taken

    return _Lane(start, count, count * once, "wall clock")


def _prepare_cuda(calls: Sequence[Call], slice_us: float, device: torch.device) -> _Lane:
    for call in calls[:3]:
        call()
    torch.cuda.synchronize(device)
    eager_us = _elapsed(lambda: [call() for call in calls[:3]], device)() / len(calls[:3])
    graph_calls = max(1, min(MAX_GRAPH_CALLS, math.ceil(slice_us / eager_us)))
    graph_calls = min(MAX_GRAPH_CALLS, math.ceil(graph_calls / len(calls)) * len(calls))
    order = [calls[i % len(calls)] for i in range(graph_calls)]

    graph, note = _capture(order, len(calls), device)
    if graph is None:

        def unit() -> None:
            for call in order:
                call()

        method = "events"
    else:
        unit, method = graph.replay, "cuda graph"
    unit()
    unit_us = _elapsed(unit, device)()
    repeats = max(1, round(slice_us / unit_us))

    def sample() -> None:
        for _ in range(repeats):
            unit()

    return _Lane(lambda: _elapsed(sample, device), repeats * graph_calls, repeats * unit_us, method, note)


def _capture(order: Sequence[Call], sets: int, device: torch.device) -> tuple[torch.cuda.CUDAGraph | None, str]:
    """A graph of the calls, or None and why the first of them cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    # Results of the last rotation stay alive, so that outputs rotate like inputs instead of sharing one cached buffer.
    kept: deque[Any] = deque(maxlen=sets)
    try:
        with torch.cuda.device(device), torch.cuda.graph(graph):
            for call in order:
                kept.append(call())
    except (RuntimeError, ValueError, NotImplementedError) as error:
        torch.cuda.synchronize(device)
        return None, "not captured: " + " ".join(str(error).split())[:160]
    torch.cuda.synchronize(device)
    return graph, ""


def _elapsed(work: Callable[[], Any], device: torch.device) -> Callable[[], float]:
    """Enqueues work between two events; the returned function waits and gives µs."""
    with torch.cuda.device(device):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(LEAD_CYCLES)
        begin.record()
        work()
        end.record()

    def read() -> float:
        end.synchronize()
        return begin.elapsed_time(end) * 1e3

    return read
