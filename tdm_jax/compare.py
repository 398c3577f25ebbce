r"""Compares methods as the papers' tables do: `python -m tdm_jax.compare --models=...`.

    python -m tdm_jax.compare --models=deit_small_patch16_224 --methods=evit,tdm --keep_rates=0.7 \
        --measure
    python -m tdm_jax.compare --models=deit_small.pth --methods=tdm,random --keep_rates=0.7,0.5 \
        --data=folder --data_dir=/data/imagenet --output=comparison

Each model is a name, which has costs and a speed, or a checkpoint, which with `--data` has an
accuracy too. The unreduced model is always the first row; speed-ups are over its speed in the same
run. `--output` gets `comparison.md`, `.csv` and `.json`.
"""

from absl import flags

from tdm_jax.analysis import environment, results
from tdm_jax.analysis.candidate import make_candidates
from tdm_jax.analysis.comparison import compare
from tdm_jax.analysis.evaluation import Evaluation
from tdm_jax.analysis.timing import Timing
from tdm_jax.cli import flags as shared
from tdm_jax.cli import start
from tdm_jax.training.experiment import DTYPES

FLAGS = flags.FLAGS


def define_flags() -> None:
    """The command's flags; not at import, so that programs may import several commands."""
    shared.define_candidates()
    shared.define_data()
    shared.define_judging()
    shared.define_calibration()
    flags.DEFINE_enum("dtype", "float32", list(DTYPES), "Type of the computation.")
    shared.define_measuring()
    shared.define_output("comparison.md, .csv and .json")


def main() -> None:
    """The command."""
    output = shared.output()
    candidates = make_candidates(**shared.candidates(), dtype=DTYPES[FLAGS.dtype])
    data = shared.data("calibration needs training images" if FLAGS.calibrate else "")
    evaluation = Evaluation(data, fidelity=FLAGS.fidelity) if data else None
    if evaluation is not None:
        candidates = evaluation.calibrated(candidates, FLAGS.calibrate)
    rows = compare(
        candidates,
        evaluation=evaluation,
        timing=Timing(FLAGS.rounds) if FLAGS.measure else None,
        batch_size=FLAGS.batch_size,
        tries=FLAGS.tries,
        note=start.note,
    )
    about = environment.describe() | {"batch_size": FLAGS.batch_size, "dtype": FLAGS.dtype}
    remark = environment.line(about)
    if FLAGS.measure:
        remark = f"Batches of {FLAGS.batch_size}, {FLAGS.dtype}. {remark}"
    if output:
        results.write(rows, output / "comparison", about, remark=remark)
    print(f"{results.markdown(rows)}\n{remark}")


if __name__ == "__main__":
    define_flags()
    start.run(main)
