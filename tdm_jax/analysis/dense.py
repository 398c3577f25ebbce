"""What reduction leaves of dense use: a linear classifier of patches, on mosaics of photographs.

The classifier is fitted to the unreduced model's patches and then reads those of each method, after
what was merged has been given back (`Info.patches`). Its share of right patches and its mean
intersection over union say what a method costs where every patch is asked.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Float, Int

from tdm_jax.analysis import statistics
from tdm_jax.analysis.answers import Forward
from tdm_jax.analysis.candidate import Candidate, with_baselines
from tdm_jax.analysis.comparison import compare
from tdm_jax.analysis.features import Features
from tdm_jax.analysis.probe import Head, linear_probe
from tdm_jax.analysis.results import Result
from tdm_jax.data import DataConfig, num_classes
from tdm_jax.data.mosaics import Mosaics, make_mosaics


def mean_iou(
    answers: Int[np.ndarray, "n p"], labels: Int[np.ndarray, "n p"], classes: int
) -> float:
    """The mean over classes that are there of intersection over union, in percent."""
    pairs = np.bincount((labels * classes + answers).ravel(), minlength=classes**2)
    confusion = pairs.reshape(classes, classes)
    both, either = np.diag(confusion), confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    present = confusion.sum(1) > 0
    return 100 * float((both[present] / either[present]).mean())


def dense_rows(
    candidates: Sequence[Candidate],
    config: DataConfig,
    *,
    train: int = 200,
    test: int = 200,
    note: Callable[[str], None] = lambda text: None,
) -> list[Result]:
    """Rows of a comparison with the share of right patches and the mean IoU.

    Args:
      candidates: of one transformer, with weights; the unreduced one is added.
      config: labelled data, as the model takes them.
      train: mosaics of the training split that the classifier is fitted to.
      test: mosaics of the validation split that it is asked about.
      note: is told what is being done.

    Raises:
      InputError: see `make_mosaics`.
    """
    candidates = with_baselines(candidates)
    forward = Forward(config, min(config.eval_batch_size or config.batch_size, test))
    size, classes = candidates[0].model.patch_size, num_classes(config)
    note(f"dense: {train} mosaics to learn from, {test} to ask about")
    learnt = make_mosaics(config, "train", train, size)
    asked = make_mosaics(config, "validation", test, size, seed=1)
    patches = _patches(forward, candidates[0], learnt)
    features = Features(patches.reshape(-1, patches.shape[-1]), learnt.labels.ravel())
    head = linear_probe(features, classes, penalties=(1e-1, 1e-2, 1e-3), note=note).head
    rows = []
    unreduced: np.ndarray | None = None
    for candidate, row in zip(candidates, compare(candidates), strict=True):
        note(f"dense: {candidate.label}")
        answers = _answers(head, _patches(forward, candidate, asked))
        right = (answers == asked.labels).mean(axis=1)
        unreduced = right if unreduced is None else unreduced
        rows.append(
            dataclasses.replace(
                row,
                patches_percent=100 * float(right.mean()),
                patches_interval=_percent(statistics.half_width(right)),
                patches_over_unreduced=100 * float((right - unreduced).mean()),
                patches_over_unreduced_interval=_percent(statistics.half_width(right - unreduced)),
                miou_percent=mean_iou(answers, asked.labels, classes),
                examples=test,
            )
        )
    return rows


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _patches(
    forward: Forward, candidate: Candidate, mosaics: Mosaics
) -> Float[np.ndarray, "n p d"]:
    variables, parts = forward.place(candidate.variables), []
    for start in range(0, len(mosaics.pixels), forward.batch_size):
        images = mosaics.pixels[start : start + forward.batch_size]
        found = jax.device_get(forward(candidate.model, variables, images).patches)
        parts.append(np.asarray(found[: len(images)], np.float32))
    return np.concatenate(parts)


def _answers(head: Head, patches: Float[np.ndarray, "n p d"]) -> Int[np.ndarray, "n p"]:
    return head(patches.reshape(-1, patches.shape[-1])).argmax(axis=1).reshape(patches.shape[:2])
