"""The processes of a run: joining (found by themselves on TPU pods and Slurm), acting together."""

from collections.abc import Callable

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

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


def on_one_process(name: str, action: Callable[[], None]) -> None:
    """Lets the first process act on the shared file system, and the others wait for it."""
    if jax.process_index() == 0:
        action()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def everywhere(holds: bool) -> bool:
    """Whether something holds on every process; each of them must ask."""
    if jax.process_count() == 1:
        return holds
    return bool(np.all(multihost_utils.process_allgather(np.asarray(holds))))
