"""Accuracy, FLOPs and speed at every keep rate: `python -m tdm_jax.sweep`.

Off the shelf, on any data:

    python -m tdm_jax.sweep --models=deit_small.pth --methods=random,evit,tdm \
        --keep_rates=0.9,0.7,0.5 --data=folder --data_dir=/data/imagenet --output=sweep --measure

With a short training of every point as well, on that training's data:

    python -m tdm_jax.sweep --models=runs/digits --methods=random,evit,tdm --keep_rates=0.7,0.5 \
        --config=configs/digits.py --config.epochs=4 --seeds=0,1,2 --output=sweep

Each point is written to `points/` when it is finished, and a training continues where it was
stopped: the same command continues a sweep, and more methods or keep rates only add to it.
`sweep.md`, `.csv`, `.json` and the plots follow at the end.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from tdm_jax.analysis import candidate, environment, results
from tdm_jax.analysis.candidate import Candidate, parse_method, with_baselines
from tdm_jax.analysis.timing import Timing
from tdm_jax.cli import start
from tdm_jax.cli.config import define_config
from tdm_jax.compare import accuracies, compare
from tdm_jax.data import DataConfig
from tdm_jax.errors import InputError
from tdm_jax.files import write_text
from tdm_jax.plotting import plots
from tdm_jax.reduction import StageReducer
from tdm_jax.train import train_to_end
from tdm_jax.training import config, experiment
from tdm_jax.training.evaluator import check_fits

OFF_THE_SHELF, FINE_TUNED = "off the shelf", "fine-tuned"


@dataclasses.dataclass(frozen=True)
class Point:
    """One accuracy to find out.

    Attributes:
      entry: whose.
      seed: of its training; None off the shelf.
    """

    entry: Candidate
    seed: int | None = None

    @property
    def training(self) -> str:
        """How the table calls it."""
        return OFF_THE_SHELF if self.seed is None else FINE_TUNED

    @property
    def name(self) -> str:
        """A file's name for it: in words, and what they leave open (path, layers) in a digest."""
        words = [Path(self.entry.name).stem, *self.entry.label.split()]
        words += ["shelf" if self.seed is None else f"seed{self.seed}"]
        whole = f"{self.entry.name}\n{self.entry.model!r}"
        words += [hashlib.sha256(whole.encode()).hexdigest()[:8]]
        return "_".join(words).replace("/", "-")


def sweep(
    entries: Sequence[Candidate],
    source: DataConfig,
    output: Path,
    *,
    config: ConfigDict | None = None,
    seeds: Sequence[int] = (0,),
    timing: Timing | None = None,
    batch_size: int = 32,
) -> list[dict[str, Any]]:
    """Finds the accuracy of every point that `output` does not hold yet, then writes all results.

    Args:
      entries: who takes part; the unreduced model is added, and trained as the others are.
      source: what to evaluate on.
      output: folder; one sweep's.
      config: of the training of each point (see `config.Settings`), which starts from the
        contender's checkpoint; None for off the shelf alone.
      seeds: trainings of each point; their accuracies are averaged.
      timing: how long to measure the speed; None for no measurement.
      batch_size: images per call where the speed is measured.

    Returns:
      The rows of the table, for `tables` and `plots`.

    Raises:
      InputError: the data do not fit, or `output` holds a sweep of other data or training.
    """
    ordered = with_baselines(entries)
    for entry in ordered:
        if entry.params is None:
            raise InputError(f"{entry.name} is a name without weights; expected a checkpoint")
        check_fits(entry.model, source)
    _claim(output, source, config)
    points = [Point(entry) for entry in ordered]
    if config is not None:
        points += [Point(entry, seed) for entry in ordered for seed in seeds]
    top1: dict[tuple[str, str, str], list[float]] = {}
    for index, point in enumerate(points):
        print(f"sweep: {index + 1} of {len(points)}, {point.name}", file=sys.stderr, flush=True)
        found = _accuracy(point, source, output / "points", config)
        top1.setdefault((point.entry.name, point.entry.label, point.training), []).append(found)
    rows = []
    for row in compare(ordered, timing=timing, batch_size=batch_size):
        for training in dict.fromkeys(point.training for point in points):
            found = top1[row.contender.name, row.contender.label, training]
            spread = {"top1_spread": float(np.std(found, ddof=1))} if len(found) > 1 else {}
            rows.append(
                row.record()
                | {"training": training, "top1_percent": float(np.mean(found)), "top1_each": found}
                | spread
            )
    _write(rows, output, batch_size)
    return rows


def fine_tuning(config: ConfigDict, entry: Candidate, seed: int) -> ConfigDict:
    """The configuration of one point's training: that of the sweep, from the entry's checkpoint."""
    config = ConfigDict(config.to_dict())
    name, own = parse_method(entry.method)
    reducer, given = entry.model.reducer, {}
    if isinstance(reducer, StageReducer):
        given = {"layers": reducer.layers} if reducer.layers is not None else {}
        given |= {"keep_rate": reducer.keep_rate} if reducer.by_rate else {}
    config.init_from = entry.name
    config.seed = seed
    config.reducer = ConfigDict({"name": name, **given, **own})
    return config


def _accuracy(point: Point, source: DataConfig, folder: Path, config: ConfigDict | None) -> float:
    """Top-1 in percent: what was found before, or else is found now and kept."""
    path = folder / f"{point.name}.json"
    if path.exists():
        try:
            return float(json.loads(path.read_text(encoding="utf-8"))["top1_percent"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is damaged: {error}; expected a result (without the file, it is redone)"
            ) from error
    if point.seed is None:
        (found,) = accuracies([point.entry], source)
    else:
        training = fine_tuning(config, point.entry, point.seed)
        found = train_to_end(training, folder / point.name)["top1"]
    write_text(path, json.dumps({"point": point.name, "top1_percent": found}) + "\n")
    return found


def _claim(output: Path, source: DataConfig, config: ConfigDict | None) -> None:
    """Marks `output` as this sweep's; refuses it if it is another's."""
    mine: dict[str, Any] = {"data": dataclasses.asdict(source)}
    if config is not None:
        mine["training"] = config.to_dict()
    mine = json.loads(json.dumps(mine, default=str))
    path = output / "config.json"
    theirs: Mapping[str, Any] = {}
    if path.exists():
        theirs = json.loads(path.read_text(encoding="utf-8"))
    for part in mine.keys() & theirs.keys():
        changed = [
            f"{part}.{key} is {theirs[part].get(key)!r} there and {mine[part].get(key)!r} here"
            for key in sorted(mine[part].keys() | theirs[part].keys())
            if mine[part].get(key) != theirs[part].get(key)
        ]
        if changed:
            raise InputError(
                f"{output} holds another sweep: {'; '.join(changed[:3])}; expected a new --output"
            )
    write_text(path, json.dumps({**theirs, **mine}, indent=2) + "\n")


def _write(rows: Sequence[dict[str, Any]], output: Path, batch_size: int) -> None:
    about = environment.describe() | {"batch_size": batch_size}
    results.write(rows, output / "sweep", about, remark=environment.line(about))
    axes = ["keep_rate", "flops"] + ["throughput"] * ("images_per_second" in rows[0])
    for training in dict.fromkeys(row["training"] for row in rows):
        of_this = [row for row in rows if row["training"] == training]
        for axis in axes:
            figure = plots.plot(of_this, axis, f"Top-1, {training}")
            for suffix in (".svg", ".png"):
                plots.save(figure, output / f"{training.replace(' ', '-')}-{axis}{suffix}")


def define_flags() -> None:
    """The command's flags; not at import, so that programs may import several commands."""
    candidate.define_flags()
    candidate.define_data_flags()
    define_config(None, "Training of each point; none without one.")
    flags.DEFINE_list("seeds", ["0"], "One training of each point for each of these.")
    flags.DEFINE_bool("measure", False, "Measure the speed, beside the unreduced model.")
    flags.DEFINE_integer("batch_size", 32, "Images per call where speed is measured.", 1)
    flags.DEFINE_integer("rounds", 20, "Turns of each program where speed is measured.", 1)
    flags.DEFINE_string("output", None, "Folder for points, tables and plots.")
    flags.mark_flag_as_required("output")


def main() -> None:
    """The command."""
    given = flags.FLAGS
    results.check_folder(given.output)
    entries = candidate.from_flags()
    source = candidate.data_from_flags(entries[0].model)
    if given.config is not None:
        if source is not None:
            raise InputError("the data of a training are its own; expected --data or --config")
        source = experiment.data_config(config.parse(given.config))
    if source is None:
        raise InputError("a sweep needs data; expected --data or --config; got none")
    rows = sweep(
        entries,
        source,
        Path(given.output),
        config=given.config,
        seeds=[candidate.number(text, int, "seeds") for text in given.seeds],
        timing=Timing(rounds=given.rounds) if given.measure else None,
        batch_size=given.batch_size,
    )
    print(
        f"{results.markdown(rows)}\n{environment.line(environment.describe())}\nWritten to {given.output}/"
    )


if __name__ == "__main__":
    define_flags()
    start.run(main)
