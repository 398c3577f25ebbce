"""Does a training fit? `python -m tdm_jax.compile_check --config=... --topology=v5e:4x4`.

Compiles the real training step for devices that this machine does not have, and reports memory and
FLOPs per device and what the devices send each other. `--topology` is

    v5e:4x4       a TPU slice: its own compiler, from `pip install "jax[tpu]"`; no TPU is needed
    gpu:8x80      eight devices of 80 GiB each, partitioned as for any mesh; the collectives and the
                  state are exact, temporaries are those of XLA's CPU compiler and only a hint

Of several, smaller ones first, it stops at the first that fits. Each takes minutes. The data need
not be there: `--examples` and `--classes` say how many there are (ImageNet's).
"""

import contextlib
import dataclasses
import math
import os
import re
from typing import Any

import jax
from absl import flags
from jax.experimental import topologies
from jax.stages import Compiled

from tdm_jax.analysis.results import Column, markdown
from tdm_jax.cli import start
from tdm_jax.cli.config import define_config
from tdm_jax.errors import InputError
from tdm_jax.training.config import parse
from tdm_jax.training.experiment import Experiment, load_teacher, make_experiment
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
    found: dict[str, dict[object, int]] = {}
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
        found.setdefault(kind, {})[match["channel"] or f"line {number}"] = _bytes(shapes)
    return {kind: (len(sizes), sum(sizes.values())) for kind, sizes in found.items()}


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


def check(experiment: Experiment, devices: list[Any], phase: int, teacher: Any = None) -> Check:
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
    memory = compiled.memory_analysis()
    return Check(
        keep_rate=keep_rate,
        state_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        program_bytes=memory.generated_code_size_in_bytes,
        flops=compiled.cost_analysis()["flops"],
        collectives=collectives(compiled.as_text()),
    )


def report(checks: list[Check]) -> str:
    """A table, one row a phase."""
    rows = []
    for found in checks:
        row = {
            "keep_rate": found.keep_rate,
            "state": found.state_bytes / GIB,
            "temporary": found.temporary_bytes / GIB,
            "program": found.program_bytes / GIB,
            "total": found.total_bytes / GIB,
            "flops": found.flops / 1e9,
        }
        row |= {
            kind: f"{count} ({size / 2**20:.1f} MiB)"
            for kind, (count, size) in found.collectives.items()
        }
        rows.append(row)
    kinds = dict.fromkeys(kind for found in checks for kind in found.collectives)
    columns = [
        Column("keep_rate", "Keep rate", str),
        Column("state", "State (GiB)", lambda v: f"{v:.2f}"),
        Column("temporary", "Temporaries (GiB)", lambda v: f"{v:.2f}"),
        Column("program", "Program (GiB)", lambda v: f"{v:.2f}"),
        Column("total", "Total (GiB)", lambda v: f"{v:.2f}"),
        Column("flops", "GFLOPs a step", lambda v: f"{v:,.0f}"),
        *(Column(kind, kind, str) for kind in kinds),
    ]
    return markdown(rows, columns)


def define_flags() -> None:
    """The command's flags."""
    define_config(None, "What to train; see configs/.")
    flags.DEFINE_list("topology", None, "v5e:4x4, ..., or gpu:<devices>x<GiB>; several by comma.")
    flags.DEFINE_integer("examples", 1_281_167, "Training examples.", 1)
    flags.DEFINE_integer("classes", 1000, "Classes.", 1)
    flags.mark_flags_as_required(["config", "topology"])


def main() -> None:
    """The command."""
    given = flags.FLAGS
    given.config.data.data_dir = given.config.data.data_dir or "not looked at"
    settings = parse(given.config)
    # The last is the largest, and there must be devices enough for it from the start.
    places = {name: devices_of(name) for name in reversed(given.topology)}
    teacher, teacher_params = load_teacher(settings)
    experiment = make_experiment(settings, teacher=teacher, dataset=(given.examples, given.classes))
    for name in given.topology:
        experiment.make_mesh(places[name][0])
    for name in given.topology:
        reason = _misfit(name, experiment, *places[name], teacher_params)
        if reason is None:
            return
        print(f"does not fit: {reason}\n", flush=True)
    raise InputError(
        f"no fit on {', '.join(given.topology)}; more devices, a smaller batch, accumulate, "
        "model.remat or mesh.fsdp would help"
    )


def _misfit(
    name: str, experiment: Experiment, devices: list[Any], memory: float, teacher: Any
) -> str | None:
    """Prints the report for one topology; returns why it does not fit, or None."""
    mesh, batch = experiment.make_mesh(devices), experiment.data.batch_size
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    print(
        f"{name}: {mesh.size} devices of {memory:g} GiB ({axes}), batch {batch}, "
        f"{batch // mesh.size} on each; each device:",
        flush=True,
    )
    # The first phase keeps the most tokens, the last is what most steps are.
    wanted = sorted({0, len(experiment.phases) - 1})
    try:
        checks = [check(experiment, devices, phase, teacher) for phase in wanted]
    except DoesNotFitError as error:
        return str(error)
    print(report(checks), end="", flush=True)
    most = max(found.total_bytes for found in checks) / GIB
    if most > memory:
        return f"{most:.2f} GiB on a device of {memory:g} GiB"
    print(f"fits: {most:.2f} of {memory:g} GiB")
    return None


if __name__ == "__main__":
    define_flags()
    start.run(main)
