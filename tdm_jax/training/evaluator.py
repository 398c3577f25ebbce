"""Accuracy of a model on a data set: compiled once, for variables that come and go."""

import dataclasses
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree
from tqdm import tqdm

from tdm_jax import data
from tdm_jax.data import DataConfig
from tdm_jax.errors import InputError
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.parallel import sharding
from tdm_jax.parallel.overlap import ahead
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
    ) -> None:
        """Compiles; of `variables` shapes suffice. The batch is rounded up to fill all devices.

        Raises:
          InputError: the data have other images or classes than the model.
        """
        check_fits(model, data_config)
        size = data_config.eval_batch_size or data_config.batch_size
        size = -(-size // mesh.size) * mesh.size
        self._data_config = dataclasses.replace(data_config, eval_batch_size=size)
        self._mesh = mesh
        self._step = lower_eval_step(model, self._data_config, size, mesh, variables).compile()

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

    def _sums(self, variables: PyTree, batches: tqdm) -> Iterator[dict]:
        def place(batch: dict[str, np.ndarray]) -> PyTree:
            return sharding.place_batch(self._mesh, batch)

        for _, sums in ahead(batches, place, lambda _, placed: self._step(variables, placed)):
            yield sums


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
