"""Trains a model: `python -m tdm_jax.train --config=configs/digits.py --workdir=...`.

The same command continues an interrupted run, on any number of devices. The working directory holds
`config.json`, `model.json`, `metrics.jsonl`, `checkpoints/`, and at the end `model/` and
`result.json`; `load_pretrained` reads it, a run that still goes on too.
"""

import json

import jax
from absl import flags

from tdm_jax.cli import start
from tdm_jax.cli.config import define_config
from tdm_jax.parallel import distributed
from tdm_jax.training.loop import train_and_evaluate

_ELSEWHERE = "where the processes do not find each other"


def define_flags() -> None:
    """The command's flags; not at import, so that programs may import several commands."""
    define_config(None, "What to train: a Python file such as those in configs/.")
    flags.DEFINE_string("workdir", None, "Folder, or gs://..., for checkpoints and metrics.")
    flags.mark_flags_as_required(["config", "workdir"])
    flags.DEFINE_bool(
        "distributed",
        False,
        "Join the other processes; on a TPU pod or under Slurm they find each other.",
    )
    flags.DEFINE_string(
        "coordinator_address", None, f"Address of process 0, as host:port, {_ELSEWHERE}."
    )
    flags.DEFINE_integer("num_processes", None, f"Number of all processes, {_ELSEWHERE}.", 1)
    flags.DEFINE_integer("process_id", None, f"Number of this process, from 0, {_ELSEWHERE}.", 0)


def main() -> None:
    """The command."""
    FLAGS = flags.FLAGS
    distributed.initialize(
        FLAGS.distributed, FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id
    )
    result = train_and_evaluate(FLAGS.config, FLAGS.workdir)
    if jax.process_index() == 0:
        print(json.dumps(result))


if __name__ == "__main__":
    define_flags()
    start.run(main)
