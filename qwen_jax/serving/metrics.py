"""What /metrics shows, in Prometheus' text format."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qwen_jax.serving.worker import Worker

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Of one server."""

    def __init__(self, worker: Worker):
        self._registry = CollectorRegistry()
        self._registry.register(_OfEngine(worker))
        self._requests = Counter(
            "qwen_jax_requests", "Requests by path and status.", ["path", "status"],
            registry=self._registry,
        )  # fmt: skip
        self._seconds = self._histogram("request_seconds", "Of a request, streaming included.")
        self._first = self._histogram("first_token_seconds", "Until an answer's first text.")

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"qwen_jax_{name}", text, buckets=_SECONDS, registry=self._registry)

    def ended(self, path: str, status: int, seconds: float) -> None:
        """Counts a request."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.observe(seconds)

    def began(self, seconds: float) -> None:
        """Counts a first piece of text."""
        self._first.observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _OfEngine(Collector):
    """Numbers that the worker has anyway."""

    def __init__(self, worker: Worker):
        self._worker = worker

    def collect(self) -> Iterator[Metric]:
        sums, worker = self._worker.timings, self._worker
        counters: dict[str, tuple[float, str]] = {
            "prompt_tokens": (sums.prompt_tokens, "Of prompts that have begun."),
            "shared_tokens": (sums.shared_tokens, "Those of them that were in the cache."),
            "generated_tokens": (sums.generated_tokens, "Of answers."),
            "drafted_tokens": (sums.drafted_tokens, "Of drafts."),
            "accepted_tokens": (sums.accepted_tokens, "Those of them that are in answers."),
        }
        for name, (value, text) in counters.items():
            yield CounterMetricFamily(f"qwen_jax_{name}", text, value)
        gauges: dict[str, tuple[Callable[[], int], str]] = {
            "answers_present": (lambda: worker.present, "Answers that are made or wait."),
            "answers_waiting": (lambda: worker.waiting, "Answers that have no slot yet."),
        }
        for name, (now, text) in gauges.items():
            yield GaugeMetricFamily(f"qwen_jax_{name}", text, now())
