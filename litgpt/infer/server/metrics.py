"""What `/metrics` shows, in the format of Prometheus."""

import prometheus_client as prometheus

from litgpt.infer.server.engine_thread import EngineThread


class Metrics:
    """Counters of one server."""

    def __init__(self, thread: EngineThread) -> None:
        self.registry = prometheus.CollectorRegistry()
        self.requests = prometheus.Counter(
            "litgpt_requests", "Requests, by route and status.", ("route", "status"), registry=self.registry
        )
        self.prompt_tokens = prometheus.Counter(
            "litgpt_prompt_tokens", "Tokens of the prompts.", registry=self.registry
        )
        self.generated_tokens = prometheus.Counter(
            "litgpt_generated_tokens", "Generated tokens.", registry=self.registry
        )
        self.first_token = prometheus.Histogram(
            "litgpt_first_token_seconds", "Time from a request to its first token.", registry=self.registry
        )
        for name, text, read in (
            ("running", "Texts that are generated.", lambda: sum(engine.running for engine in thread.engines)),
            ("waiting", "Texts that wait.", lambda: thread.waiting),
            (
                "cached_tokens",
                "Tokens that memory is allocated for.",
                lambda: sum(engine.cache.allocated_tokens for engine in thread.engines),
            ),
        ):
            prometheus.Gauge(f"litgpt_{name}", text, registry=self.registry).set_function(read)

    def render(self) -> bytes:
        """The body of the response."""
        return prometheus.generate_latest(self.registry)
