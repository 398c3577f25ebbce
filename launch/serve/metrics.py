"""What a replica counts, in Ray's metrics: Prometheus reads them as `ray_tdm_serve_...`."""

from ray.serve.metrics import Counter, Gauge, Histogram

SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30]
IMAGES = [1.0, 2, 4, 8, 16, 32, 64, 128]


class Counts:
    """The metrics of one replica; Ray adds its name to each."""

    def __init__(self) -> None:
        self._requests = Counter("tdm_serve_requests", "Requests, by status.", ("status",))
        self._seconds = Histogram(
            "tdm_serve_latency_seconds", "From headers to answer, by status.", SECONDS, ("status",)
        )
        self._images = Counter("tdm_serve_images", "Images in batches.", ("keep_rate",))
        self._padding = Counter("tdm_serve_padding", "Empty rows of batches.", ("keep_rate",))
        self._batches = Histogram(
            "tdm_serve_batch_images", "Images of each batch.", IMAGES, ("keep_rate",)
        )
        self._waiting = Gauge("tdm_serve_waiting_images", "Images accepted and not yet answered.")

    def answered(self, status: str, seconds: float) -> None:
        """Counts a request."""
        self._requests.inc(tags={"status": status})
        self._seconds.observe(seconds, {"status": status})

    def batch(self, keep_rate: float, images: int, size: int) -> None:
        """Counts a batch of some images, padded to a size."""
        tags = {"keep_rate": f"{keep_rate:g}"}
        self._images.inc(images, tags)
        if size > images:
            self._padding.inc(size - images, tags)
        self._batches.observe(images, tags)

    def waiting(self, images: int) -> None:
        """Says how many images wait."""
        self._waiting.set(images)
