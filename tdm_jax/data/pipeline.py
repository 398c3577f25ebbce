"""Batches as a pure function of (config, step): for any number of threads, workers and hosts.

Every step has one global batch: rows step · b to (step + 1) · b of an endless, reshuffled stream of
examples, each augmented with a generator seeded by its place in the stream. A host computes only
its own, contiguous share of the rows. So a run may stop and go on elsewhere, on other hosts, with
the batches that it would have seen.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np
from absl import flags, logging

from tdm_jax.data import images, transforms
from tdm_jax.data.config import DataConfig
from tdm_jax.data.source import Source
from tdm_jax.data.sources import open_source
from tdm_jax.errors import InputError

Batch = dict[str, np.ndarray]

# Threads and workers pass chunks of a batch, not whole batches: a first batch is ready sooner, and
# as many batches need not be in memory as there are threads.
_MAX_CHUNK = 16
# Chunks that are ready or under way for each thread.
_AHEAD = 2


class Batches(Iterator[Batch]):
    """An iterator over batches that reports, and finally refuses, unreadable images."""

    def __init__(
        self, chunks: grain.DatasetIterator, per_batch: int, source: Source, max_corrupt: int
    ):
        """Joins `per_batch` chunks at a time; `source` gives the names of unreadable images."""
        self._chunks, self._per_batch = chunks, per_batch
        self._source, self._max_corrupt = source, max_corrupt
        self._seen: dict[int, str] = {}

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
          InputError: more than `max_corrupt` different images could not be read.
        """
        parts = [next(self._chunks) for _ in range(self._per_batch)]
        for part in parts:
            self._report(part.pop("corrupt"))
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    @property
    def corrupt(self) -> tuple[str, ...]:
        """Places of the unreadable images met so far, in the order in which they were met."""
        return tuple(self._seen.values())

    def close(self) -> None:
        """Stops the threads and workers."""
        self._chunks.close()

    def _report(self, indices: np.ndarray) -> None:
        for index in (int(i) for i in indices if int(i) not in self._seen):
            self._seen[index] = self._source.describe(index)
            logging.warning(
                "unreadable image %s (%d so far, at most %d)",
                self._seen[index], len(self._seen), self._max_corrupt,
            )  # fmt: skip
        if len(self._seen) == len(self._source):
            self.close()
            raise InputError(
                f"not one of the {len(self._source)} images can be read, from "
                f"{self._source.describe(0)} on"
            )
        if len(self._seen) > self._max_corrupt:
            self.close()
            first, rest = self.corrupt[:10], len(self._seen) - 10
            raise InputError(
                f"{len(self._seen)} unreadable images, more than data.max_corrupt="
                f"{self._max_corrupt}: {', '.join(first)}{f' and {rest} more' if rest > 0 else ''}"
            )


def num_examples(config: DataConfig, split: str) -> int:
    """How many examples the "train" or "validation" split has."""
    return len(open_source(config, split))


def num_classes(config: DataConfig) -> int:
    """How many classes there are; labels lie below."""
    return _labelled(config).num_classes


def class_names(config: DataConfig) -> tuple[str, ...] | None:
    """Their names in the order of the labels, where the source knows them."""
    return _labelled(config).class_names


def _labelled(config: DataConfig) -> Source:
    """The training split, or the validation split of data that has no other."""
    try:
        return open_source(config, "train")
    except InputError:
        return open_source(config, "validation")


def train_batches(
    config: DataConfig, *, start_step: int = 0, process_index: int = 0, process_count: int = 1
) -> Batches:
    """Endless training batches from `start_step` on; this process's share of each.

    An image that cannot be decoded is replaced by the next one of the source, with its label.

    Args:
      config: what to read.
      start_step: the step of the first batch; seeking is immediate.
      process_index: this host.
      process_count: number of hosts; they take contiguous rows of the global batch, in order.

    Returns:
      An iterator of image uint8 [b / process_count, h, w, channels] and label int32
      [b / process_count].

    Raises:
      InputError: the data cannot be opened, or the batch does not divide over the hosts.
    """
    source = open_source(config, "train")
    local = _local_batch(config.batch_size, process_index, process_count)
    order = grain.MapDataset.range(len(source)).seed(config.seed).shuffle().repeat()
    if config.repeats > 1:
        spacing = max(1, config.batch_size // config.repeats)
        order = _Reindexed(
            order, functools.partial(repeated, repeats=config.repeats, spacing=spacing), len(order)
        )
    examples = order.random_map(
        functools.partial(_load_train, source, transforms.TrainTransform(config), config)
    )
    rows = functools.partial(
        host_row, batch=config.batch_size, local=local, host=process_index, step=start_step
    )
    steps = len(examples) // config.batch_size - start_step
    return _batches(config, source, _Reindexed(examples, rows, steps * local), local)


def eval_batches(
    config: DataConfig,
    split: str = "validation",
    *,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Every example of a split once, in order; this process's share of each batch.

    Args:
      config: what to read; a global batch has `eval_batch_size` rows (`batch_size` if that is 0).
      split: "validation" or "train".
      start_step: the step of the first batch; seeking is immediate.
      process_index: this host.
      process_count: number of hosts; each gets the same number of batches, all of one shape.

    Returns:
      An iterator of image uint8 [b, h, w, channels], label int32 [b] and mask float32 [b]. The mask
      is 0 for the padding of the last batch, and for images that cannot be decoded: those are
      reported, and beyond `max_corrupt` of them evaluation stops.

    Raises:
      InputError: as for `train_batches`.
    """
    source = open_source(config, split)
    batch = config.eval_batch_size or config.batch_size
    local = _local_batch(batch, process_index, process_count)
    steps = -(-len(source) // batch)
    examples = grain.MapDataset.range(steps * batch).map(
        functools.partial(_load_eval, source, transforms.EvalTransform(config), config)
    )
    rows = functools.partial(
        host_row, batch=batch, local=local, host=process_index, step=start_step
    )
    left = (steps - start_step) * local
    return _batches(config, source, _Reindexed(examples, rows, left), local)


def host_row(row: int, *, batch: int, local: int, host: int, step: int) -> int:
    """Place in the global stream of a host's `row`, counted from the first row of `step`."""
    passed, within = divmod(row, local)
    return (step + passed) * batch + host * local + within


def repeated(row: int, *, repeats: int, spacing: int) -> int:
    """Which shuffled image fills a row of the stream, if each fills `repeats` rows in all.

    The copies lie `spacing` rows apart, the batch's size over `repeats`: in one batch, but never
    beside each other, where mixup would blend an image with itself.
    """
    block, within = divmod(row, repeats * spacing)
    return block * spacing + within % spacing


class _Reindexed(grain.MapDataset):
    """A dataset's elements in another order."""

    def __init__(self, parent: grain.MapDataset, place: Callable[[int], int], length: int):
        super().__init__(parent)
        self._place, self._length = place, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int | slice) -> object:
        if isinstance(index, slice):
            return self.slice(index)
        return self._parent[self._place(index)]


def _local_batch(batch: int, process_index: int, process_count: int) -> int:
    if not 0 <= process_index < process_count:
        raise InputError(f"process_index {process_index} of {process_count}")
    if batch % process_count:
        raise InputError(f"batch size {batch} does not divide over {process_count} processes")
    return batch // process_count


def _batches(config: DataConfig, source: Source, rows: grain.MapDataset, local: int) -> Batches:
    chunk = next(size for size in range(min(local, _MAX_CHUNK), 0, -1) if local % size == 0)
    threads = config.threads or _cores()
    chunks = rows.batch(chunk, drop_remainder=True, batch_fn=_stack).to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads * _AHEAD)
    )
    if config.workers:
        if not flags.FLAGS.is_parsed():
            raise InputError(
                "data.workers needs absl's flags parsed: call flags.FLAGS(sys.argv), or set it to 0"
            )
        chunks = chunks.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.workers))
    return Batches(iter(chunks), local // chunk, source, config.max_corrupt)


def _cores() -> int:
    """Cores that this process may use; a scheduler often grants fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _stack(elements: Sequence[dict]) -> Batch:
    batch = {
        "image": np.stack([element["image"] for element in elements]),
        "label": np.asarray([element["label"] for element in elements], np.int32),
        "corrupt": np.asarray([i for element in elements for i in element["corrupt"]], np.int64),
    }
    if "mask" in elements[0]:
        batch["mask"] = np.asarray([element["mask"] for element in elements], np.float32)
    return batch


def _load_train(
    source: Source,
    transform: transforms.TrainTransform,
    config: DataConfig,
    index: int,
    rng: np.random.Generator,
) -> dict:
    """One augmented example; after one failure too many, a blank that carries the failures."""
    corrupt: list[int] = []
    while len(corrupt) <= config.max_corrupt and len(corrupt) < len(source):
        place = (index + len(corrupt)) % len(source)
        try:
            record = source[place]
            image = transform(images.open_image(record["image"]), rng)
            return {"image": image, "label": record["label"], "corrupt": corrupt}
        except (images.CorruptImage, OSError):
            corrupt.append(place)
    return {"image": _blank(config), "label": 0, "corrupt": corrupt}


def _load_eval(
    source: Source, transform: transforms.EvalTransform, config: DataConfig, index: int
) -> dict:
    """One example; a blank with mask 0 for padding and for what cannot be decoded."""
    blank = {"image": _blank(config), "label": 0, "mask": 0.0, "corrupt": []}
    if index >= len(source):
        return blank
    try:
        record = source[index]
        image = transform(images.open_image(record["image"]))
        return {"image": image, "label": record["label"], "mask": 1.0, "corrupt": []}
    except (images.CorruptImage, OSError):
        return {**blank, "corrupt": [index]}


def _blank(config: DataConfig) -> np.ndarray:
    return np.zeros((*config.image_size, config.channels), np.uint8)
