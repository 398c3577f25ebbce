"""What a request may ask for, and how one that asks for more is refused."""

import dataclasses

from tdm_jax.errors import InputError


class Refusal(Exception):
    """Ends a request: a message of one line, under an HTTP status."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(" ".join(message.split()))
        self.status, self.headers = status, headers


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one replica accepts.

    Attributes:
      body_bytes: of a request, images and all.
      images: of a request.
      pixels: of an image, by its header, before it is decoded.
      aspect: of an image's longer side over its shorter one: what is resized to cover the model's
        size grows with it.
      queue: images accepted and not answered yet.
      seconds: from a request's first byte to its answer.
      retry_after: seconds that a client is asked to wait when the queue is full.
    """

    body_bytes: int = 16 * 2**20
    images: int = 32
    pixels: int = 25_000_000
    aspect: float = 50.0
    queue: int = 256
    seconds: float = 10.0
    retry_after: int = 1

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  (a configuration's typing errors)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                got = getattr(self, field.name)
                raise InputError(f"limits.{field.name}: expected more than 0; got {got}")
        if self.images > self.queue:
            raise InputError(
                f"limits.images: expected at most limits.queue={self.queue}; got {self.images}"
            )

    def check_body(self, count: int) -> None:
        """Refuses a body of so many bytes, or one that has so many already."""
        if count > self.body_bytes:
            raise Refusal(413, f"expected a body of at most {self.body_bytes} bytes")

    def check_images(self, count: int) -> None:
        """Refuses a request for so many images."""
        if count > self.images:
            raise Refusal(413, f"expected at most {self.images} images in a request")

    def check_size(self, width: int, height: int) -> None:
        """Refuses an image of so many pixels."""
        if width * height > self.pixels:
            raise Refusal(413, f"expected at most {self.pixels} pixels; got {width}x{height}")
        if max(width, height) > self.aspect * min(width, height):
            raise Refusal(
                422, f"expected sides in a ratio of at most {self.aspect:g}; got {width}x{height}"
            )

    def check_queue(self, waiting: int, more: int) -> None:
        """Refuses further images beside those that wait."""
        if waiting + more > self.queue:
            raise Refusal(
                503,
                f"busy: {waiting} images wait, of at most {self.queue}",
                **{"Retry-After": str(self.retry_after)},
            )
