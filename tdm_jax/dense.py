r"""What reduction leaves of dense use: `python -m tdm_jax.dense --models=... --data=folder ...`.

    python -m tdm_jax.dense --models=dinov2_small --image_size=224 --methods=random,evit,tome,tdm \
        --macs_ratio=0.75,0.5 --data=folder --data_dir=photos --output=dense

Mosaics of four photographs each are made of the data; a linear classifier of patches learns on the
unreduced model's, and is asked about each method's (see `tdm_jax.analysis.dense`). `--output` gets
`dense.md`, `.csv` and `.json`.
"""

from absl import flags

from tdm_jax.analysis import environment, results
from tdm_jax.analysis.candidate import check_weights, make_candidates
from tdm_jax.analysis.dense import dense_rows
from tdm_jax.analysis.evaluation import Evaluation
from tdm_jax.cli import flags as shared
from tdm_jax.cli import start
from tdm_jax.errors import InputError

FLAGS = flags.FLAGS
TABLE = (
    *("model", "method", "keep_rate", "patches_percent", "patches_over_unreduced"),
    *("miou_percent", "macs", "flops_reduction_percent"),
)


def define_flags() -> None:
    """The command's flags; not at import, so that programs may import several commands."""
    shared.define_candidates()
    shared.define_data(eval_batch_size=32)
    flags.DEFINE_integer("train_mosaics", 200, "Mosaics that the classifier learns on.", 1)
    flags.DEFINE_integer("test_mosaics", 200, "Mosaics that it is asked about.", 1)
    shared.define_output("dense.md, .csv and .json")


def main() -> None:
    """The command."""
    output = shared.output()
    settings = shared.data("dense use is measured on images")
    candidates = make_candidates(**shared.candidates())
    check_weights(candidates)
    if len({candidate.name for candidate in candidates}) > 1:
        raise InputError("a classifier of patches is one model's; expected one of --models")
    rows = dense_rows(
        candidates,
        Evaluation(settings).data_config(candidates[0].model),
        train=FLAGS.train_mosaics,
        test=FLAGS.test_mosaics,
        note=start.note,
    )
    about = environment.describe()
    remark = environment.line(about)
    if output:
        results.write(rows, output / "dense", about, columns=TABLE, remark=remark)
    print(f"{results.markdown(rows, TABLE)}\n{remark}")


if __name__ == "__main__":
    define_flags()
    start.run(main)
