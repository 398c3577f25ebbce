"""Machines that are not there: the devices that a topology stands for, and what one can do."""

import contextlib
import dataclasses
import math
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from tdm_jax.errors import InputError


class Chip(NamedTuple):
    """What the vendor says of one chip (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e).

    Attributes:
      memory: GiB.
      flops: bfloat16 operations per second, at peak.
      bandwidth: bytes per second of its memory.
      links: bytes per second that it sends to its neighbours, over all links together.
      processors: of its host, for each chip: hyperthreads, of hosts of four chips.
      clock: cycles per second of its matrix units, `flops` over what they do in one; None where
        that is not published.
    """

    memory: float
    flops: float
    bandwidth: float
    links: float
    processors: float
    clock: float | None


# Matrix units of 128 x 128: eight a chip, four on v5e.
TPUS = {
    "v4": Chip(32, 275e12, 1228e9, 300e9, 60, 275e12 / (8 * 2 * 128**2)),
    "v5e": Chip(16, 197e12, 819e9, 200e9, 28, 197e12 / (4 * 2 * 128**2)),
    "v5p": Chip(95, 459e12, 2765e9, 600e9, 52, 459e12 / (8 * 2 * 128**2)),
    "v6e": Chip(32, 918e12, 1640e9, 400e9, 45, None),
}


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a topology stands for.

    Attributes:
      name: the topology.
      devices: to compile for.
      memory: GiB of one.
      chip: what one can do; None where that is not known.
    """

    name: str
    devices: list[Any]
    memory: float
    chip: Chip | None = None


def find_machine(topology: str) -> Machine:
    """The machine that a topology stands for: a TPU slice, `v5e:4x4`, or `gpu:<devices>x<GiB>`.

    Raises:
      InputError: the topology is unknown, or the compiler for it is not installed.
    """
    kind, _, shape = topology.partition(":")
    if kind == "gpu":
        return _stand_ins(topology, shape)
    if kind not in TPUS:
        raise InputError(
            f"--topology={topology}: expected gpu:<devices>x<GiB>, or one of "
            f"{', '.join(f'{name}:<shape>' for name in TPUS)}"
        )
    # Where there is no TPU, the library must not look for one, nor keep others from compiling.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_WORKER_ID", "0")
    # Hosts have 2 x 2 chips, but one chip is to be had by itself.
    alone = {"chips_per_host_bounds": (1, 1, 1)} if set(shape.split("x")) == {"1"} else {}
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology, **alone)
    except Exception as error:  # the library is missing, or it does not know the shape
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--topology={topology} cannot be had ({reason}); expected a shape like v5e:4x4, and "
            'the TPU compiler: pip install "jax[tpu]"'
        ) from error
    # A device is a chip, or one of its cores.
    share = math.prod(int(n) for n in shape.split("x")) / len(description.devices)
    chip = TPUS[kind]
    each = Chip(
        memory=share * chip.memory,
        flops=share * chip.flops,
        bandwidth=share * chip.bandwidth,
        links=share * chip.links,
        processors=share * chip.processors,
        clock=chip.clock,
    )
    return Machine(topology, list(description.devices), each.memory, each)


def _stand_ins(topology: str, shape: str) -> Machine:
    match = re.fullmatch(r"(\d+)x(\d+)", shape)
    if match is None:
        raise InputError(f"--topology={topology}: expected gpu:<devices>x<GiB of each>")
    count = int(match[1])
    with contextlib.suppress(RuntimeError):  # as many as there are, once there are any
        jax.config.update("jax_num_cpu_devices", max(1, count))
    devices = jax.devices("cpu")
    if not 0 < count <= len(devices):
        raise InputError(f"--topology={topology}: expected 1 to {len(devices)} devices")
    return Machine(topology, devices[:count], float(match[2]))
