"""Latency, throughput, memory and compile time, beside the unreduced model in the same rounds.

One device, noise for images. For each batch size, type and mode (forward pass; training step with
augmentation, gradient and AdamW) all candidates take turns, the unreduced model among them. Beside
each method runs its twin with the same token counts, chosen for free (`reduction.sliced`): the
share of the time that the twin saves is the share of the reduction. The unreduced model may take
its turns in other runtimes too (`peers`). FLOP/s count two operations a multiply-add of the model's
products and convolutions, three times that for a training step; their share is of the rate of one
large square product of the same type, which takes its turns as well.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from tdm_jax.analysis import costs
from tdm_jax.analysis.candidate import BASELINE, Candidate, with_baselines
from tdm_jax.analysis.peers import Peer, PeerProgram, verdict
from tdm_jax.analysis.results import Column, Result, significant
from tdm_jax.analysis.timing import (
    Measurement,
    Program,
    Timing,
    compile_forward,
    compile_product,
    measure,
    program_bytes,
    timed_compile,
)
from tdm_jax.data import make_config
from tdm_jax.errors import InputError, unknown
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.parallel import sharding
from tdm_jax.reduction.sliced import Sliced
from tdm_jax.training import optim
from tdm_jax.training.experiment import DTYPES
from tdm_jax.training.step import Recipe, init_state, lower_train_step

FORWARD, TRAIN, REMAT = "forward", "train", "train_remat"
MODES = (FORWARD, TRAIN)
_STEPS = (TRAIN, REMAT)
OUT_OF_MEMORY, NOT_RUN = "out of memory", "not run"
# What a model without a head is trained with: ImageNet's.
_CLASSES = 1000

TABLE = (
    *("model", "method", "keep_rate"),
    Column("mode", "Mode"),
    *("dtype", "batch_size"),
    Column("latency_seconds", "Latency (ms)", lambda v: significant(1e3 * v), "latency_quartiles"),
    *("images_per_second", "speedup"),
    Column("reduction_share", "In reduction", lambda v: f"{100 * v:.0f}%"),
    Column("flops_per_second", "GFLOP/s", lambda v: significant(v / 1e9)),
    Column("matmul_share", "Of matmul rate", lambda v: f"{100 * v:.0f}%"),
    Column("memory_bytes", "Memory (MB)", lambda v: significant(v / 1e6)),
    Column("compile_seconds", "Compile (s)", significant),
    "verdict",
)


def compile_training(model: VisionTransformer, variables: PyTree, batch_size: int) -> Program:
    """A training step on one device as `tdm_jax.train` runs it, on noise; each call is one step."""
    if not model.num_classes:
        headed = Candidate("", "", None, model.clone(num_classes=_CLASSES))
        model, variables = headed.model, headed.any_variables()
    # The recipe of ImageNet; nothing is read from there.
    data_config = make_config(
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
        data_config=data_config,
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
    # A step gives its state away: the variables must not be the caller's.
    state = init_state(recipe, jax.tree.map(lambda leaf: leaf.copy(), variables))
    state = jax.device_put(state, sharding.state_shardings(mesh, state))
    compiled, seconds = timed_compile(lower_train_step(recipe, mesh, state))

    def call() -> PyTree:
        nonlocal state
        state, values = compiled(state, batch, None)
        return values

    return Program(call, batch_size, seconds, program_bytes(compiled))


def _compile_remat(model: VisionTransformer, variables: PyTree, batch_size: int) -> Program:
    """The same with each block computed again in the backward pass."""
    return compile_training(model.clone(remat=True), variables, batch_size)


Compile = Callable[[VisionTransformer, PyTree, int], Program]
COMPILE: dict[str, Compile] = {
    FORWARD: compile_forward,
    TRAIN: compile_training,
    REMAT: _compile_remat,
}


def benchmark(
    candidates: Sequence[Candidate],
    *,
    batch_sizes: Sequence[int],
    modes: Sequence[str] = MODES,
    dtypes: Sequence[str] = tuple(DTYPES),
    timing: Timing | None,
    compilers: Mapping[str, Compile] = COMPILE,
    peers: Sequence[Peer] = (),
    done: Callable[[list[Result]], None] = lambda rows: None,
) -> list[Result]:
    """Measures candidates over batch sizes, modes and types.

    Args:
      candidates: who takes part; the unreduced model is added.
      batch_sizes: images per call.
      modes: of `compilers`.
      dtypes: of `experiment.DTYPES`.
      timing: how long; None to compile alone: memory by the compiler's account, and its time.
      compilers: what makes each mode's program of a model, its variables and a batch size.
      peers: runtimes that are ready for the unreduced models; beside a training step they train,
        beside any other program they run forward.
      done: is given the rows of each group of candidates as soon as it is measured.

    Returns:
      One row for each candidate and peer, mode, type and batch size; one that does not fit into
      memory has the verdict `OUT_OF_MEMORY` instead of numbers, and a peer's says what it lacks.

    Raises:
      InputError: a mode, type or batch size cannot be, or a peer failed.
    """
    for kind, names, known in (("mode", modes, compilers), ("dtype", dtypes, DTYPES)):
        for name in names:
            if name not in known:
                raise unknown(kind, name, known)
    if not batch_sizes or min(batch_sizes) < 1:
        raise InputError(f"expected batch sizes of at least 1; got {list(batch_sizes)}")
    rows: list[Result] = []
    for _, group in itertools.groupby(with_baselines(candidates), key=lambda one: one.name):
        members = [replace(one, variables=one.any_variables()) for one in group]
        for dtype, mode, batch_size in itertools.product(dtypes, modes, batch_sizes):
            new = _group(members, mode, compilers[mode], dtype, batch_size, timing, peers)
            done(new)
            rows += new
    return rows


def _group(
    members: Sequence[Candidate],
    mode: str,
    compile_program: Compile,
    dtype: str,
    batch_size: int,
    timing: Timing | None,
    peers: Sequence[Peer],
) -> list[Result]:
    """Candidates of one transformer, their twins and other runtimes, measured in turns."""
    # By candidate, and whether it is the twin.
    programs: dict[tuple[int, bool] | str, Program | PeerProgram] = {}
    for index, candidate in enumerate(members):
        runs = {False: candidate}
        if not candidate.is_baseline and timing is not None:
            runs[True] = candidate.with_reducer(Sliced(like=candidate.model.reducer))
        for is_twin, run in runs.items():
            model = run.model.clone(dtype=DTYPES[dtype])
            program = _fitting(compile_program, model, run.variables, batch_size, timing)
            if program is not None:
                programs[index, is_twin] = program
    others: dict[str, PeerProgram | str] = {}
    measured: dict[tuple[int, bool] | str, Measurement] = {}
    peak = 0.0
    # Without its baseline a speed says nothing.
    if timing is not None and (0, False) in programs:
        what = TRAIN if mode in _STEPS else FORWARD
        for peer in peers:
            made = peer.program(members[0].model, what, dtype, batch_size)
            others[f"{BASELINE} ({peer.label})"] = made
        timed = programs | {k: one for k, one in others.items() if not isinstance(one, str)}
        product, operations = compile_product(DTYPES[dtype])
        *found, of_product = measure([*timed.values(), product], timing)
        measured = dict(zip(timed, found, strict=True))
        peak = operations / of_product.latency.median
    about: dict[str, Any] = {"mode": mode, "dtype": dtype, "batch_size": batch_size}
    rows = []
    for index, candidate in enumerate(members):
        own, twin = measured.get((index, False)), measured.get((index, True))
        values: dict[str, Any] = {"verdict": OUT_OF_MEMORY}
        program = programs.get((index, False))
        if program is not None and (own is not None or timing is None):
            values = {**_account(program), "verdict": NOT_RUN}
        if own is not None:
            macs = costs.executed(candidate.model)
            values |= _values(candidate, mode, own, twin, macs, peak)
        rows.append(Result(**candidate.row, **values, **about))
    for method, other in others.items():
        values = {"verdict": other}
        if not isinstance(other, str):
            own = measured[method]
            macs = costs.count(members[0].model, convention="matmul").macs
            values = _values(members[0], mode, own, None, macs, peak) | _account(other)
            values["verdict"] = verdict(own)
        rows.append(Result(model=members[0].name, method=method, **values, **about))
    return rows


def _account(program: Program | PeerProgram) -> dict[str, Any]:
    return {
        "memory_bytes": program.memory_bytes,
        "compile_seconds": program.compile_seconds,
    }


def _fitting(
    compile_program: Compile,
    model: VisionTransformer,
    variables: PyTree,
    batch_size: int,
    timing: Timing | None,
) -> Program | None:
    """The program, or None if it does not fit into the device's memory."""
    try:
        program = compile_program(model, variables, batch_size)
        if timing is not None:
            program.seconds(1)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
    return program


def _values(
    candidate: Candidate,
    mode: str,
    own: Measurement,
    twin: Measurement | None,
    macs: int,
    peak: float,
) -> dict[str, Any]:
    operations = 2 * macs * (3 if mode in _STEPS else 1)
    latency, share, rate = own.latency, None, operations * own.throughput.median
    if twin is not None:
        # Round by round, as a speed-up: what disturbs one disturbs the other.
        share = float(np.median(1 - np.divide(twin.seconds, own.seconds)))
    return own.row(is_baseline=candidate.is_baseline) | {
        "latency_seconds": latency.median,
        "latency_quartiles": (latency.low, latency.high),
        "reduction_share": share,
        "flops_per_second": rate,
        "matmul_share": rate / peak,
    }
