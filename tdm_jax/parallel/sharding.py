"""Where arrays live: one mesh with a data and an fsdp axis, and the shardings that follow.

The batch is split over both axes. Parameters, moments and averages are replicated over `data` and,
where an axis of theirs divides, split over `fsdp`; with fsdp = 1 that is plain data parallelism. A
step gathers the parameters, computes with whole ones, and reduces each gradient to where it lives.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from tdm_jax.errors import InputError

DATA, FSDP = "data", "fsdp"
# Below this many elements a gather costs more in latency than the split saves in memory.
FSDP_MIN_SIZE = 2**14


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per axis; data = -1 takes all that fsdp leaves."""

    data: int = -1
    fsdp: int = 1


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (default: all of them, of every process).

    Raises:
      InputError: if the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    data = count // max(config.fsdp, 1) if config.data == -1 else config.data
    if config.fsdp < 1 or data < 1 or data * config.fsdp != count:
        raise InputError(
            f"mesh data={config.data} x fsdp={config.fsdp} does not cover {count} devices; "
            f"expected data * fsdp = {count}, or data=-1 and an fsdp that divides it"
        )
    # Auto: the default, explicit axes, is what linen's concatenation refuses.
    grid = np.asarray(by_process(devices)).reshape(data, config.fsdp)
    return Mesh(grid, (DATA, FSDP), axis_types=(AxisType.Auto,) * 2)


def by_process(devices: Sequence[Any]) -> list[Any]:
    """Devices in the order of their processes, each of which reads neighbouring rows of a batch.

    `jax.make_mesh` would follow the torus of a TPU slice instead, in and out of the hosts' blocks.
    """
    return sorted(devices, key=lambda device: device.process_index)


def check_batch(
    mesh: Mesh, batch_size: int, *, accumulate: int = 1, pairs: bool = False, name: str
) -> None:
    """Raises InputError unless every device gets the same number of whole examples per pass.

    With `pairs`, each device's number must be even, too: mixup and cutmix pair neighbours, before
    the batch is split into passes.
    """
    share = mesh.size * (math.lcm(accumulate, 2) if pairs else accumulate)
    if batch_size < 1 or batch_size % share:
        passes = f" x {accumulate} accumulated passes" if accumulate > 1 else ""
        mixed = ", an even number on each (mixup and cutmix pair neighbours)" if pairs else ""
        raise InputError(
            f"{name}={batch_size} does not divide over {mesh.size} devices{passes}{mixed}; "
            f"expected a multiple of {share}"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the leading axis over all devices."""
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(mesh: Mesh, state: PyTree) -> PyTree:
    """A sharding for every array (or ShapeDtypeStruct) of a training state or parameter tree.

    The rule looks at shapes alone, so an optimiser's moments land where their parameters do.
    """
    size = mesh.shape[FSDP]

    def spec(leaf: jax.Array | np.ndarray | jax.ShapeDtypeStruct) -> NamedSharding:
        axes = [i for i, n in enumerate(leaf.shape) if n % size == 0]
        if size == 1 or not axes or math.prod(leaf.shape) < FSDP_MIN_SIZE:
            return replicated(mesh)
        # The largest axis; of equal ones the last, which keeps rows contiguous.
        axis = max(axes, key=lambda i: (leaf.shape[i], i))
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, FSDP))

    return jax.tree.map(spec, state)


def gather_params(mesh: Mesh, params: PyTree) -> PyTree:
    """Inside a jitted step: parameters as whole copies, to compute with.

    Left to itself, XLA would rather send the activations of split weights around.
    """
    return jax.lax.with_sharding_constraint(params, replicated(mesh))


def scatter_grads(mesh: Mesh, grads: PyTree) -> PyTree:
    """Inside a jitted step: gradients split as the parameters are that they belong to."""
    return jax.lax.with_sharding_constraint(grads, state_shardings(mesh, grads))


def place_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """The global batch from this process's rows of it, split over the devices."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }
