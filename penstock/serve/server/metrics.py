"""What Prometheus reads. The names without their prefix are those of vLLM where it has the same metric."""

import sys
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from penstock.serve.server.engine_loop import EngineLoop

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKENS = tuple(float(1 << power) for power in range(0, 21, 2))

# (name, sentence, field of EngineStatistics); those that the engine does not count are left out
COUNTERS = (
    ("prompt_tokens", "Tokens of the prompts that were admitted.", "prompt_tokens"),
    ("generation_tokens", "Tokens made.", "output_tokens"),
    ("num_preemptions", "Completions sent back to wait because pages ran out.", "num_preemptions"),
    ("prefix_cache_hit_tokens", "Tokens of prompts found in the prefix cache.", "prefix_hit_tokens"),
    ("spec_decode_draft_tokens", "Tokens guessed by a drafter.", "draft_tokens"),
    ("spec_decode_accepted_tokens", "Guesses that were right.", "accepted_tokens"),
)
GAUGES = (
    ("num_requests_running", "Completions being computed.", "num_running"),
    ("num_requests_waiting", "Completions that wait for their first step, or again after a preemption.", "num_waiting"),
    ("kv_cache_pages", "Pages of the key and value cache.", "num_pages"),
    ("kv_cache_pages_free", "Pages that no completion holds.", "num_free_pages"),
    ("kv_cache_pages_cached", "Of the free pages, those that can be found by their content.", "num_cached_pages"),
)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, loop: EngineLoop, model: str) -> None:
        self.registry = registry = CollectorRegistry()
        self.first_token = Histogram(
            "penstock_time_to_first_token_seconds", "From arrival to the first token.", buckets=SECONDS, registry=registry
        )
        self.inter_token = Histogram(
            "penstock_inter_token_latency_seconds",
            "Between deliveries of a streamed request's tokens.",
            buckets=SECONDS,
            registry=registry,
        )
        self.end_to_end = Histogram(
            "penstock_e2e_request_latency_seconds", "From arrival to the end.", buckets=SECONDS, registry=registry
        )
        self.prompt_length = Histogram(
            "penstock_request_prompt_tokens", "Tokens of a request's prompt.", buckets=TOKENS, registry=registry
        )
        self.output_length = Histogram(
            "penstock_request_generation_tokens", "Tokens made for a request.", buckets=TOKENS, registry=registry
        )
        self.finished = Counter(
            "penstock_completions", "Completions that ended, by reason.", ["finished_reason"], registry=registry
        )
        self.refused = Counter("penstock_requests_refused", "Requests answered 429.", registry=registry)
        self.answers = Counter("penstock_http_responses", "Answers.", ["route", "status"], registry=registry)
        registry.register(_EngineMetrics(loop, model))

    def text(self) -> bytes:
        """All of it in Prometheus's text format."""
        return generate_latest(self.registry)


class _EngineMetrics(Collector):
    """Read from the engine's statistics when asked."""

    def __init__(self, loop: EngineLoop, model: str) -> None:
        self._loop = loop
        self._model = model

    def collect(self) -> Iterable[Metric]:
        now = self._loop.statistics
        for family, described in ((CounterMetricFamily, COUNTERS), (GaugeMetricFamily, GAUGES)):
            for name, sentence, field in described:
                if hasattr(now, field):
                    yield family(f"penstock_{name}", sentence, getattr(now, field))
        held = now.num_pages - now.num_free_pages
        yield GaugeMetricFamily("penstock_kv_cache_usage_ratio", "Pages held by completions, of all.", held / now.num_pages)
        alive = GaugeMetricFamily("penstock_engine_alive", "1 while requests are computed.", float(self._loop.alive))
        yield alive
        facts = {"version": sys.modules["penstock"].__version__, "model": self._model}
        yield InfoMetricFamily("penstock_build", "Version and model.", facts)
        yield _operators()


def _operators() -> Metric:
    """The implementation each operator has run with so far, and why not one before it."""
    import penstock.ops
    from penstock.core.op import Op

    family = GaugeMetricFamily(
        "penstock_operator_info",
        "Implementations picked so far; passed_over says why not the ones before.",
        labels=["operator", "implementation", "passed_over"],
    )
    operators = sorted((value for value in vars(penstock.ops).values() if isinstance(value, Op)), key=lambda each: each.name)
    for operator in operators:
        for implementation, reasons in operator.choices().items():
            passed_over = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
            family.add_metric([operator.name, implementation, passed_over], 1.0)
    return family
