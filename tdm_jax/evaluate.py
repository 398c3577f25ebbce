r"""Evaluates a checkpoint with any reducer: `python -m tdm_jax.evaluate --checkpoint=...`.

    python -m tdm_jax.evaluate --checkpoint=runs/digits --reducer=tdm --keep_rate=0.7,0.5
    python -m tdm_jax.evaluate --checkpoint=deit_small.pth --reducer=tdm --keep_rate=0.7 \
        --data=folder --data_dir=/data/imagenet --batch_size=256 --output=deit_small_tdm.json

`--checkpoint` is of any kind. A model that was saved with a reducer is evaluated with that, unless
`--reducer` names another; of a training's working directory the last checkpoint counts, and its
data and layers are the defaults. The data are those that `--data` names, else those of `--config`.
Every example counts once, whatever the batch size. The table's end says where the time went
between the first batch's answers and the last's, see `tdm_jax.parallel.overlap`.
"""

import dataclasses

from absl import flags
from etils import epath

from tdm_jax.analysis import environment, results, trace
from tdm_jax.analysis.candidate import make_candidates
from tdm_jax.analysis.evaluation import Evaluation, evaluate
from tdm_jax.analysis.results import Column, significant
from tdm_jax.cli import flags as shared
from tdm_jax.cli import start
from tdm_jax.cli.config import define_config
from tdm_jax.files import write_text
from tdm_jax.training.config import parse
from tdm_jax.training.workdir import settings_of

FLAGS = flags.FLAGS
TABLE: tuple[str | Column, ...] = (
    *("model", "method", "keep_rate", "training", "top1_percent", "top5_percent", "loss"),
    *("examples", "parameters", "macs"),
    Column("road_images_per_second", "img/s from files", significant),
    Column("device_images_per_second", "img/s of devices", significant),
    Column("device_busy", "Devices busy", lambda v: f"{100 * v:.0f}%"),
    Column("host_data", "Host waits for images", lambda v: f"{100 * v:.0f}%"),
)


def define_flags() -> None:
    """The command's flags; not at import, so that programs may import several commands."""
    shared.define_checkpoint()
    shared.define_reducer()
    define_config(None, "Training on whose data to evaluate.")
    shared.define_data(eval_batch_size=0)
    flags.DEFINE_alias("batch_size", "eval_batch_size")
    shared.define_trace()
    flags.DEFINE_string("output", "", "JSON file for the result.")


def main() -> None:
    """The command."""
    settings = settings_of(FLAGS.checkpoint)
    layers = None if settings is None else settings.reducer.get("layers")
    if FLAGS.data:
        evaluation = Evaluation(shared.data())
    else:
        run = settings if FLAGS.config is None else parse(FLAGS.config)
        evaluation = (
            Evaluation(shared.data("an evaluation needs data, or a training's by --config"))
            if run is None
            else Evaluation(shared.data_changes(), run.data)
        )
    rates = shared.numbers("keep_rate") or [None]
    candidates = make_candidates(
        methods=[FLAGS.reducer], keep_rates=rates, run_layers=layers, **shared.checkpoint()
    )
    evaluation.check(candidates)
    name = epath.Path(FLAGS.checkpoint).name
    with trace.taken(FLAGS.trace):
        rows = [evaluate(dataclasses.replace(one, name=name), evaluation) for one in candidates]
    print(results.markdown(rows, TABLE), end="")
    if FLAGS.output:
        about = environment.describe() | {
            "checkpoint": FLAGS.checkpoint,
            "data": dataclasses.asdict(evaluation.data_config(candidates[0].model)),
        }
        write_text(FLAGS.output, results.to_json(rows, about))


if __name__ == "__main__":
    define_flags()
    start.run(main)
