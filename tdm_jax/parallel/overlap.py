"""Host and devices at work at the same time, and where the time of both goes.

A batch is computed while the host fetches the answers to the one before, hands them on and waits
for the next to be decoded. So a device idles only if the host needs longer for all of that than the
device for a batch. How long it does idle a thread finds out that waits for what each batch leads
to; nothing else waits for it.
"""

import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar

import jax
from jaxtyping import PyTree

Batch = TypeVar("Batch")


@dataclasses.dataclass(frozen=True)
class Road:
    """Where the time went from encoded images to answers on the host.

    It is counted from the first batch's answers on, without which nothing was compiled. What the
    host had decoded by then is counted too, so that short roads look faster than they are.

    Attributes:
      images: rows of the batches, padding included.
      seconds: of the whole.
      program_seconds: of it the devices computed.
      transfer_seconds: of it they waited for a batch under way to them.
      data_seconds: of it the host waited for a batch to be read and decoded.
      answer_seconds: of it the host waited for answers, which is where its time should go.
    """

    images: int
    seconds: float
    program_seconds: float
    transfer_seconds: float
    data_seconds: float
    answer_seconds: float

    def rates(self) -> dict[str, Any]:
        """What follows from it, by the names that a `Result` has for it.

        Images a second; while devices computed; and shares of the time: that they computed, that
        they waited for transfers, and that the host waited for images and for answers.
        """
        return {
            "road_images_per_second": self.images / self.seconds,
            "device_images_per_second": self.images / self.program_seconds,
            "device_busy": self.program_seconds / self.seconds,
            "device_transfers": self.transfer_seconds / self.seconds,
            "host_data": self.data_seconds / self.seconds,
            "host_answers": self.answer_seconds / self.seconds,
        }

    def __str__(self) -> str:
        return (
            "{road_images_per_second:.1f} images/s, {device_images_per_second:.1f} while devices "
            "computed; devices: {device_busy:.1%} computing, {device_transfers:.1%} waiting for "
            "transfers; host: {host_data:.1%} waiting for images, {host_answers:.1%} for answers"
        ).format(**self.rates())


class Clock:
    """Finds out where the time of `ahead` goes."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._watch = threading.Thread(target=self._watch_devices, daemon=True)
        self._first = self._last = 0.0
        self._batches: list[int] = []
        self._program = self._transfer = 0.0
        self._waits = {"data": 0.0, "answers": 0.0}

    @property
    def road(self) -> Road | None:
        """What was found out; None of fewer than two batches."""
        if len(self._batches) < 2:
            return None
        return Road(
            images=sum(self._batches[1:]),
            seconds=self._last - self._first,
            program_seconds=self._program,
            transfer_seconds=self._transfer,
            data_seconds=self._waits["data"],
            answer_seconds=self._waits["answers"],
        )

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """While it does, devices are watched; behind it `road` is known."""
        self._watch.start()
        try:
            yield
        finally:
            self._events.put(None)
            self._watch.join()

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """The host waits for "data" or "answers"."""
        start = time.perf_counter()
        yield
        if self._batches:
            self._waits[what] += time.perf_counter() - max(start, self._first)

    def sends(self, start: float, placed: PyTree) -> None:
        """A batch has been under way to the devices since `start`."""
        self._events.put((start, placed))

    def asks(self, answers: PyTree) -> None:
        """Its answers have been asked for."""
        self._events.put(answers)

    def _watch_devices(self) -> None:
        # An error is raised where the answers are fetched.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            while (event := self._events.get()) is not None:
                start, placed = event
                jax.block_until_ready(placed)
                there = time.perf_counter()
                answers = self._events.get()
                if answers is None:
                    return
                jax.block_until_ready(answers)
                done = time.perf_counter()
                if self._batches:
                    # Before, the devices had work, or nothing to wait for.
                    start = max(start, self._last)
                    self._transfer += max(0.0, there - start)
                    self._program += done - max(there, start)
                else:
                    self._first = done
                self._last = done
                self._batches.append(len(jax.tree.leaves(placed)[0]))


def ahead(
    batches: Iterable[Batch],
    place: Callable[[Batch], PyTree],
    answer: Callable[[Batch, PyTree], PyTree],
    clock: Clock | None = None,
) -> Generator[tuple[Batch, PyTree], None, None]:
    """Batches with the answers to them; each is asked for before the last one's are fetched.

    At most two batches are on the devices.

    Args:
      batches: on the host.
      place: sends a batch to the devices; every leaf begins with the batch's axis.
      answer: asks for what is wanted of a batch, sent: arrays on the devices.
      clock: a new one, to find out where the time goes.
    """
    clock = clock or Clock()
    pending: Any = None
    with clock.running():
        source = iter(batches)
        while True:
            with clock.waiting("data"):
                batch = next(source, None)
            answers = None
            if batch is not None:
                start = time.perf_counter()
                placed = place(batch)
                clock.sends(start, placed)
                answers = answer(batch, placed)
                clock.asks(answers)
                for leaf in jax.tree.leaves(answers):
                    leaf.copy_to_host_async()
            if pending is not None:
                with clock.waiting("answers"):
                    fetched = jax.device_get(pending[1])
                yield pending[0], fetched
            if batch is None:
                return
            pending = batch, answers
