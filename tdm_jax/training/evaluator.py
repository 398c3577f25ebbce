"""Accuracy of a model on a data set: compiled once, for variables that come and go."""

import dataclasses
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree, UInt8
from tqdm import tqdm

from tdm_jax import data
from tdm_jax.data import DataConfig
from tdm_jax.errors import InputError
from tdm_jax.models.info import Stage
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.parallel import sharding
from tdm_jax.training import metrics
from tdm_jax.training.experiment import Experiment
from tdm_jax.training.step import TrainState, lower_eval_step


class Evaluator:
    """Evaluates variables of one model on one data set; compiled once, used many times."""

    def __init__(
        self,
        model: VisionTransformer,
        data_config: DataConfig,
        mesh: Mesh,
        variables: PyTree,
        *,
        explains: bool = False,
    ) -> None:
        """Compiles; of `variables` shapes suffice. The batch is rounded up to fill all devices.

        With `explains` the same program also serves `explain`.

        Raises:
          InputError: the data have other images or classes than the model.
        """
        check_fits(model, data_config)
        size = data_config.eval_batch_size or data_config.batch_size
        size = -(-size // mesh.size) * mesh.size
        self._data_config = dataclasses.replace(data_config, eval_batch_size=size)
        self._mesh, self._explains = mesh, explains
        self._step = lower_eval_step(
            model, self._data_config, size, mesh, variables, explains=explains
        ).compile()

    def __call__(
        self, variables: PyTree, split: str = "validation", *, bar: str = ""
    ) -> dict[str, float]:
        """Top-1 and top-5 in percent, mean loss, number of examples and images per second.

        Args:
          variables: of the model, laid out as `sharding.state_shardings` says.
          split: "validation" or "train".
          bar: label of a progress bar; none without one.
        """
        batches = data.eval_batches(
            self._data_config,
            split,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        steps = -(-data.num_examples(self._data_config, split) // self._data_config.eval_batch_size)
        shown = tqdm(batches, bar, steps, disable=not bar or jax.process_index() > 0)
        start = time.monotonic()
        result = metrics.summarise(self._sums(variables, shown))
        result["images_per_second"] = result["count"] / (time.monotonic() - start)
        return result

    def explain(
        self, variables: PyTree, images: UInt8[np.ndarray, "b h w c"]
    ) -> tuple[Float[Array, "b k"], tuple[Stage, ...], Float[Array, "b p d"]]:
        """The logits of some images, before normalisation; their patches' stages and features."""
        size, parts = self._data_config.eval_batch_size, []
        for part in np.split(images, range(size, len(images), size)):
            filled = np.resize(part, (size, *part.shape[1:]))
            batch = {"image": filled, "label": np.zeros(size, np.int32)}
            batch = sharding.place_batch(self._mesh, batch | {"mask": np.zeros(size, np.float32)})
            leaves, tree = jax.tree.flatten(self._step(variables, batch)[1:])
            parts.append(jax.device_get(leaves))
        joined = [np.concatenate(arrays)[: len(images)] for arrays in zip(*parts, strict=True)]
        return jax.tree.unflatten(tree, map(jnp.asarray, joined))

    def _sums(self, variables: PyTree, batches: tqdm) -> Iterator[dict]:
        previous = None
        for batch in batches:
            sums = self._step(variables, sharding.place_batch(self._mesh, batch))
            sums = sums[0] if self._explains else sums
            # One batch ahead: the device works while the host decodes.
            if previous is not None:
                yield jax.device_get(previous)
            previous = sums
        if previous is not None:
            yield jax.device_get(previous)


class RunEvaluator:
    """All that a training reports of its state; each model is compiled when it is first due."""

    def __init__(self, experiment: Experiment, mesh: Mesh) -> None:
        self._experiment, self._mesh = experiment, mesh
        self._evaluators: dict[str, Evaluator] = {}

    def __call__(self, state: TrainState) -> dict[str, float]:
        """The reducer's own keep rate, the further ones, and the averaged weights if there are."""
        experiment, results = self._experiment, {}
        for prefix, model in experiment.evaluated.items():
            if prefix not in self._evaluators:
                self._evaluators[prefix] = Evaluator(
                    model, experiment.settings.data, self._mesh, state.variables
                )
            results[prefix] = self._evaluators[prefix](state.variables)
        if experiment.recipe.ema_decay > 0.0:
            results["ema/"] = self._evaluators[""](state.ema)
        return {prefix + k: v for prefix, values in results.items() for k, v in values.items()}


def check_fits(model: VisionTransformer, data_config: DataConfig) -> None:
    """Raises InputError if the data have other images or classes than the model."""
    expected = (*model.image_size, model.in_channels)
    got = (*data_config.image_size, data_config.channels)
    if got != expected:
        raise InputError(f"{data_config.name} gives images of {got}; the model takes {expected}")
    classes = data.num_classes(data_config)
    if not model.num_classes:
        raise InputError(
            f"{data_config.name} has {classes} classes; the model has no classifier and answers "
            "with features: expected one with a head, which training adds (reset_head)"
        )
    if classes != model.num_classes:
        raise InputError(
            f"{data_config.name} has {classes} classes; the model has {model.num_classes}"
        )
