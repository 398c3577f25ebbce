"""Whether a training step fits a machine that is not there: compiled for it, not run.

`compile_check` is the command, and says what a topology is.
"""

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import topologies
from jax.stages import Compiled
from jaxtyping import PyTree

from tdm_jax.analysis.results import UNKNOWN, pipe_table
from tdm_jax.errors import InputError
from tdm_jax.training.experiment import Experiment
from tdm_jax.training.step import lower_train_step

GIB = 2**30
# Memory of one chip, from the vendor's documentation.
TPU_MEMORY_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
_TYPE_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_DEFINED = re.compile(r"(?P<name>%[\w.-]+) = (?P<shapes>.*?) [a-z][\w-]*\(")
# Of an asynchronous one, its end: the start holds operands as well.
_COLLECTIVE = re.compile(
    r"= (?P<shapes>.*?) "
    r"(?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-done)?"
    r"\((?P<operands>[^)]*)\)(?:.*channel_id=(?P<channel>\d+))?"
)
_SHAPE = re.compile(r"(?P<type>[a-z]+\d*)\[(?P<dims>[\d,]*)\]")


class DoesNotFitError(InputError):
    """A step needs more memory than a device has, says its compiler."""


@dataclasses.dataclass(frozen=True)
class Check:
    """What one device needs for one training step.

    Attributes:
      keep_rate: of the phase that was compiled; None for a method without one.
      state_bytes: arguments: parameters, moments, averages, the batch.
      temporary_bytes: activations and all else that lives during the step.
      program_bytes: the compiled step itself.
      flops: as XLA counts them, an addition and a multiplication being two.
      collectives: kind -> (number of operations, bytes of the whole arrays).
    """

    keep_rate: object
    state_bytes: int
    temporary_bytes: int
    program_bytes: int
    flops: float
    collectives: dict[str, tuple[int, int]]

    @property
    def total_bytes(self) -> int:
        """All of it; the next state takes the place of the old one."""
        return self.state_bytes + self.temporary_bytes + self.program_bytes


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Number and bytes of the collectives in a compiled program's text.

    Bytes are those of the whole arrays: of what an all-gather gives and a reduce-scatter takes.
    """
    defined = {match["name"]: match["shapes"] for match in _DEFINED.finditer(text)}
    sizes: dict[str, dict[object, int]] = {}
    computation = ""
    for number, line in enumerate(text.splitlines()):
        if line.startswith(("%", "ENTRY")):
            computation = line
        match = _COLLECTIVE.search(line)
        if match is None:
            continue
        kind, shapes = match["kind"], match["shapes"]
        if kind == "reduce-scatter":
            shapes = " ".join(defined[name] for name in re.findall(r"%[\w.-]+", match["operands"]))
        elif computation.startswith("%all-reduce-scatter"):
            kind = "reduce-scatter"  # as TPU's compiler writes it
        # TPU's compiler spreads one collective over several fusions, all on the same channel.
        sizes.setdefault(kind, {})[match["channel"] or f"line {number}"] = _bytes(shapes)
    return {kind: (len(each), sum(each.values())) for kind, each in sizes.items()}


def _bytes(shapes: str) -> int:
    return sum(
        _TYPE_BYTES.get(shape["type"], 4) * math.prod(int(n) for n in shape["dims"].split(",") if n)
        for shape in _SHAPE.finditer(shapes)
    )


def devices_of(topology: str) -> tuple[list[jax.Device], float]:
    """The devices that a topology stands for, and the memory of one in GiB.

    Raises:
      InputError: the topology is unknown, or the compiler for it is not installed.
    """
    kind, _, shape = topology.partition(":")
    if kind == "gpu":
        match = re.fullmatch(r"(\d+)x(\d+)", shape)
        if match is None:
            raise InputError(f"--topology={topology}: expected gpu:<devices>x<GiB of each>")
        count, memory = int(match[1]), float(match[2])
        with contextlib.suppress(RuntimeError):  # as many as there are, once there are any
            jax.config.update("jax_num_cpu_devices", count)
        devices = jax.devices("cpu")
        if not 0 < count <= len(devices):
            raise InputError(f"--topology={topology}: expected 1 to {len(devices)} devices")
        return devices[:count], memory
    if kind not in TPU_MEMORY_GIB:
        raise InputError(
            f"--topology={topology}: expected gpu:<devices>x<GiB>, or one of "
            f"{', '.join(f'{name}:<shape>' for name in TPU_MEMORY_GIB)}"
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
    chips = math.prod(int(n) for n in shape.split("x"))
    return description.devices, TPU_MEMORY_GIB[kind] * chips / len(description.devices)


def check(experiment: Experiment, devices: list[Any], phase: int, teacher: PyTree = None) -> Check:
    """Compiles the training step of one phase for `devices`.

    Raises:
      InputError: the mesh or the batch does not divide.
      DoesNotFitError: the compiler runs out of memory.
    """
    mesh = experiment.make_mesh(devices)
    recipe = experiment.phase_recipe(phase)
    lowered = lower_train_step(recipe, mesh, experiment.abstract_state(), teacher)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFitError(str(error).splitlines()[0]) from error
    return _read(compiled, experiment.phases[phase].keep_rate)


def _read(compiled: Compiled, keep_rate: object) -> Check:
    memory: Any = compiled.memory_analysis()
    cost: Any = compiled.cost_analysis()
    return Check(
        keep_rate=keep_rate,
        state_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        program_bytes=memory.generated_code_size_in_bytes,
        flops=cost["flops"],
        collectives=collectives(compiled.as_text() or ""),
    )


def report(checks: list[Check]) -> str:
    """A table, one row a phase."""
    kinds = list(dict.fromkeys(kind for check in checks for kind in check.collectives))
    parts = ("State", "Temporaries", "Program", "Total")
    headings = ["Keep rate", *(f"{part} (GiB)" for part in parts), "GFLOPs a step", *kinds]
    rows = []
    for check in checks:
        sizes = (check.state_bytes, check.temporary_bytes, check.program_bytes, check.total_bytes)
        moved = [check.collectives.get(kind) for kind in kinds]
        rows.append(
            [
                UNKNOWN if check.keep_rate is None else str(check.keep_rate),
                *(f"{size / GIB:.2f}" for size in sizes),
                f"{check.flops / 1e9:,.0f}",
                *(f"{m[0]} ({m[1] / 2**20:.1f} MiB)" if m else UNKNOWN for m in moved),
            ]
        )
    return pipe_table(dict.fromkeys(headings, True), rows)


def check_machines(
    machines: Mapping[str, tuple[list[Any], float]],
    experiment: Experiment,
    teacher_variables: PyTree = None,
) -> None:
    """Prints a report of each machine, smaller ones first, up to the first that fits.

    Args:
      machines: by topology, what `devices_of` gives.
      experiment: what is to be trained.
      teacher_variables: of its teacher, if it has one.

    Raises:
      InputError: the batch does not divide over one of them, or none fits.
    """
    for devices, _ in machines.values():
        experiment.make_mesh(devices)
    for name, machine in machines.items():
        reason = _misfit(name, experiment, *machine, teacher_variables)
        if reason is None:
            return
        print(f"does not fit: {reason}\n", flush=True)
    raise InputError(
        f"no fit on {', '.join(machines)}; more devices, a smaller batch, accumulate, "
        "model.remat or mesh.fsdp would help"
    )


def _misfit(
    name: str, experiment: Experiment, devices: list[Any], memory: float, teacher: PyTree
) -> str | None:
    """Prints the report for one topology; returns why it does not fit, or None."""
    mesh, batch = experiment.make_mesh(devices), experiment.settings.data.batch_size
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    print(
        f"{name}: {mesh.size} devices of {memory:g} GiB ({axes}), batch {batch}, "
        f"{batch // mesh.size} on each; each device:",
        flush=True,
    )
    # The first phase keeps the most tokens, the last is what most steps are.
    phases = sorted({0, len(experiment.phases) - 1})
    try:
        checks = [check(experiment, devices, phase, teacher) for phase in phases]
    except DoesNotFitError as error:
        return str(error)
    print(report(checks), end="", flush=True)
    most = max(each.total_bytes for each in checks) / GIB
    if most > memory:
        return f"{most:.2f} GiB on a device of {memory:g} GiB"
    print(f"fits: {most:.2f} of {memory:g} GiB")
    return None
