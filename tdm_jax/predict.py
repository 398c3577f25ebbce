r"""What a model says to every image of a data set: `python -m tdm_jax.predict --checkpoint=...`.

    python -m tdm_jax.predict --checkpoint=deit_small.pth --reducer=tdm --keep_rate=0.7 \
        --data=photos --data_dir=photos --output=answers
    python -m tdm_jax.predict --checkpoint=dinov2-small --reducer=tdm/preset=frozen \
        --data=tfds:imagenet2012 --data_dir=/data/tfds --split=validation \
        --outputs=features --format=parquet --output=features

Photographs are all images below a folder, or those of a list (`--data_dir=list.txt`), also in a
bucket (`--data_dir=gs://...`), to which `--output` may lead as well.
The folder gets shards of `--shard` images with their places, names, labels and answers: the
probabilities of the likeliest classes, the features that the head reads, or those of all patches.
At the end it says where the time went, see `tdm_jax.parallel.overlap`.
The same command goes on after a stop. Images that cannot be read are listed in `_unreadable-0.txt`.
"""

import jax
from absl import flags

from tdm_jax.analysis import prediction, trace
from tdm_jax.analysis.candidate import make_candidates
from tdm_jax.cli import flags as shared
from tdm_jax.cli import start
from tdm_jax.data.preprocessing import data_config_for
from tdm_jax.errors import InputError
from tdm_jax.parallel import distributed
from tdm_jax.training.workdir import settings_of

FLAGS = flags.FLAGS
DEFAULT = prediction.Wanted()


def define_flags() -> None:
    """The command's flags; not at import, so that programs may import several commands."""
    shared.define_checkpoint()
    shared.define_reducer()
    shared.define_data(eval_batch_size=64)
    flags.DEFINE_alias("batch_size", "eval_batch_size")
    text = f"What to write, of {', '.join(prediction.OUTPUTS)}."
    flags.DEFINE_list("outputs", list(DEFAULT.outputs), text)
    flags.DEFINE_integer("top_k", DEFAULT.top_k, "Classes for each image.", 1)
    flags.DEFINE_integer("shard", DEFAULT.shard, "Images in a file.", 1)
    flags.DEFINE_enum("format", DEFAULT.format, prediction.FORMATS, "Of the shards.")
    flags.DEFINE_bool("training_images", False, "Those of the training split instead.")
    shared.define_output("the shards", default="predictions")
    shared.define_trace()
    shared.define_processes()


def main() -> None:
    """The command."""
    distributed.initialize(*shared.processes())
    wanted = prediction.Wanted(tuple(FLAGS.outputs), FLAGS.top_k, FLAGS.shard, FLAGS.format)
    rates = shared.numbers("keep_rate") or [None]
    if len(rates) > 1:
        raise InputError(f"--keep_rate: expected one; got {', '.join(map(str, rates))}")
    if not FLAGS.output:
        raise InputError("expected --output; got none")
    settings = settings_of(FLAGS.checkpoint)
    layers = None if settings is None else settings.reducer.get("layers")
    data = shared.data("predictions are of images")
    (candidate,) = make_candidates(
        methods=[FLAGS.reducer], keep_rates=rates, run_layers=layers, **shared.checkpoint()
    )
    with trace.taken(FLAGS.trace):
        done = prediction.predict(
            candidate,
            data_config_for(candidate.model, **data),
            "train" if FLAGS.training_images else "validation",
            FLAGS.output,
            wanted,
            process=(jax.process_index(), jax.process_count()),
            bar="images",
        )
    print(f"{done['written']} of {done['images']} images, {len(done['unreadable'])} unreadable")
    if done["road"] is not None:
        print(done["road"])
    print(f"Written to {FLAGS.output}/")


if __name__ == "__main__":
    define_flags()
    start.run(main)
