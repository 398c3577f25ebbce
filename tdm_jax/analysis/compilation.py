"""Whether a training step fits a machine that is not there: compiled for it, not run.

`compile_check` is the command, and says what a topology is.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.stages import Compiled, Lowered
from jaxtyping import PyTree

from tdm_jax.analysis import hlo
from tdm_jax.analysis.machines import Chip, Machine
from tdm_jax.analysis.results import UNKNOWN, pipe_table, significant
from tdm_jax.errors import InputError
from tdm_jax.ops.platform import pinned
from tdm_jax.training.experiment import Experiment
from tdm_jax.training.step import lower_train_step

GIB = 2**30


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
      moved_bytes: what its operations read and write, as XLA counts them.
      cycles: as TPU's compiler estimates them; None for other devices.
      collectives: what the devices send each other, by kind.
    """

    keep_rate: object
    state_bytes: int
    temporary_bytes: int
    program_bytes: int
    flops: float
    moved_bytes: float
    cycles: int | None
    collectives: dict[str, hlo.Moved]

    @property
    def total_bytes(self) -> int:
        """All of it; the next state takes the place of the old one."""
        return self.state_bytes + self.temporary_bytes + self.program_bytes

    @property
    def sent_bytes(self) -> float:
        """What each device sends."""
        return sum(moved.sent for moved in self.collectives.values())


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Seconds that the parts of a step take, which overlap at best.

    Attributes:
      products: its operations, at the chip's peak.
      memory: what its operations read and write, at its memory's bandwidth; what stays on the chip
        is counted too, so that a step may take a little less.
      links: what it sends, over all links at once.
      estimate: the compiler's cycles at the chip's clock; None where one of them is not known.
    """

    products: float
    memory: float
    links: float
    estimate: float | None

    @classmethod
    def of(cls, check: Check, chip: Chip) -> "Bounds":
        """What a chip needs."""
        known = check.cycles is not None and chip.clock is not None
        return cls(
            products=check.flops / chip.flops,
            memory=check.moved_bytes / chip.bandwidth,
            links=check.sent_bytes / chip.links,
            estimate=check.cycles / chip.clock if known else None,  # type: ignore[operator]
        )

    @property
    def seconds(self) -> float:
        """What a step takes: the largest of them."""
        return max(self.products, self.memory, self.links, self.estimate or 0.0)


def check(experiment: Experiment, devices: list[Any], phase: int, teacher: PyTree = None) -> Check:
    """Compiles the training step of one phase for `devices`.

    Raises:
      InputError: the mesh or the batch does not divide.
      DoesNotFitError: the compiler runs out of memory.
    """
    mesh = experiment.make_mesh(devices)
    recipe = experiment.phase_recipe(phase)
    with for_platform_of(devices[0]):
        lowered = lower_train_step(recipe, mesh, experiment.abstract_state(), teacher)
    compiled = compiled_for(lowered)
    return _read(compiled, experiment.phases[phase].keep_rate, len(devices))


def for_platform_of(device: Any) -> contextlib.AbstractContextManager:
    """Traces programs as they would be where the device is."""
    return pinned("tpu") if device.platform == "tpu" else contextlib.nullcontext()


def compiled_for(lowered: Lowered) -> Compiled:
    """Compiles a program for the devices that it was lowered for.

    Raises:
      DoesNotFitError: the compiler runs out of their memory.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFitError(str(error).splitlines()[0]) from error


def _read(compiled: Compiled, keep_rate: object, devices: int) -> Check:
    memory: Any = compiled.memory_analysis()
    cost: Any = compiled.cost_analysis()
    text = compiled.as_text() or ""
    return Check(
        keep_rate=keep_rate,
        state_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        program_bytes=memory.generated_code_size_in_bytes,
        flops=cost["flops"],
        moved_bytes=cost["bytes accessed"],
        cycles=sum(hlo.cycles(text).values()) or None,
        collectives=hlo.collectives(text, devices),
    )


def report(checks: Sequence[Check]) -> str:
    """A table, one row a phase."""
    kinds = list(dict.fromkeys(kind for check in checks for kind in check.collectives))
    parts = ("State", "Temporaries", "Program", "Total")
    headings = ["Keep rate", *(f"{part} (GiB)" for part in parts), "GFLOPs a step", *kinds, "Sent"]
    rows = []
    for check in checks:
        sizes = (check.state_bytes, check.temporary_bytes, check.program_bytes, check.total_bytes)
        moved = [check.collectives.get(kind) for kind in kinds]
        rows.append(
            [
                _rate(check),
                *(f"{size / GIB:.2f}" for size in sizes),
                f"{check.flops / 1e9:,.0f}",
                *(f"{m.operations} ({m.bytes / 2**20:.1f} MiB)" if m else UNKNOWN for m in moved),
                f"{check.sent_bytes / 2**20:.1f} MiB",
            ]
        )
    return pipe_table(dict.fromkeys(headings, True), rows)


def speed_report(
    checks: Sequence[Check], machine: Machine, batch_size: int, decoded_per_core: float
) -> str:
    """A table of how fast a step can be, one row a phase, and what that asks of the hosts.

    Args:
      checks: of the phases.
      machine: what its chips can do has to be known.
      batch_size: images of a step.
      decoded_per_core: images that one of a host's processors reads, decodes and augments in a
        second.
    """
    assert machine.chip is not None
    headings = [
        *("Keep rate", "Products (ms)", "Memory (ms)", "Links (ms)", "Compiler (ms)"),
        *("img/s at best", "Processors for that, a device", "It has", "Hosts allow img/s"),
    ]
    rows = []
    for check in checks:
        bounds = Bounds.of(check, machine.chip)
        each = (bounds.products, bounds.memory, bounds.links, bounds.estimate)
        rate = batch_size / bounds.seconds
        count = len(machine.devices)
        rows.append(
            [
                _rate(check),
                *(UNKNOWN if s is None else significant(1e3 * s) for s in each),
                significant(rate),
                significant(rate / count / decoded_per_core),
                f"{machine.chip.processors:g}",
                significant(machine.chip.processors * count * decoded_per_core),
            ]
        )
    return pipe_table(dict.fromkeys(headings, True), rows)


def _rate(check: Check) -> str:
    return UNKNOWN if check.keep_rate is None else str(check.keep_rate)


def check_machines(
    machines: Sequence[Machine],
    experiment: Experiment,
    decoded_per_core: float,
    teacher_variables: PyTree = None,
) -> None:
    """Prints a report of each machine, smaller ones first, up to the first that fits.

    Args:
      machines: by what `find_machine` gives.
      experiment: what is to be trained.
      decoded_per_core: see `speed_report`.
      teacher_variables: of its teacher, if it has one.

    Raises:
      InputError: the batch does not divide over one of them, or none fits.
    """
    for machine in machines:
        experiment.make_mesh(machine.devices)
    for machine in machines:
        reason = _misfit(machine, experiment, decoded_per_core, teacher_variables)
        if reason is None:
            return
        print(f"does not fit: {reason}\n", flush=True)
    raise InputError(
        f"no fit on {', '.join(machine.name for machine in machines)}; more devices, a smaller "
        "batch, accumulate, model.remat or mesh.fsdp would help"
    )


def _misfit(
    machine: Machine, experiment: Experiment, decoded_per_core: float, teacher: PyTree
) -> str | None:
    """Prints the report for one machine; returns why it does not fit, or None."""
    devices, memory = machine.devices, machine.memory
    mesh, batch = experiment.make_mesh(devices), experiment.settings.data.batch_size
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    print(
        f"{machine.name}: {mesh.size} devices of {memory:g} GiB ({axes}), batch {batch}, "
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
    if machine.chip is not None:
        speed = speed_report(checks, machine, batch, decoded_per_core)
        print(f"at best, a step:\n{speed}", end="", flush=True)
    most = max(each.total_bytes for each in checks) / GIB
    if most > memory:
        return f"{most:.2f} GiB on a device of {memory:g} GiB"
    print(f"fits: {most:.2f} of {memory:g} GiB")
    return None
