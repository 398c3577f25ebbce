"""The processes of a run: joining (found by themselves on TPU pods and Slurm), acting together."""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from tdm_jax.errors import InputError


def initialize(
    distributed: bool = False,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the other processes, if there are any; before anything else touches a device.

    Args:
      distributed: whether there are others that jax finds by itself.
      coordinator_address: host:port of process 0, where they are not found; with the next two.
      num_processes: how many there are.
      process_id: which one this is, from 0.

    Raises:
      InputError: the values are incomplete, or the others cannot be reached.
    """
    place = (coordinator_address, num_processes, process_id)
    if any(value is not None for value in place):
        if coordinator_address is None or num_processes is None or process_id is None:
            raise InputError(
                "expected coordinator_address, num_processes and process_id together; got "
                f"{coordinator_address}, {num_processes} and {process_id}"
            )
        if process_id >= num_processes:
            raise InputError(f"process_id must be below {num_processes}; got {process_id}")
    elif not distributed:
        return
    try:
        jax.distributed.initialize(*place)
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
