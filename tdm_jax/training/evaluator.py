"""Accuracy of a model on a data set: compiled once, for parameters that come and go."""

import dataclasses
import time
from collections.abc import Iterator

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree
from tqdm import tqdm

from tdm_jax import data
from tdm_jax.data import DataConfig
from tdm_jax.errors import InputError
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.parallel import sharding
from tdm_jax.training import metrics
from tdm_jax.training.step import lower_eval_step


class Evaluator:
    """Evaluates parameters of one model on one data set; compiled once, used many times."""

    def __init__(
        self, model: VisionTransformer, source: DataConfig, mesh: Mesh, params: PyTree
    ) -> None:
        """Compiles; of `params` shapes suffice. The batch is rounded up to fill all devices.

        Raises:
          InputError: the data have other images or classes than the model.
        """
        check_fits(model, source)
        wanted = source.eval_batch_size or source.batch_size
        size = -(-wanted // mesh.size) * mesh.size
        self._source = dataclasses.replace(source, eval_batch_size=size)
        self._mesh = mesh
        self._step = lower_eval_step(model, self._source, size, mesh, params).compile()

    def __call__(
        self, params: PyTree, split: str = "validation", *, bar: str = ""
    ) -> dict[str, float]:
        """Top-1 and top-5 in percent, mean loss, number of examples and images per second.

        Args:
          params: of the model, laid out as `sharding.state_shardings` says.
          split: "validation" or "train".
          bar: label of a progress bar; none without one.
        """
        batches = data.eval_batches(
            self._source,
            split,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        steps = -(-data.num_examples(self._source, split) // self._source.eval_batch_size)
        shown = tqdm(batches, bar, steps, disable=not bar or jax.process_index() > 0)
        then = time.monotonic()
        result = metrics.summarise(self._sums(params, shown))
        result["images_per_second"] = result["count"] / (time.monotonic() - then)
        return result

    def _sums(self, params: PyTree, batches: tqdm) -> Iterator[dict]:
        previous = None
        for batch in batches:
            sums = self._step(params, sharding.place_batch(self._mesh, batch))
            # One batch ahead: the device works while the host decodes.
            if previous is not None:
                yield jax.device_get(previous)
            previous = sums
        if previous is not None:
            yield jax.device_get(previous)


def check_fits(model: VisionTransformer, source: DataConfig) -> None:
    """Raises InputError if the data have other images or classes than the model."""
    expected = (*model.image_size, model.in_channels)
    got = (*source.image_size, source.channels)
    if got != expected:
        raise InputError(f"{source.name} gives images of {got}; the model takes {expected}")
    classes = data.num_classes(source)
    if classes != model.num_classes:
        raise InputError(f"{source.name} has {classes} classes; the model has {model.num_classes}")
