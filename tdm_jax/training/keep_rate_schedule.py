"""The keep rate's way down from 1 during training, in a few steps, so that shapes stay static.

EViT and TDM lower the keep rate along a cosine. Every keep rate is a program of its own here, so
the cosine is rounded to a handful of them, each compiled once.
"""

import dataclasses
import math
from typing import NamedTuple

from tdm_jax.errors import InputError
from tdm_jax.reduction import Reducer, StageReducer
from tdm_jax.reduction.merger import Merger
from tdm_jax.reduction.prune import PruneReducer

MAX_SCHEDULES = 8


@dataclasses.dataclass(frozen=True)
class KeepWarmupConfig:
    """How the keep rate falls from 1 to the reducer's own.

    Attributes:
      start_epoch: until here nothing is reduced.
      end_epoch: from here on the reducer's own keep rate; a cosine lies between. 0: no warm-up.
      schedules: number of keep rates that the cosine is rounded to, both ends included.
    """

    start_epoch: float = 0.0
    end_epoch: float = 0.0
    schedules: int = MAX_SCHEDULES

    def __post_init__(self) -> None:
        if not 0.0 <= self.start_epoch <= self.end_epoch:
            raise InputError(
                "expected 0 <= keep_warmup.start_epoch <= keep_warmup.end_epoch, "
                f"got {self.start_epoch} and {self.end_epoch}"
            )
        if not 2 <= self.schedules <= MAX_SCHEDULES:
            raise InputError(
                f"keep_warmup.schedules must be in 2..{MAX_SCHEDULES}, got {self.schedules}"
            )


class Phase(NamedTuple):
    """Part of a training that one compiled step serves.

    Attributes:
      start: its first step.
      reducer: the method at the keep rate of this phase.
    """

    start: int
    reducer: Reducer

    @property
    def keep_rate(self) -> float | tuple[float, ...] | None:
        """For the log; None for a method that has none."""
        return getattr(self.reducer, "keep_rate", None)


def phases(
    config: KeepWarmupConfig, reducer: Reducer, *, steps_per_epoch: float
) -> tuple[Phase, ...]:
    """The phases of a training, the first from step 0, the last with `reducer` itself.

    Phase i of 0..s-1 has the keep rate `1 - (1 - keep_rate) i / (s - 1)` and starts where the
    cosine is nearer to it than to the one before.

    Raises:
      InputError: a warm-up is asked of a method that has no keep rate.
    """
    # Without reduction there is nothing to warm up to.
    if config.end_epoch == 0.0 or reducer == Reducer():
        return (Phase(0, reducer),)
    if not isinstance(reducer, StageReducer):
        raise InputError(
            f"keep_warmup needs a reducer with a keep rate, got {type(reducer).__name__}; "
            "expected keep_warmup.end_epoch=0"
        )
    if not (reducer.by_rate or reducer.adaptive):
        raise InputError(
            "keep_warmup moves the keep rate, which counts and r overrule; got "
            f"counts={reducer.counts}, r={reducer.r}; expected keep_warmup.end_epoch=0"
        )
    last = config.schedules - 1
    found: dict[int, Reducer] = {}
    for i in range(config.schedules):
        fallen = max(i - 0.5, 0.0) / last
        share = math.acos(1.0 - 2.0 * fallen) / math.pi
        epoch = config.start_epoch + share * (config.end_epoch - config.start_epoch)
        # A later phase that starts at the same step takes its place.
        found[round(epoch * steps_per_epoch) if i else 0] = _towards(reducer, i / last)
    return tuple(Phase(start, found[start]) for start in sorted(found))


def at_keep_rate(reducer: Reducer, keep_rate: float | tuple[float, ...]) -> Reducer:
    """The same method at another keep rate.

    Raises:
      InputError: the method has no keep rate, or none of that value.
    """
    if not isinstance(reducer, StageReducer):
        raise InputError(
            f"{type(reducer).__name__} has no keep rate; got {keep_rate} for a second evaluation"
        )
    # Counts that were asked for by number would overrule it.
    return dataclasses.replace(reducer, keep_rate=keep_rate, counts=None, r=None)


def _towards(reducer: StageReducer, share: float) -> Reducer:
    if share == 1.0:
        return reducer
    rates = tuple(1.0 - (1.0 - rate) * share for rate in reducer.rates)
    changes: dict = {"keep_rate": rates if isinstance(reducer.keep_rate, tuple) else rates[0]}
    if isinstance(reducer, PruneReducer) and _published(reducer.merger):
        # Published settings exist for a few keep rates only; the way there takes derived ones.
        changes["merger"] = dataclasses.replace(reducer.merger, preset="default")
    return dataclasses.replace(reducer, **changes)


def _published(merger: Merger | None) -> bool:
    return merger is not None and merger.preset == "published"
