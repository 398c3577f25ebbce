"""The keep rate's way down from 1 during training, in a few steps, so that shapes stay static.

EViT and TDM lower the keep rate along a cosine. Every keep rate is a program of its own here, so
the cosine is rounded to a handful of them, each compiled once.
"""

import dataclasses
import math
from typing import NamedTuple

from tdm_jax.errors import InputError
from tdm_jax.reduction import Reducer, StageReducer

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
        return self.reducer.schedule.keep_rate if isinstance(self.reducer, StageReducer) else None


def phases(
    config: KeepWarmupConfig, reducer: Reducer, *, steps_per_epoch: float
) -> tuple[Phase, ...]:
    """The phases of a training, the first from step 0, the last with `reducer` itself.

    Phase i of 0..s-1 has the keep rate `1 - (1 - keep_rate) i / (s - 1)` and starts where the
    cosine is nearer to it than to the one before.

    Raises:
      InputError: a warm-up is asked of a method whose keep rate decides nothing.
    """
    # Without reduction there is nothing to warm up to.
    if config.end_epoch == 0.0 or reducer == Reducer():
        return (Phase(0, reducer),)
    last = config.schedules - 1
    reducers: dict[int, Reducer] = {}
    for i in range(config.schedules):
        fallen = max(i - 0.5, 0.0) / last
        share = math.acos(1.0 - 2.0 * fallen) / math.pi
        epoch = config.start_epoch + share * (config.end_epoch - config.start_epoch)
        # A later phase that starts at the same step takes its place.
        reducers[round(epoch * steps_per_epoch) if i else 0] = reducer.warmed_up(i / last)
    return tuple(Phase(start, reducers[start]) for start in sorted(reducers))
