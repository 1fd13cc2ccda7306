"""What `/metrics` tells Prometheus. Names and labels hold nothing of a request's content."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nextblock.server.batching import Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics(Collector):
    """Counts of requests, and what the engine counts itself, read when somebody asks."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.registry = engine, CollectorRegistry()
        of = {"registry": self.registry, "namespace": "nextblock"}
        self.requests = Counter("requests", "Requests answered, by path and status", ["path", "status"], **of)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts", **of)
        self.first = Histogram(
            "time_to_first_token_seconds", "From a request to its first token", buckets=SECONDS, **of
        )
        self.whole = Histogram("request_seconds", "From a request to the end of its answer", buckets=SECONDS, **of)
        self.registry.register(self)

    def collect(self) -> Iterable[Metric]:
        """The engine's own counts."""
        engine, stats = self.engine, self.engine.stats
        yield GaugeMetricFamily("nextblock_rows_running", "Rows in batches", engine.rows)
        yield GaugeMetricFamily("nextblock_rows_waiting", "Rows that wait for a place", engine.waiting)
        yield CounterMetricFamily("nextblock_generated_tokens", "Tokens of answers", value=stats.new_tokens)
        yield CounterMetricFamily("nextblock_forwards", "Forward passes of the model", value=stats.forwards)
        yield CounterMetricFamily("nextblock_drafts", "Drafted tokens that were checked", value=stats.drafts)
        yield CounterMetricFamily("nextblock_drafts_kept", "Drafted tokens that agreed", value=stats.kept)
        passes = CounterMetricFamily("nextblock_row_forwards", "Passes times their rows, by kind", labels=["kind"])
        for kind, count in list(stats.row_forwards.items()):
            passes.add_metric([kind], count)
        yield passes

    def text(self) -> bytes:
        """The exposition format of Prometheus."""
        return generate_latest(self.registry)
