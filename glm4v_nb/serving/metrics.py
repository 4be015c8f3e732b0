"""What the service counts, for Prometheus."""

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

# To the first token: an image in the queue's front takes a tenth of a second, a full queue minutes.
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """One for a service; ``text`` is what ``/metrics`` answers."""

    def __init__(self):
        self.registry = CollectorRegistry()
        prefix = {"namespace": "glm4v_nb", "registry": self.registry}
        self.waiting = Gauge("requests_waiting", "Requests in the queue.", **prefix)
        self.running = Gauge("requests_running", "Requests that are answered now.", **prefix)
        self.positions = Gauge("cache_positions_used", "Positions of running requests.", **prefix)
        self.prompt_tokens = Counter("prompt_tokens", "Positions of prompts, answered.", **prefix)
        self.new_tokens = Counter("generated_tokens", "Tokens of answers.", **prefix)
        self.first_token = Histogram(
            "first_token_seconds", "From a request to its first token.", buckets=_SECONDS, **prefix
        )
        self.finished = Counter(
            "requests_finished", "Requests that were let in, by their end.", ["reason"], **prefix
        )
        self.refused = Counter(
            "requests_refused", "Requests that were not let in.", ["reason"], **prefix
        )
        cards = range(torch.cuda.device_count())
        allocated = Gauge("allocated_bytes", "By PyTorch, of a card.", ["card"], **prefix)
        for card in cards:
            allocated.labels(card).set_function(lambda card=card: torch.cuda.memory_allocated(card))

    def text(self) -> bytes:
        return generate_latest(self.registry)
