"""Candidates on a data set: each model's images prepared as it says, each model compiled once."""

import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, UInt8
from tqdm import tqdm

from tdm_jax import data
from tdm_jax.analysis import costs
from tdm_jax.analysis.answers import Answers, Forward
from tdm_jax.analysis.calibration import calibrate
from tdm_jax.analysis.candidate import Candidate, check_weights
from tdm_jax.analysis.fidelity import Reference
from tdm_jax.analysis.outcome import Outcome, mean
from tdm_jax.analysis.results import Result
from tdm_jax.data import DataConfig
from tdm_jax.data.device_transforms import normalise
from tdm_jax.data.pipeline import Batch
from tdm_jax.data.preprocessing import data_config_for
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.parallel.overlap import Clock, ahead
from tdm_jax.training import metrics
from tdm_jax.training.evaluator import check_fits

_judge = jax.jit(metrics.per_example)


class Evaluation:
    """Evaluates candidates on a validation split, on all devices."""

    def __init__(
        self,
        settings: Mapping[str, Any] | None = None,
        config: DataConfig | None = None,
        *,
        fidelity: bool = False,
    ) -> None:
        """Says which data; they are opened when a model is known.

        Args:
          settings: of `data_config_for`, before what a model says of its images.
          config: of a training, whose data are meant; how images are prepared a model that says so
            knows better.
          fidelity: whether candidates are compared with what they are evaluated against.
        """
        self._settings, self._config = dict(settings or {}), config
        self._fidelity = fidelity
        self._forwards: dict[DataConfig, Forward] = {}
        self._against: tuple[Candidate, Reference] | None = None

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
            config = self.data_config(model)
            # Without labels, or without a head, there is fidelity alone.
            if not (self._fidelity and (config.unlabelled or not model.num_classes)):
                check_fits(model, config)

    def __call__(
        self,
        candidate: Candidate,
        against: Candidate | None = None,
        *,
        seed: int | None = None,
        bar: str = "",
    ) -> Outcome:
        """What a candidate answers to the validation split.

        Args:
          candidate: with weights.
          against: what its fidelity is to, where the evaluation was asked for that; None for what
            the candidate is without its method.
          seed: of what a method draws; None for its own.
          bar: label of a progress bar; none without one.

        Raises:
          InputError: see `check`.
        """
        self.check([candidate])
        model, forward, variables, config = self._placed(candidate)
        against = against or candidate.unreduced()
        reference = self._reference(against) if self._fidelity else None
        is_reference = _same(candidate, against)
        labelled = bool(model.num_classes) and not config.unlabelled
        batches = data.eval_batches(dataclasses.replace(config, eval_batch_size=forward.batch_size))
        steps = -(-data.num_examples(config, "validation") // forward.batch_size)

        def judge(each: tuple[int, Batch], images: UInt8[Array, "b h w c"]) -> PyTree:
            index, batch = each
            answers = forward(model, variables, images, seed)
            judged = _judge(answers.logits, batch["label"]) if labelled else None
            if reference is not None and is_reference:
                reference(index, images, answers)
            return judged, reference and reference.compare(index, images, answers)

        start, clock = time.monotonic(), Clock()
        shown = enumerate(tqdm(batches, bar, steps, disable=not bar))
        answered = ahead(shown, lambda each: forward.send(each[1]["image"]), judge, clock)
        parts = [(batch["mask"] > 0, *found) for (_, batch), found in answered]
        real, judged, fidelity = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
        judged, fidelity = jax.tree.map(lambda array: array[real], (judged, fidelity))
        scores = {} if judged is None else {k: v.astype(np.float64) for k, v in judged.items()}
        rate = float(real.sum()) / (time.monotonic() - start)
        return Outcome(**scores, fidelity=fidelity, images_per_second=rate, road=clock.road)

    def repeated(
        self, candidate: Candidate, against: Candidate | None = None, *, tries: int, bar: str = ""
    ) -> Outcome:
        """The same; of a method that draws the mean of several tries, with seeds from 0 on."""
        seeds = range(tries) if candidate.model.reducer.draws else [None]
        return mean([self(candidate, against, seed=seed, bar=bar) for seed in seeds])

    def explain(
        self, candidate: Candidate, images: UInt8[np.ndarray, "b h w c"], seed: int | None = None
    ) -> Answers:
        """What a candidate answers to some images, before normalisation, and how."""
        check_weights([candidate])
        model, forward, variables, _ = self._placed(candidate)
        size, parts = forward.batch_size, []
        for part in np.split(images, range(size, len(images), size)):
            leaves, tree = jax.tree.flatten(forward(model, variables, part, seed))
            parts.append([array[: len(part)] for array in jax.device_get(leaves)])
        joined = [jnp.asarray(np.concatenate(arrays)) for arrays in zip(*parts, strict=True)]
        return jax.tree.unflatten(tree, joined)

    def _placed(
        self, candidate: Candidate
    ) -> tuple[VisionTransformer, Forward, PyTree, DataConfig]:
        config = self.data_config(candidate.model)
        if config not in self._forwards:
            size = config.eval_batch_size or config.batch_size
            self._forwards[config] = Forward(config, size)
        forward = self._forwards[config]
        return candidate.model, forward, forward.place(candidate.variables), config

    def _reference(self, against: Candidate) -> Reference:
        if self._against is None or not _same(self._against[0], against):
            model, forward, variables, _ = self._placed(against)
            self._against = against, Reference(forward, model, variables)
        return self._against[1]

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


def _same(one: Candidate, other: Candidate) -> bool:
    """Whether they are one model with the same arrays."""
    leaves = zip(jax.tree.leaves(one.variables), jax.tree.leaves(other.variables), strict=False)
    return one.model == other.model and all(x is y for x, y in leaves)


def evaluate(candidate: Candidate, evaluation: Evaluation) -> Result:
    """Accuracy, loss and cost of a candidate on the validation split."""
    outcome = evaluation(candidate, bar=candidate.method)
    cost = costs.count(candidate.model)
    assert outcome.top5 is not None and outcome.loss is not None  # or `check` had refused
    return Result(
        **candidate.row,
        **outcome.columns(),
        top5_percent=100 * float(outcome.top5.mean()),
        loss=float(outcome.loss.mean()),
        parameters=cost.parameters,
        macs=cost.macs,
        tokens=cost.tokens,
        evaluated_images_per_second=outcome.images_per_second,
        **({} if outcome.road is None else outcome.road.rates()),
    )
