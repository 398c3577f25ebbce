"""Batches that form while the device is busy, of the sizes that are compiled.

`ray.serve.batch` closes a batch after its waiting time even if the one before still runs, so under
load it hands over many small ones. Here what arrives meanwhile joins the next batch.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Float, UInt8

Image = UInt8[np.ndarray, "h w c"]
Row = Float[np.ndarray, " n"]


def best_size(waiting: int, seconds: Mapping[int, float]) -> int:
    """The batch size that answers most of the waiting images in a second; of equals the largest.

    On a device that takes hardly longer for eight than for five, five are padded to eight; where
    time grows with the size they are four and one.

    Args:
      waiting: images, at least one.
      seconds: that a batch takes, by its size.
    """
    return max(seconds, key=lambda size: (min(waiting, size) / seconds[size], size))


def padded(images: Sequence[Image], size: int) -> UInt8[np.ndarray, "b h w c"]:
    """A batch: the images, and black ones behind them."""
    batch = np.zeros((size, *images[0].shape), np.uint8)
    batch[: len(images)] = images
    return batch


class Batcher:
    """One device's queue: images of several levels, each batch of one of them, the oldest first."""

    def __init__(
        self,
        seconds: Sequence[Mapping[int, float]],
        run: Callable[[int, UInt8[np.ndarray, "b h w c"]], Float[np.ndarray, "b n"]],
        wait_seconds: float = 0.0,
        formed: Callable[[int, int, int], None] = lambda level, images, size: None,
    ) -> None:
        """Starts its work with the first image, in that one's event loop.

        Args:
          seconds: for each level what a batch takes, by its size.
          run: a level's answers to a batch; called in a thread, one at a time.
          wait_seconds: that an idle device waits for a fuller batch.
          formed: told each batch's level, images and size.
        """
        self._seconds, self._run, self._wait, self._formed = seconds, run, wait_seconds, formed
        self._queues: list[deque[tuple[float, Image, asyncio.Future]]] = [deque() for _ in seconds]
        self._arrived = asyncio.Event()
        self._device = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._task: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        """Whether it still takes images."""
        return self._task is None or not self._task.done()

    async def answer(self, level: int, image: Image) -> Row:
        """A level's answer to an image; to give up, cancel it."""
        loop = asyncio.get_running_loop()
        if self._task is None:
            self._task = loop.create_task(self._work())
        answer = loop.create_future()
        self._queues[level].append((loop.time(), image, answer))
        self._arrived.set()
        return await answer

    async def _work(self) -> None:
        while True:
            await self._arrived.wait()
            await asyncio.sleep(self._wait)
            while (level := self._oldest()) is not None:
                await self._batch(level)
            self._arrived.clear()

    async def _batch(self, level: int) -> None:
        """Takes a batch of a level from its queue, runs it, and hands out the answers."""
        queue = self._queues[level]
        size = best_size(len(queue), self._seconds[level])
        taken = [queue.popleft() for _ in range(min(size, len(queue)))]
        images, answers = [one[1] for one in taken], [one[2] for one in taken]
        self._formed(level, len(taken), size)
        loop = asyncio.get_running_loop()
        try:
            batch = padded(images, size)
            rows = await loop.run_in_executor(self._device, self._run, level, batch)
        except Exception as error:  # whatever it is, these callers get it and others go on
            for answer in answers:
                if not answer.done():
                    answer.set_exception(error)
            return
        for answer, row in zip(answers, rows, strict=False):
            if not answer.done():
                answer.set_result(row)

    def _oldest(self) -> int | None:
        """The level whose first image has waited longest, without those that were given up."""
        for queue in self._queues:
            live = [one for one in queue if not one[2].done()]
            queue.clear()
            queue.extend(live)
        waiting = [level for level, queue in enumerate(self._queues) if queue]
        return min(waiting, key=lambda level: self._queues[level][0][0], default=None)
