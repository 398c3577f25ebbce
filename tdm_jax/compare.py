"""Compares methods as the papers' tables do: `python -m tdm_jax.compare --models=...`.

    python -m tdm_jax.compare --models=deit_small_patch16_224 --methods=evit,tdm --keep_rates=0.7 \
        --measure
    python -m tdm_jax.compare --models=deit_small.pth --methods=tdm,random --keep_rates=0.7,0.5 \
        --data=folder --data_dir=/data/imagenet --output=comparison

Each model is a name, which has costs and a speed, or a checkpoint, which with `--data` has an
accuracy too. The unreduced model is always the first row; speed-ups are over its speed in the same
run. `--output` gets `comparison.md`, `.csv` and `.json`.
"""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from absl import flags
from jaxtyping import PyTree

from tdm_jax.analysis import candidate, costs, environment, results, timing
from tdm_jax.analysis.candidate import Candidate, with_baselines
from tdm_jax.analysis.timing import Measurement, Timing
from tdm_jax.cli import start
from tdm_jax.data import DataConfig
from tdm_jax.errors import InputError
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.parallel import sharding
from tdm_jax.training.evaluator import Evaluator, check_fits
from tdm_jax.training.experiment import DTYPES


@dataclasses.dataclass(frozen=True)
class Row:
    """What is known of one contender.

    Attributes:
      contender: whose row it is.
      top1: accuracy in percent; None where there are no data or no weights.
      parameters: scalars.
      macs: multiply-adds for one image by torchprofile's convention, "FLOPs" in the papers.
      baseline_macs: the unreduced model's.
      speed: None where it was not measured.
    """

    contender: Candidate
    top1: float | None
    parameters: int
    macs: int
    baseline_macs: int
    speed: Measurement | None

    @property
    def reduction(self) -> float:
        """Share of the unreduced model's multiply-adds that is saved, in percent."""
        return 100.0 * (1.0 - self.macs / self.baseline_macs)

    @property
    def verdict(self) -> str:
        """Whether the method is worth it, by its measured speed; "" without a measurement."""
        if self.speed is None:
            return ""
        return timing.BASELINE if self.contender.is_baseline else self.speed.verdict

    def record(self) -> dict[str, str | int | float | None]:
        """All of it in one flat mapping, for CSV and JSON."""
        rate = self.contender.keep_rate
        values: dict[str, str | int | float | None] = {
            "model": self.contender.name,
            "method": self.contender.method,
            "keep_rate": list(rate) if isinstance(rate, tuple) else rate,
            "training": self.contender.training,
            "top1_percent": self.top1,
            "parameters": self.parameters,
            "macs": self.macs,
            "flops_reduction_percent": self.reduction,
        }
        if self.speed is not None:
            values |= self.speed.rates() | {
                "flops_ratio": self.baseline_macs / self.macs,
                "verdict": self.verdict,
            }
        return values


def compare(
    entries: Sequence[Candidate],
    *,
    source: DataConfig | None = None,
    timing: Timing | None = None,
    batch_size: int = 32,
    note: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Makes the rows of a comparison; the unreduced model comes first in each group.

    Args:
      entries: who takes part. A baseline is added where a transformer has none.
      source: data to evaluate on; None for no accuracy.
      timing: how long to measure the speed; None for no measurement.
      batch_size: images per call where the speed is measured, on one device.
      note: is told what is being done.

    Raises:
      InputError: nothing to compare, or the data do not fit the models.
    """
    ordered = with_baselines(entries)
    if source is not None:
        for entry in ordered:
            if entry.params is None:
                raise InputError(
                    f"{entry.name} is a name without weights; expected a checkpoint to evaluate "
                    f"on {source.name}"
                )
            check_fits(entry.model, source)
    counted: dict[VisionTransformer, costs.Cost] = {}
    for entry in ordered:
        if entry.model not in counted:
            counted[entry.model] = costs.count(entry.model)
    top1: list[float | None] = [None] * len(ordered)
    if source is not None:
        top1 = accuracies(ordered, source, note=note)
    speeds: list[Measurement | None] = [None] * len(ordered)
    if timing is not None:
        speeds = measure(ordered, timing, batch_size=batch_size, note=note)
    plain = [entry for entry in ordered if entry.is_baseline]
    baseline = {entry.name: counted[entry.model].macs for entry in plain}
    return [
        Row(
            contender=entry,
            top1=accuracy,
            parameters=counted[entry.model].parameters,
            macs=counted[entry.model].macs,
            baseline_macs=baseline[entry.name],
            speed=speed,
        )
        for entry, accuracy, speed in zip(ordered, top1, speeds, strict=True)
    ]


def accuracies(
    entries: Sequence[Candidate],
    source: DataConfig,
    *,
    note: Callable[[str], None] = lambda text: None,
) -> list[float | None]:
    """Top-1 of each contender in percent, None without weights; one compilation a model."""
    mesh = sharding.make_mesh(sharding.MeshConfig())
    evaluators: dict[VisionTransformer, Evaluator] = {}
    found: list[float | None] = []
    for entry in entries:
        if entry.params is None:
            found.append(None)
            continue
        note(f"evaluating {entry.name} {entry.label}")
        if entry.model not in evaluators:
            evaluators[entry.model] = Evaluator(entry.model, source, mesh, entry.params)
        params = jax.device_put(entry.params, sharding.replicated(mesh))
        found.append(evaluators[entry.model](params)["top1"])
    return found


def measure(
    entries: Sequence[Candidate],
    timing: Timing,
    *,
    batch_size: int,
    note: Callable[[str], None] = lambda text: None,
) -> list[Measurement]:
    """The speed of each contender, beside the first one of its name in the same rounds.

    Contenders with equal models share one measurement: weights do not change a speed.
    """
    measured: dict[tuple[str, VisionTransformer], Measurement] = {}
    for name, group in itertools.groupby(entries, key=lambda entry: entry.name):
        models: dict[VisionTransformer, PyTree] = {}
        for entry in group:
            models.setdefault(entry.model, entry.weights())
        note(f"measuring {name}: {len(models)} programs, {timing.rounds} rounds")
        programs = [
            timing.compile_forward(model, params, batch_size) for model, params in models.items()
        ]
        for model, result in zip(models, timing.measure(programs, timing), strict=True):
            measured[name, model] = result
    return [measured[entry.name, entry.model] for entry in entries]


def define_flags() -> None:
    """The command's flags; not at import, so that programs may import several commands."""
    candidate.define_flags()
    candidate.define_data_flags()
    flags.DEFINE_enum("dtype", "float32", list(DTYPES), "Type of the computation.")
    flags.DEFINE_bool("measure", False, "Measure the speed, beside the unreduced model.")
    flags.DEFINE_integer("batch_size", 32, "Images per call where speed is measured.", 1)
    flags.DEFINE_integer("rounds", 20, "Turns of each program where speed is measured.", 1)
    flags.DEFINE_string("output", "", "Folder for comparison.md, .csv and .json.")


def main() -> None:
    """The command."""
    given = flags.FLAGS
    results.check_folder(given.output)
    chosen = candidate.from_flags(DTYPES[given.dtype])
    rows = compare(
        chosen,
        source=candidate.data_from_flags(chosen[0].model),
        timing=Timing(rounds=given.rounds) if given.measure else None,
        batch_size=given.batch_size,
        note=lambda text: print(text, file=sys.stderr, flush=True),
    )
    records = [row.record() for row in rows]
    about = environment.describe() | {"batch_size": given.batch_size, "dtype": given.dtype}
    remark = environment.line(about)
    if given.measure:
        remark = f"Batches of {given.batch_size}, {given.dtype}. {remark}"
    if given.output:
        results.write(records, Path(given.output) / "comparison", about, remark=remark)
    print(f"{results.markdown(records)}\n{remark}")


if __name__ == "__main__":
    define_flags()
    start.run(main)
