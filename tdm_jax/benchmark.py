"""Measures latency, throughput, memory and compile time: `python -m tdm_jax.benchmark`.

    CPU   python -m tdm_jax.benchmark --models=deit_small_patch16_224 --methods=tdm,evit \
              --batch_sizes=1,8,32 --dtypes=float32 --output=benchmark
    GPU   python -m tdm_jax.benchmark --models=deit_small_patch16_224 --methods=tdm,evit \
    TPU       --batch_sizes=1,4,16,64,256,1024 --dtypes=float32,bfloat16 --output=benchmark

One device, noise for images. For each batch size, type and mode (forward pass; training step with
augmentation, gradient and AdamW) all contenders take turns, the unreduced model among them. Beside
each method runs its twin with the same token counts, chosen for free (`reduction.sliced`): the
share of the time that the twin saves is the share of the reduction. FLOP/s count two operations a
multiply-add of the model's products and convolutions, three times that for a training step.

`--advise=3.0` measures something else: which token counts are fastest at no more than 3.0 GFLOPs an
image (multiply-adds, as tables count them); see `tdm_jax.analysis.schedule_search`.
"""

import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jaxtyping import PyTree

from tdm_jax.analysis import candidate, costs, environment, results, schedule_search, timing
from tdm_jax.analysis.candidate import Candidate, with_baselines
from tdm_jax.analysis.results import Column, significant
from tdm_jax.analysis.timing import Measurement, Program, Timing
from tdm_jax.cli import start
from tdm_jax.data import make_config
from tdm_jax.errors import InputError, unknown
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.parallel import sharding
from tdm_jax.reduction.sliced import Sliced
from tdm_jax.training import optim
from tdm_jax.training.experiment import DTYPES
from tdm_jax.training.step import Recipe, init_state, lower_train_step

FORWARD, TRAIN = "forward", "train"
MODES = (FORWARD, TRAIN)
OUT_OF_MEMORY = "out of memory"

COLUMNS = (
    *(c for c in results.COLUMNS if c.key in ("model", "method", "keep_rate")),
    Column("mode", "Mode", None),
    Column("dtype", "Type", None),
    Column("batch_size", "Batch", str),
    Column("latency_seconds", "Latency (ms)", lambda v: significant(1e3 * v), "latency_quartiles"),
    *(c for c in results.COLUMNS if c.key in ("images_per_second", "speedup")),
    Column("reduction_share", "In reduction", lambda v: f"{100 * v:.0f}%"),
    Column("flops_per_second", "GFLOP/s", lambda v: significant(v / 1e9)),
    Column("memory_bytes", "Memory (MB)", lambda v: significant(v / 1e6)),
    Column("compile_seconds", "Compile (s)", significant),
    Column("verdict", "Verdict", None),
)


def training_program(model: VisionTransformer, params: PyTree, batch_size: int) -> Program:
    """A training step on one device as `tdm_jax.train` runs it, on noise; each call is one step."""
    # The recipe of ImageNet; nothing is read from there.
    source = make_config(
        name="tfds:imagenet2012",
        data_dir="unused",
        image_size=model.image_size,
        channels=model.in_channels,
        mean=(0.5,) * model.in_channels,
        std=(0.25,) * model.in_channels,
        batch_size=batch_size,
        # Pairs of images are mixed: one image has no partner.
        **({"mixup": 0.0, "cutmix": 0.0} if batch_size % 2 else {}),
    )
    settings = optim.OptimConfig(end_learning_rate=0.0)
    schedule = optim.learning_rate(
        settings, batch_size=batch_size, steps=1000, steps_per_epoch=100.0
    )
    recipe = Recipe(
        model=model,
        optimizer=optim.make_optimizer(settings, schedule),
        schedule=schedule,
        data=source,
        num_classes=model.num_classes,
    )
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    noise = np.random.default_rng(0)
    shape = (batch_size, *model.image_size, model.in_channels)
    batch = {
        "image": noise.integers(0, 256, shape, np.uint8),
        "label": noise.integers(0, model.num_classes, batch_size, np.int32),
    }
    batch = sharding.place_batch(mesh, batch)
    # A step gives its state away: the parameters must not be the caller's.
    state = init_state(recipe, jax.tree.map(lambda leaf: leaf.copy(), params))
    state = jax.device_put(state, sharding.state_shardings(mesh, state))
    compiled, seconds = timing.timed_compile(lower_train_step(recipe, mesh, state))

    def call() -> PyTree:
        nonlocal state
        state, values = compiled(state, batch, None)
        return values

    return Program(call, batch_size, seconds, timing.program_bytes(compiled))


_PROGRAMS: dict[str, Callable[[VisionTransformer, PyTree, int], Program]] = {
    FORWARD: timing.compile_forward,
    TRAIN: training_program,
}


def benchmark(
    entries: Sequence[Candidate],
    *,
    batch_sizes: Sequence[int],
    modes: Sequence[str] = MODES,
    dtypes: Sequence[str] = tuple(DTYPES),
    timing: Timing,
    done: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Measures contenders over batch sizes, modes and types.

    Args:
      entries: who takes part; the unreduced model is added.
      batch_sizes: images per call.
      modes: of `MODES`.
      dtypes: of `experiment.DTYPES`.
      timing: how long.
      done: is given the rows of each group of contenders as soon as it is measured.

    Returns:
      One row for each contender, mode, type and batch size; one that does not fit into memory has
      the verdict `OUT_OF_MEMORY` instead of numbers.

    Raises:
      InputError: a mode, type or batch size cannot be.
    """
    for kind, given, known in (("mode", modes, MODES), ("dtype", dtypes, DTYPES)):
        for name in given:
            if name not in known:
                raise unknown(kind, name, known)
    if not batch_sizes or min(batch_sizes) < 1:
        raise InputError(f"expected batch sizes of at least 1; got {list(batch_sizes)}")
    rows: list[dict[str, Any]] = []
    for _, group in itertools.groupby(with_baselines(entries), key=lambda entry: entry.name):
        members = list(group)
        weights = [entry.weights() for entry in members]
        for dtype, mode, batch_size in itertools.product(dtypes, modes, batch_sizes):
            new = _group(members, weights, mode, dtype, batch_size, timing)
            done(new)
            rows += new
    return rows


def _group(
    members: Sequence[Candidate],
    weights: Sequence[PyTree],
    mode: str,
    dtype: str,
    batch_size: int,
    timing: Timing,
) -> list[dict[str, Any]]:
    """Contenders of one transformer and their twins, measured in turns."""
    programs: dict[tuple[int, bool], Program] = {}  # by contender, and whether it is the twin
    for index, (entry, params) in enumerate(zip(members, weights, strict=True)):
        for twin in (False, True)[: 1 if entry.is_baseline else 2]:
            model = entry.model.clone(dtype=DTYPES[dtype])
            if twin:
                model, params = model.clone(reducer=Sliced(like=model.reducer)), _without(params)
            program = _fitting(_PROGRAMS[mode], model, params, batch_size)
            if program is not None:
                programs[index, twin] = program
    results: dict[tuple[int, bool], Measurement] = {}
    # Without its baseline a speed says nothing.
    if (0, False) in programs:
        measured = timing.measure(list(programs.values()), timing)
        results = dict(zip(programs, measured, strict=True))
    return [
        _row(entry, mode, dtype, programs.get((i, False)), results.get((i, False)))
        | {"batch_size": batch_size}
        | _share(results.get((i, False)), results.get((i, True)))
        for i, entry in enumerate(members)
    ]


def _without(params: PyTree) -> PyTree:
    return {"params": {key: leaf for key, leaf in params["params"].items() if key != "reducer"}}


def _fitting(
    make: Callable[[VisionTransformer, PyTree, int], Program],
    model: VisionTransformer,
    params: PyTree,
    batch_size: int,
) -> Program | None:
    """The program, or None if it does not fit into the device's memory."""
    try:
        program = make(model, params, batch_size)
        program.seconds(1)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
    return program


def _row(
    entry: Candidate, mode: str, dtype: str, program: Program | None, speed: Measurement | None
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "model": entry.name,
        "method": entry.method,
        "keep_rate": entry.keep_rate,
        "mode": mode,
        "dtype": dtype,
    }
    if program is None or speed is None:
        return row | {"verdict": OUT_OF_MEMORY}
    operations = (
        2 * costs.count(entry.model, convention="matmul").macs * (3 if mode == TRAIN else 1)
    )
    latency = speed.latency
    return row | {
        "latency_seconds": latency.median,
        "latency_quartiles": [latency.low, latency.high],
        **speed.rates(),
        "flops_per_second": operations * speed.throughput.median,
        "memory_bytes": program.memory_bytes,
        "compile_seconds": program.compile_seconds,
        "verdict": timing.BASELINE if entry.is_baseline else speed.verdict,
    }


def _share(own: Measurement | None, twin: Measurement | None) -> dict[str, float]:
    if own is None or twin is None:
        return {}
    # Round by round, as a speed-up: what disturbs one disturbs the other.
    shares = 1 - np.divide(twin.seconds, own.seconds)
    return {"reduction_share": float(np.median(shares))}


def define_flags() -> None:
    """The command's flags; not at import, so that programs may import several commands."""
    candidate.define_flags(models=["deit_small_patch16_224"])
    flags.DEFINE_list("batch_sizes", ["1", "8", "32"], "Images per call.")
    flags.DEFINE_list("modes", list(MODES), "forward, train or both.")
    flags.DEFINE_list("dtypes", list(DTYPES), "Types of the computation.")
    flags.DEFINE_integer("rounds", 10, "Turns of each program.", 1)
    flags.DEFINE_float("min_seconds", 0.1, "A turn lasts about this long at least.", 0.0)
    flags.DEFINE_float("advise", None, "The fastest schedule of at most so many GFLOPs.", 0.0)
    flags.DEFINE_string("output", "", "Folder for benchmark.md (advice.md), .csv and .json.")


def main() -> None:
    """The command."""
    given = flags.FLAGS
    sizes = [candidate.number(text, int, "batch_sizes") for text in given.batch_sizes]
    about = environment.describe() | {"rounds": given.rounds, "started": environment.now()}
    remark = environment.line(about)
    rows: list[dict[str, Any]] = []

    def done(new: list[dict[str, Any]]) -> None:
        rows.extend(new)
        first = new[0]
        print(
            f"{first['model']} {first['dtype']} {first['mode']}, batch {first['batch_size']}: "
            + ", ".join(f"{row['method']} {row['verdict']}" for row in new),
            file=sys.stderr,
            flush=True,
        )
        # What is measured is safe, whatever happens to a larger batch.
        if given.output:
            stem = Path(given.output) / "benchmark"
            results.write(rows, stem, about, columns=COLUMNS, remark=remark)

    entries = candidate.from_flags()
    timing = Timing(rounds=given.rounds, min_seconds=given.min_seconds)
    if given.advise is not None:
        _advise(entries, sizes, timing, about)
        return
    benchmark(
        entries,
        batch_sizes=sizes,
        modes=given.modes,
        dtypes=given.dtypes,
        timing=timing,
        done=done,
    )
    print(f"{results.markdown(rows, COLUMNS)}\n{remark}")


def _advise(
    entries: Sequence[Candidate], sizes: Sequence[int], timing: Timing, about: dict[str, Any]
) -> None:
    given, remark, rows = flags.FLAGS, environment.line(about), []
    reduced = [entry for entry in entries if not entry.is_baseline]
    if not reduced:
        raise InputError("--advise: expected --methods with a count for each stage; got none")
    for entry in reduced:
        schedule_search.candidates(entry.model, round(given.advise * 1e9))
    for entry, dtype, batch_size in itertools.product(reduced, given.dtypes, sizes):
        new = schedule_search.advise(
            entry,
            round(given.advise * 1e9),
            batch_size=batch_size,
            dtype=DTYPES[dtype],
            timing=timing,
        )
        rows += new
        print(
            f"{entry.name} {dtype}, batch {batch_size}: {schedule_search.advice(new)}", flush=True
        )
        if given.output:
            results.write(
                rows, Path(given.output) / "advice", about, columns=schedule_search.COLUMNS
            )
    print(f"{results.markdown(rows, schedule_search.COLUMNS)}\n{remark}")


if __name__ == "__main__":
    define_flags()
    start.run(main)
