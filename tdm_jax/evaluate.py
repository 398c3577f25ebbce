"""Evaluates a checkpoint with any reducer: `python -m tdm_jax.evaluate --checkpoint=...`.

`--checkpoint` is a training's working directory, a converted folder, a .pth or a .safetensors. The
data are those of the training, of `--config`, or `--data` with `--data_dir`. The result is printed
as a table, and written as JSON where `--output` says.
"""

import dataclasses
import time
from collections.abc import Iterable
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import PyTree

from tdm_jax import data, metrics, partition
from tdm_jax.data import DataConfig
from tdm_jax.train_step import lower_eval_step


class Evaluator:
    """Evaluates parameters of one model on one split; compiled once, used many times."""

    def __init__(self, model: nn.Module, source: DataConfig, mesh: Mesh, params: PyTree) -> None:
        """Compiles; of `params` shapes suffice. The batch is rounded up to fill all devices."""
        wanted = source.eval_batch_size or source.batch_size
        size = -(-wanted // mesh.size) * mesh.size
        self._source = dataclasses.replace(source, eval_batch_size=size)
        self._mesh = mesh
        self._step = lower_eval_step(model, self._source, size, mesh, params).compile()

    def __call__(self, params: PyTree, split: str = "validation") -> dict[str, float]:
        """Top-1 and top-5 in percent, mean loss, number of examples and images per second."""
        batches = data.eval_batches(
            self._source,
            split,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        then = time.monotonic()
        result = metrics.summarise(self._sums(params, batches))
        result["images_per_second"] = result["count"] / (time.monotonic() - then)
        return result

    def _sums(self, params: PyTree, batches: Iterable[dict[str, Any]]) -> Iterable[dict]:
        previous = None
        for batch in batches:
            sums = self._step(params, partition.place_batch(self._mesh, batch))
            # One batch ahead: the device works while the host decodes.
            if previous is not None:
                yield jax.device_get(previous)
            previous = sums
        if previous is not None:
            yield jax.device_get(previous)
