"""Which token counts are fastest on this machine.

Hardware multiplies in tiles: 129 tokens may cost as much as 136. For each tile size this takes the
schedule with the highest keep rate whose sequences (prefix tokens included) fill whole tiles and
whose multiply-adds stay within what is asked for, and measures them in turns, beside the schedule
that fills no tiles on purpose and beside no reduction.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tdm_jax.analysis import costs
from tdm_jax.analysis.candidate import BASELINE, Candidate, parse_method
from tdm_jax.analysis.results import Column, Result
from tdm_jax.analysis.timing import Timing, compile_forward, measure
from tdm_jax.errors import InputError
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.reduction import Reducer, StageReducer, ViTShape, plan
from tdm_jax.training.experiment import DTYPES

TILES = (1, 2, 4, 8, 16, 32, 64, 128)
# The keep rates that are tried, the highest first.
RATES = tuple(np.arange(99, 4, -1) / 100)

TABLE = (
    *("model", "method", "dtype", "batch_size"),
    Column("tile", "Tile", str),
    Column("counts", "Tokens after each stage", lambda v: ", ".join(map(str, v))),
    *("macs", "images_per_second", "speedup", "verdict"),
)


def schedules(model: VisionTransformer, macs: int) -> dict[int, StageReducer]:
    """The schedules to try, by the tile that their sequences fill.

    Args:
      model: with a method that takes counts; its own keep rate does not matter.
      macs: multiply-adds that one image may cost, see `costs.multiply_adds`.

    Raises:
      InputError: the method takes no counts, or no schedule is within the limit, or all are.
    """
    reducer = model.reducer
    if not isinstance(reducer, StageReducer):
        raise InputError(f"expected a method with a count for each stage; got {reducer.title}")
    # A method whose counts are fixed says so here.
    stages = reducer.stages(model.shape)
    _with_counts(reducer, (1,) * len(stages))
    whole = costs.multiply_adds(model.clone(reducer=Reducer()))
    if macs >= whole:
        raise InputError(
            f"expected less than the {whole / 1e9:.4g} G without reduction; got {macs / 1e9:.4g} G"
        )
    by_tile: dict[int, StageReducer] = {}
    for tile in TILES:
        for rate in RATES:
            trial = _filling(reducer, float(rate), tile, model.shape)
            if trial not in by_tile.values() and _costs(model, trial) <= macs:
                by_tile[tile] = trial
                break
    if not by_tile:
        least = _costs(model, _filling(reducer, float(RATES[-1]), 1, model.shape))
        raise InputError(
            f"{reducer.title} costs {least / 1e9:.4g} G at the least; got {macs / 1e9:.4g} G"
        )
    return by_tile


def _costs(model: VisionTransformer, reducer: StageReducer) -> int:
    return costs.multiply_adds(model.clone(reducer=reducer))


def _filling(reducer: StageReducer, rate: float, tile: int, shape: ViTShape) -> StageReducer:
    """The counts of a keep rate, rounded up until prefix and patch tokens fill whole tiles."""
    at_rate: Any = reducer.at_keep_rate(rate)
    by_rate = at_rate.scheduled(dataclasses.replace(at_rate.schedule, round_to=1))
    out = [block.out for block in plan(by_rate, shape)]
    tokens = [out[layer] + shape.prefix for layer in by_rate.stages(shape)]
    counts = (-(-t // tile) * tile - shape.prefix for t in tokens)
    counts = tuple(min(count, shape.patches) for count in counts)
    # The rate no longer decides: with its own again, equal counts are equal reducers.
    return _with_counts(reducer, counts)


def _with_counts(reducer: StageReducer, counts: tuple[int, ...]) -> StageReducer:
    by_number = dataclasses.replace(reducer.schedule, counts=counts, r=None, ratio=None, round_to=1)
    return reducer.scheduled(by_number)


def advise(
    candidates: Sequence[Candidate],
    macs: int,
    *,
    batch_sizes: Sequence[int],
    dtypes: Sequence[str],
    timing: Timing,
    done: Callable[[list[Result]], None] = lambda rows: None,
) -> list[Result]:
    """Measures the schedules of every candidate that reduces, over batch sizes and types.

    Args:
      candidates: models with methods.
      macs: see `schedules`.
      batch_sizes: images per call.
      dtypes: of `experiment.DTYPES`.
      timing: how long to measure.
      done: is given the rows of each search as soon as it is measured.

    Returns:
      For each search its schedules, the fastest first, and no reduction last.

    Raises:
      InputError: see `schedules`; or no candidate reduces.
    """
    reduced = [candidate for candidate in candidates if not candidate.is_baseline]
    if not reduced:
        raise InputError("expected methods with a count for each stage to advise on; got none")
    searches = [(candidate, schedules(candidate.model, macs)) for candidate in reduced]
    rows: list[Result] = []
    for search, dtype, batch_size in itertools.product(searches, dtypes, batch_sizes):
        new = _search(*search, batch_size, dtype, timing)
        done(new)
        rows += new
    return rows


def _search(
    candidate: Candidate,
    by_tile: dict[int, StageReducer],
    batch_size: int,
    dtype: str,
    timing: Timing,
) -> list[Result]:
    # The weights of a method may follow its counts: each schedule has its own.
    tried = {tile: candidate.with_reducer(reducer) for tile, reducer in by_tile.items()}
    runs: dict[int | None, Candidate] = {None: candidate.unreduced()}
    runs.update(tried.items())
    programs = [
        compile_forward(run.model.clone(dtype=DTYPES[dtype]), run.any_variables(), batch_size)
        for run in runs.values()
    ]
    rows = []
    for (tile, run), speed in zip(runs.items(), measure(programs, timing), strict=True):
        reducer: Any = run.model.reducer
        chosen = tile is not None
        rows.append(
            Result(
                model=candidate.name,
                method=candidate.method if chosen else BASELINE,
                dtype=dtype,
                batch_size=batch_size,
                tile=tile,
                layers=reducer.stages(run.model.shape) if chosen else None,
                counts=reducer.schedule.counts if chosen else None,
                macs=costs.multiply_adds(run.model),
                **speed.row(is_baseline=not chosen),
            )
        )
    return sorted(rows, key=lambda row: (row.tile is None, -(row.speedup or 0.0)))


def advice(rows: Sequence[Result]) -> str:
    """The best schedule of one search's rows, as one would write it in a program."""
    best = rows[0]
    name, settings = parse_method(best.method)
    settings = {"layers": best.layers, **settings, "counts": best.counts}
    words = ", ".join([repr(name), *(f"{key}={value!r}" for key, value in settings.items())])
    return f"fastest: make_reducer({words}), {best.speedup:.2f}x the speed of no reduction"
