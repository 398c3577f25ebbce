"""Joining the processes of a run: found by themselves on TPU pods and Slurm, else told by flags."""

import jax
from absl import flags

from tdm_jax.errors import InputError


def define_flags() -> None:
    """The flags that say whether this process is one of several."""
    flags.DEFINE_bool(
        "distributed",
        False,
        "Join the other processes; on a TPU pod or under Slurm they are found.",
    )
    flags.DEFINE_string("coordinator", None, "Elsewhere: host:port of process 0, ")
    flags.DEFINE_integer("processes", None, "how many there are, ", 1)
    flags.DEFINE_integer("process", None, "and which one this is, from 0.", 0)


def initialize() -> None:
    """Joins the others if the flags say so; before anything else touches a device.

    Raises:
      InputError: the flags are incomplete, or the others cannot be reached.
    """
    given = flags.FLAGS
    told = (given.coordinator, given.processes, given.process)
    if any(value is not None for value in told):
        if None in told:
            raise InputError(
                "expected --coordinator, --processes and --process together, got "
                f"{given.coordinator}, {given.processes}, {given.process}"
            )
        if given.process >= given.processes:
            raise InputError(f"--process={given.process} must be below {given.processes}")
    elif not given.distributed:
        return
    try:
        jax.distributed.initialize(*told)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"cannot join the other processes: {error}") from error
