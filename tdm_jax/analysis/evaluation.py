"""Candidates on a data set: each model's images prepared as it says, each model compiled once."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, UInt8

from tdm_jax import data
from tdm_jax.analysis import costs
from tdm_jax.analysis.calibration import calibrate
from tdm_jax.analysis.candidate import Candidate, check_weights
from tdm_jax.analysis.results import Result
from tdm_jax.data import DataConfig
from tdm_jax.data.device_transforms import normalise
from tdm_jax.data.preprocessing import data_config_for
from tdm_jax.models.info import Stage
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.parallel import sharding
from tdm_jax.training.evaluator import Evaluator, check_fits


class Evaluation:
    """Evaluates candidates on all devices; what was compiled for a model serves all its weights."""

    def __init__(
        self,
        settings: Mapping[str, Any] | None = None,
        config: DataConfig | None = None,
        *,
        explains: bool = False,
    ) -> None:
        """Says which data; they are opened when a model is known.

        Args:
          settings: of `data_config_for`, before what a model says of its images.
          config: of a training, whose data are meant; how images are prepared a model that says so
            knows better.
          explains: whether `explain` will be asked for. It shares the evaluation's program.
        """
        self._settings, self._config = dict(settings or {}), config
        self._explains = explains
        self._mesh = sharding.make_mesh(sharding.MeshConfig())
        self._evaluators: dict[VisionTransformer, Evaluator] = {}

    def data_config(self, model: VisionTransformer) -> DataConfig:
        """The data as a model wants them."""
        base = {} if self._config is None else dataclasses.asdict(self._config)
        if base and model.preprocessing is not None:
            base |= dataclasses.asdict(model.preprocessing)
        return data_config_for(model, **{**base, **self._settings})

    def check(self, candidates: Sequence[Candidate]) -> None:
        """Raises InputError, before long work, if one has no weights or does not fit the data."""
        check_weights(candidates)
        for model in dict.fromkeys(candidate.model for candidate in candidates):
            check_fits(model, self.data_config(model))

    def __call__(self, candidate: Candidate, *, bar: str = "") -> dict[str, float]:
        """What `Evaluator` finds on the validation split; a bar with that label shows progress."""
        evaluator, variables = self._placed(candidate)
        return evaluator(variables, bar=bar)

    def explain(
        self, candidate: Candidate, images: UInt8[np.ndarray, "b h w c"]
    ) -> tuple[Float[Array, "b k"], tuple[Stage, ...], Float[Array, "b p d"]]:
        """The logits of some images, what became of their patches, and each patch's feature."""
        evaluator, variables = self._placed(candidate)
        return evaluator.explain(variables, images)

    def _placed(self, candidate: Candidate) -> tuple[Evaluator, PyTree]:
        check_weights([candidate])
        model, variables = candidate.model, candidate.variables
        if model not in self._evaluators:
            self._evaluators[model] = Evaluator(
                model, self.data_config(model), self._mesh, variables, explains=self._explains
            )
        placed = jax.device_put(variables, sharding.state_shardings(self._mesh, variables))
        return self._evaluators[model], placed

    def training_images(
        self, model: VisionTransformer, batches: int
    ) -> Iterator[Float[Array, "b h w c"]]:
        """Some batches of the training split, shuffled, not augmented, normalised for a model."""
        config = self.data_config(model)
        size = config.eval_batch_size or config.batch_size
        size = min(size, data.num_examples(config, "train"))
        config = dataclasses.replace(config, batch_size=size, repeats=1, augmentation="none")
        for batch in itertools.islice(data.train_batches(config), batches):
            yield normalise(jnp.asarray(batch["image"]), config.mean, config.std)

    def calibrated(self, candidates: Sequence[Candidate], batches: int) -> list[Candidate]:
        """The candidates, what adaptive methods leave open fixed on batches of training images.

        Raises:
          InputError: one has no weights, or does not fit the data.
        """
        if not batches:
            return list(candidates)
        self.check(candidates)
        return [self._calibrated(candidate, batches) for candidate in candidates]

    def _calibrated(self, candidate: Candidate, batches: int) -> Candidate:
        model = candidate.model
        if not model.reducer.calibrates:
            return candidate
        images = self.training_images(model, batches)
        model = model.clone(reducer=calibrate(model, candidate.variables, images))
        return dataclasses.replace(candidate, model=model)


def evaluate(candidate: Candidate, evaluation: Evaluation) -> Result:
    """Accuracy, loss and cost of a candidate on the validation split."""
    accuracy = evaluation(candidate, bar=candidate.method)
    cost = costs.count(candidate.model)
    return Result(
        **candidate.row,
        top1_percent=accuracy["top1"],
        top5_percent=accuracy["top5"],
        loss=accuracy["loss"],
        examples=int(accuracy["count"]),
        parameters=cost.parameters,
        macs=cost.macs,
        tokens=cost.tokens,
        evaluated_images_per_second=accuracy["images_per_second"],
    )
