r"""One page that shows everything: `python -m tdm_jax.report --models=... --data=... --output=...`.

    python -m tdm_jax.report --models=runs/digits --methods=random,evit,tdm \
        --keep_rates=0.9,0.7,0.5,0.3 --layers=2,3,5 --data=digits --output=report.html

The page holds the comparison as a table, the plots, and an explorer: pick an image, a method and a
stage, move the keep rate, and see which patches are kept, grouped, matched and dropped, and what
the model then says. It is one file without a reference to another, so it opens from a disk.
"""

from pathlib import Path

from absl import flags

from tdm_jax.analysis import environment, results
from tdm_jax.analysis.candidate import make_candidates
from tdm_jax.analysis.comparison import compare
from tdm_jax.analysis.evaluation import Evaluation
from tdm_jax.analysis.timing import Timing
from tdm_jax.cli import flags as shared
from tdm_jax.cli import start
from tdm_jax.errors import InputError
from tdm_jax.plotting import plots
from tdm_jax.plotting.page import TITLE, check_page, write_page

FLAGS = flags.FLAGS


def define_flags() -> None:
    """The command's flags; not at import, so that programs may import several commands."""
    shared.define_candidates()
    shared.define_data()
    shared.define_judging()
    shared.define_calibration()
    flags.DEFINE_string(
        "rows", "", "Table for the page, comparison.json or sweep.json; by default it is made."
    )
    shared.define_measuring()
    flags.DEFINE_integer("images", 8, "Images in the explorer.", 1)
    flags.DEFINE_string("title", TITLE, "Title of the page.")
    flags.DEFINE_string("output", "report.html", "File to write the page to.")


def main() -> None:
    """The command."""
    plots.check_installed()
    if Path(FLAGS.output).is_dir():
        raise InputError(f"--output: expected a file's name; got the folder {FLAGS.output}")
    evaluation = Evaluation(shared.data("the explorer needs images"), fidelity=FLAGS.fidelity)
    candidates = make_candidates(**shared.candidates())
    check_page(candidates)
    candidates = evaluation.calibrated(candidates, FLAGS.calibrate)
    if FLAGS.rows:
        rows, remark = results.read_json(FLAGS.rows), f"From {Path(FLAGS.rows).name}."
    else:
        rows = compare(
            candidates,
            evaluation=evaluation,
            timing=Timing(FLAGS.rounds) if FLAGS.measure else None,
            batch_size=FLAGS.batch_size,
            tries=FLAGS.tries,
            note=start.note,
        )
        remark = environment.line(environment.describe())
    write_page(
        FLAGS.output,
        candidates,
        rows,
        evaluation,
        images=FLAGS.images,
        title=FLAGS.title,
        remark=remark,
    )
    print(f"Written to {FLAGS.output}")


if __name__ == "__main__":
    define_flags()
    start.run(main)
