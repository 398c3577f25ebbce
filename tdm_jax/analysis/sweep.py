"""Accuracy, multiply-adds and speed at every keep rate, one point after the other, resumable.

Each point is written to `points/` when it is finished, and a training continues where it was
stopped: the same sweep again goes on, and more methods or keep rates only add to it.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from tdm_jax.analysis.candidate import Candidate, with_baselines
from tdm_jax.analysis.comparison import columns, compare
from tdm_jax.analysis.evaluation import Evaluation
from tdm_jax.analysis.outcome import Outcome, mean
from tdm_jax.analysis.results import Result
from tdm_jax.analysis.timing import Timing
from tdm_jax.checkpoint import load_pretrained
from tdm_jax.checkpoint.integrity import checksums
from tdm_jax.errors import InputError
from tdm_jax.files import write_text
from tdm_jax.reduction import describe_reducer
from tdm_jax.training.loop import train_to_end

OFF_THE_SHELF, FINE_TUNED = "off the shelf", "fine-tuned"


@dataclasses.dataclass(frozen=True)
class Point:
    """One accuracy to find out.

    Attributes:
      candidate: whose.
      seed: of its training; None off the shelf.
    """

    candidate: Candidate
    seed: int | None = None

    @property
    def training(self) -> str:
        """How the table calls it."""
        return OFF_THE_SHELF if self.seed is None else FINE_TUNED

    @functools.cached_property
    def name(self) -> str:
        """A file's name for it: in words, and what they leave open in a digest.

        These are the path, the model with its layers, and the weights: a checkpoint that was
        trained again is another.
        """
        words = [Path(self.candidate.name).stem, *self.candidate.label.split()]
        words += ["shelf" if self.seed is None else f"seed{self.seed}"]
        weights = checksums(self.candidate.variables)
        whole = f"{self.candidate.name}\n{self.candidate.model!r}\n{sorted(weights.items())}"
        words += [hashlib.sha256(whole.encode()).hexdigest()[:8]]
        return "_".join(words).replace("/", "-")


def sweep(
    candidates: Sequence[Candidate],
    evaluation: Evaluation,
    output: Path,
    *,
    config: ConfigDict | None = None,
    seeds: Sequence[int] = (0,),
    timing: Timing | None = None,
    batch_size: int = 32,
    tries: int = 3,
    note: Callable[[str], None] = lambda text: None,
) -> list[Result]:
    """Finds the accuracy of every point that `output` does not hold yet.

    Args:
      candidates: who takes part; the unreduced model is added, and trained as the others are.
      evaluation: what to evaluate on.
      output: folder; one sweep's.
      config: of the training of each point (see `training.config`), which starts from the
        candidate's checkpoint; None for off the shelf alone.
      seeds: trainings of each point; their accuracies are averaged.
      timing: how long to measure the speed; None for no measurement.
      batch_size: images per call where the speed is measured.
      tries: how often what draws is evaluated, off the shelf.
      note: is told what is being done.

    Returns:
      A row for each candidate off the shelf and, with a training, fine-tuned.

    Raises:
      InputError: the data do not fit, or `output` holds a sweep of other data or training.
    """
    candidates = with_baselines(candidates)
    evaluation.check(candidates)
    _claim(output, dataclasses.asdict(evaluation.data_config(candidates[0].model)), config)
    points = [Point(candidate) for candidate in candidates]
    if config is not None:
        points += [Point(candidate, seed) for candidate in candidates for seed in seeds]
    unreduced = {candidate.name: candidate for candidate in reversed(candidates)}
    found: dict[tuple[int, str], list[Outcome]] = {}
    for index, point in enumerate(points):
        note(f"sweep: {index + 1} of {len(points)}, {point.name}")
        path = output / "points" / f"{point.name}.npz"
        if path.exists():
            outcome = Outcome.load(path)
        else:
            subject = _trained(point, config, output / "points")
            against = unreduced[point.candidate.name]
            often = tries if point.seed is None else 1
            outcome = evaluation.repeated(subject, against, tries=often)
            outcome.save(path)
        found.setdefault((id(point.candidate), point.training), []).append(outcome)
    compared = compare(candidates, timing=timing, batch_size=batch_size, note=note)
    trainings = list(dict.fromkeys(point.training for point in points))
    of_training = {}
    for training in trainings:
        own = [dataclasses.replace(candidate, training=training) for candidate in candidates]
        outcomes = [mean(found[id(candidate), training]) for candidate in candidates]
        of_training[training] = columns(own, outcomes)
    rows = []
    for index, (candidate, row) in enumerate(zip(candidates, compared, strict=True)):
        for training in trainings:
            each = [one.top1 for one in found[id(candidate), training]]
            top1 = [100 * float(hits.mean()) for hits in each if hits is not None]
            spread = float(np.std(top1, ddof=1)) if len(top1) > 1 else None
            known = of_training[training][index] | {"top1_each": tuple(top1), "top1_spread": spread}
            rows.append(dataclasses.replace(row, training=training, **known))
    return rows


def fine_tuning(config: ConfigDict, candidate: Candidate, seed: int) -> ConfigDict:
    """The configuration of one point's training: the sweep's, from the candidate's checkpoint."""
    config = ConfigDict(config.to_dict())
    config.init_from = candidate.name
    config.seed = seed
    config.reducer = ConfigDict(describe_reducer(candidate.model.reducer))
    return config


def _trained(point: Point, config: ConfigDict | None, folder: Path) -> Candidate:
    """The candidate of a point, after its training where it has one."""
    if point.seed is None:
        return point.candidate
    workdir = folder / point.name
    train_to_end(fine_tuning(config, point.candidate, point.seed), workdir)
    model, variables = load_pretrained(workdir / "model")
    return dataclasses.replace(point.candidate, model=model, variables=variables)


def _claim(output: Path, data: Mapping[str, Any], config: ConfigDict | None) -> None:
    """Marks `output` as this sweep's; refuses it if it is another's."""
    here: dict[str, Any] = {"data": data}
    if config is not None:
        here["training"] = config.to_dict()
    here = json.loads(json.dumps(here, default=str))
    path = output / "config.json"
    there: Mapping[str, Any] = {}
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
    for part in here.keys() & there.keys():
        changed = [
            f"{part}.{key} is {there[part].get(key)!r} there and {here[part].get(key)!r} here"
            for key in sorted(here[part].keys() | there[part].keys())
            if here[part].get(key) != there[part].get(key)
        ]
        if changed:
            raise InputError(
                f"{output} holds another sweep: {'; '.join(changed[:3])}; expected a new --output"
            )
    write_text(path, json.dumps({**there, **here}, indent=2) + "\n")
