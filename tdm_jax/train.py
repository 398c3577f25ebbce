"""Trains a model: `python -m tdm_jax.train --config=configs/digits.py --workdir=...`.

The same command continues an interrupted run, on any number of devices. The working directory holds
`config.json`, `model.json`, `metrics.jsonl`, `checkpoints/`, and at the end `model/` and
`result.json`; `load_pretrained` reads it, a run that still goes on too.
"""

import json

import jax
from absl import flags

from tdm_jax.cli import flags as shared
from tdm_jax.cli import start
from tdm_jax.cli.config import define_config
from tdm_jax.parallel import distributed
from tdm_jax.training.loop import train_and_evaluate


def define_flags() -> None:
    """The command's flags; not at import, so that programs may import several commands."""
    define_config(None, "What to train: a Python file such as those in configs/.")
    flags.DEFINE_string("workdir", None, "Folder, or gs://..., for checkpoints and metrics.")
    flags.mark_flags_as_required(["config", "workdir"])
    shared.define_processes()


def main() -> None:
    """The command."""
    FLAGS = flags.FLAGS
    distributed.initialize(*shared.processes())
    result = train_and_evaluate(FLAGS.config, FLAGS.workdir)
    if jax.process_index() == 0:
        print(json.dumps(result))


if __name__ == "__main__":
    define_flags()
    start.run(main)
