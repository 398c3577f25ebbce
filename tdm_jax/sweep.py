r"""Accuracy, FLOPs and speed at every keep rate: `python -m tdm_jax.sweep`.

Off the shelf, on any data:

    python -m tdm_jax.sweep --models=deit_small.pth --methods=random,evit,tdm \
        --keep_rates=0.9,0.7,0.5 --data=folder --data_dir=/data/imagenet --output=sweep --measure

With a short training of every point as well, on that training's data:

    python -m tdm_jax.sweep --models=runs/digits --methods=random,evit,tdm --keep_rates=0.7,0.5 \
        --config=configs/digits.py --config.epochs=4 --seeds=0,1,2 --output=sweep

The same command continues a sweep, and more methods or keep rates only add to it (see
`tdm_jax.analysis.sweep`). `sweep.md`, `.csv`, `.json` and the plots follow at the end.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from tdm_jax.analysis import environment, results
from tdm_jax.analysis.candidate import make_candidates
from tdm_jax.analysis.evaluation import Evaluation
from tdm_jax.analysis.results import Result
from tdm_jax.analysis.sweep import sweep
from tdm_jax.analysis.timing import Timing
from tdm_jax.cli import flags as shared
from tdm_jax.cli import start
from tdm_jax.cli.config import define_config
from tdm_jax.errors import InputError
from tdm_jax.plotting import curves, plots
from tdm_jax.training.config import parse

FLAGS = flags.FLAGS
FIGURES = (
    *(("keep_rate", curves.TOP1), ("flops", curves.TOP1), ("throughput", curves.TOP1)),
    *(("flops", curves.AGREEMENT), ("flops", curves.COSINE), ("flops", curves.DENSE)),
)


def define_flags() -> None:
    """The command's flags; not at import, so that programs may import several commands."""
    shared.define_candidates()
    shared.define_data()
    shared.define_judging()
    shared.define_calibration()
    define_config(None, "Training of each point; without it, no point is trained.")
    flags.DEFINE_list("seeds", ["0"], "Seeds; each point is trained once with each of them.")
    shared.define_measuring()
    shared.define_output("points, tables and plots", default=None)


def main() -> None:
    """The command."""
    output: Any = shared.output()
    plots.check_installed()
    training = FLAGS.config
    if training is None:
        data = shared.data("a sweep needs data, or a training's by --config")
        evaluation = Evaluation(data, fidelity=FLAGS.fidelity)
    elif FLAGS.data:
        raise InputError("the data of a training are its own; expected --data or --config")
    else:
        of_training = parse(training).data
        evaluation = Evaluation(shared.preprocessing(), of_training, fidelity=FLAGS.fidelity)
    candidates = make_candidates(**shared.candidates())
    rows = sweep(
        evaluation.calibrated(candidates, FLAGS.calibrate),
        evaluation,
        output,
        config=training,
        seeds=shared.numbers("seeds", int) or [],
        timing=Timing(FLAGS.rounds) if FLAGS.measure else None,
        batch_size=FLAGS.batch_size,
        tries=FLAGS.tries,
        note=start.note,
    )
    about = environment.describe() | {"batch_size": FLAGS.batch_size}
    results.write(rows, output / "sweep", about, remark=environment.line(about))
    draw(rows, output)
    print(f"{results.markdown(rows)}\n{environment.line(about)}\nWritten to {output}/")


def draw(rows: Sequence[Result], output: Path) -> None:
    """Plots a sweep's rows, each training by itself."""
    for training in dict.fromkeys(row.training for row in rows):
        trained = [row for row in rows if row.training == training]
        for axis, value in FIGURES:
            if not curves.suffices(trained, curves.AXES[axis], value):
                continue
            figure = plots.plot(trained, axis, training.capitalize(), value=value)
            measured = "" if value is curves.TOP1 else f"{value.key.removesuffix('_percent')}-"
            for suffix in (".svg", ".png"):
                name = f"{training.replace(' ', '-')}-{measured}{axis}{suffix}"
                plots.save(figure, output / name)


if __name__ == "__main__":
    define_flags()
    start.run(main)
