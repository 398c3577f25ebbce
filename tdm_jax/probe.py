r"""What frozen features know of classes: `python -m tdm_jax.probe --checkpoint=... --data=...`.

    python -m tdm_jax.probe --checkpoint=dinov2_small --image_size=224 --data=folder \
        --data_dir=photos --output=dinov2_small_photos

Nearest neighbours and a linear probe (see `tdm_jax.analysis.probe`) are fitted to the training
split's features and asked about the validation split, with `--reducer` at each `--keep_rate` or as
the checkpoint was saved. `--output` gets a classifier, the model with the probe as its head, which
every command takes, and beside it the table. Features are kept in `--features` and computed once.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from absl import flags

from tdm_jax import data
from tdm_jax.analysis import costs, environment, results, statistics
from tdm_jax.analysis.candidate import Candidate, make_candidates
from tdm_jax.analysis.evaluation import Evaluation
from tdm_jax.analysis.features import extract
from tdm_jax.analysis.probe import Head, linear_probe, nearest_neighbours
from tdm_jax.analysis.results import Result
from tdm_jax.checkpoint import describe, save_model
from tdm_jax.cli import flags as shared
from tdm_jax.cli import start
from tdm_jax.errors import InputError

FLAGS = flags.FLAGS
TABLE = (
    *("model", "method", "keep_rate", "knn_percent", "top1_percent", "penalty", "examples"),
    *("parameters", "macs"),
)


def define_flags() -> None:
    """The command's flags; not at import, so that programs may import several commands."""
    shared.define_checkpoint()
    shared.define_reducer()
    shared.define_data()
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "tdm_jax" / "features"
    flags.DEFINE_string("features", str(default), "Folder to keep features in.")
    flags.DEFINE_bool("overwrite", False, "Replace an output that exists.")
    shared.define_output("the classifier and the table")


def main() -> None:
    """The command."""
    output = shared.output()
    settings = shared.data("a probe learns from images")
    rates = shared.numbers("keep_rate") or [None]
    candidates = make_candidates(methods=[FLAGS.reducer], keep_rates=rates, **shared.checkpoint())
    if output and len(candidates) > 1:
        raise InputError(f"--output: expected one --keep_rate to write; got {len(candidates)}")
    if output and output.exists() and not FLAGS.overwrite:
        raise InputError(f"{output} exists (--overwrite would replace it); expected a new name")
    config = Evaluation(settings).data_config(candidates[0].model)
    if config.unlabelled:
        raise InputError("photos have no classes to learn; expected --data=folder or another")
    rows = []
    for candidate in candidates:
        folder = Path(FLAGS.features).expanduser()
        train, test = (
            extract(candidate, config, split, folder, bar=f"{candidate.label}, {split}")
            for split in ("train", "validation")
        )
        classes = data.num_classes(config)
        neighbours = nearest_neighbours(train, test, classes)
        found = linear_probe(train, classes, note=start.note)
        hits = (found.head(test.values).argmax(axis=1) == test.labels).astype(float)
        cost = costs.count(candidate.model)
        rows.append(
            Result(
                **candidate.row,
                knn_percent=100 * float(neighbours.mean()),
                knn_interval=statistics.of_share(neighbours),
                top1_percent=100 * float(hits.mean()),
                top1_interval=statistics.of_share(hits),
                penalty=found.penalty,
                examples=len(hits),
                parameters=cost.parameters,
                macs=cost.macs,
            )
        )
    about: dict[str, Any] = environment.describe() | {"data": dataclasses.asdict(config)}
    remark = environment.line(about)
    print(f"{results.markdown(rows, TABLE)}\n{remark}")
    if output:
        classifier = with_head(candidates[0], found.head)
        save_model(
            output, describe(classifier.model), classifier.variables, overwrite=FLAGS.overwrite
        )
        results.write(rows, output / "probe", about, columns=TABLE, remark=remark)
        print(f"Written to {output}/")


def with_head(candidate: Candidate, head: Head) -> Candidate:
    """The candidate as a classifier with this head; a distilled one has it twice."""
    model = candidate.model.clone(num_classes=len(head.bias), head_bias=True)
    variables: Any = candidate.variables
    params = {k: v for k, v in variables["params"].items() if not k.startswith("head")}
    for name in ("head", "head_dist")[: 1 + model.distilled]:
        params[name] = {"kernel": jnp.asarray(head.kernel), "bias": jnp.asarray(head.bias)}
    return dataclasses.replace(candidate, model=model, variables={"params": params})


if __name__ == "__main__":
    define_flags()
    start.run(main)
