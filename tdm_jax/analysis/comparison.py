"""Methods compared as the papers' tables do: accuracy, parameters, multiply-adds, speed."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import PyTree

from tdm_jax.analysis import costs
from tdm_jax.analysis.candidate import CHANCE, Candidate, with_baselines
from tdm_jax.analysis.evaluation import Evaluation
from tdm_jax.analysis.outcome import Outcome
from tdm_jax.analysis.results import Result
from tdm_jax.analysis.timing import Measurement, Timing, compile_forward, measure
from tdm_jax.models.vit import VisionTransformer


def silent(text: str) -> None:
    """A note that nobody hears."""
    del text


def compare(
    candidates: Sequence[Candidate],
    *,
    evaluation: Evaluation | None = None,
    timing: Timing | None = None,
    batch_size: int = 32,
    tries: int = 3,
    note: Callable[[str], None] = silent,
) -> list[Result]:
    """Makes the rows of a comparison, those of `with_baselines(candidates)`.

    Args:
      candidates: who takes part. A baseline is added where a transformer has none.
      evaluation: the data to evaluate on; None for no accuracy.
      timing: how long to measure the speed; None for no measurement.
      batch_size: images per call where the speed is measured, on one device.
      tries: how often what draws is evaluated.
      note: is told what is being done.

    Raises:
      InputError: nothing to compare, or the data do not fit the models.
    """
    candidates = with_baselines(candidates)
    if evaluation is not None:
        evaluation.check(candidates)
    counted = {candidate.model: costs.count(candidate.model) for candidate in candidates}
    baselines = {c.name: counted[c.model].macs for c in candidates if c.is_baseline}
    outcomes: list[Outcome] = []
    if evaluation is not None:
        unreduced = {candidate.name: candidate for candidate in reversed(candidates)}
        for candidate in candidates:
            note(f"evaluating {candidate.name} {candidate.label}")
            outcomes.append(evaluation.repeated(candidate, unreduced[candidate.name], tries=tries))
    judged = columns(candidates, outcomes) if outcomes else [{} for _ in candidates]
    speeds: Sequence[Measurement | None] = [None] * len(candidates)
    if timing is not None:
        speeds = measure_speeds(candidates, timing, batch_size=batch_size, note=note)
    rows = []
    for candidate, found, speed in zip(candidates, judged, speeds, strict=True):
        cost, baseline = counted[candidate.model], baselines[candidate.name]
        measured = {}
        if speed is not None:
            measured = speed.row(is_baseline=candidate.is_baseline)
            measured["flops_ratio"] = baseline / cost.macs
        rows.append(
            Result(
                **candidate.row,
                **found,
                parameters=cost.parameters,
                macs=cost.macs,
                flops_reduction_percent=100.0 * (1.0 - cost.macs / baseline),
                **measured,
            )
        )
    return rows


def columns(candidates: Sequence[Candidate], outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """What outcomes tell: by themselves, and beside the unreduced model and random dropping.

    Args:
      candidates: see `with_baselines`; the first of a name is compared with.
      outcomes: one for each, all of the same images.
    """
    unreduced: dict[str, Outcome] = {}
    by_chance: dict[Any, Outcome] = {}
    for candidate, outcome in zip(candidates, outcomes, strict=True):
        unreduced.setdefault(candidate.name, outcome)
        if candidate.method == CHANCE:
            by_chance[candidate.name, candidate.level, candidate.training] = outcome
    found = []
    for candidate, outcome in zip(candidates, outcomes, strict=True):
        chance = by_chance.get((candidate.name, candidate.level, candidate.training))
        found.append(outcome.columns(unreduced[candidate.name], chance))
    return found


def measure_speeds(
    candidates: Sequence[Candidate],
    timing: Timing,
    *,
    batch_size: int,
    note: Callable[[str], None] = silent,
) -> list[Measurement]:
    """The speed of each candidate, beside the first one of its name in the same rounds.

    Candidates with equal models share one measurement: weights do not change a speed.
    """
    measured: dict[tuple[str, VisionTransformer], Measurement] = {}
    for name, group in itertools.groupby(candidates, key=lambda candidate: candidate.name):
        models: dict[VisionTransformer, PyTree] = {}
        for candidate in group:
            models.setdefault(candidate.model, candidate.any_variables())
        note(f"measuring {name}: {len(models)} programs, {timing.rounds} rounds")
        programs = [compile_forward(model, v, batch_size) for model, v in models.items()]
        for model, result in zip(models, measure(programs, timing), strict=True):
            measured[name, model] = result
    return [measured[candidate.name, candidate.model] for candidate in candidates]
