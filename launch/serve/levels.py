"""Which of several keep rates answers: the one that was asked for, or a lower one under load.

Quality for latency. A level is a keep rate's place among those served, 0 the highest.
"""

import dataclasses

from tdm_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """When the level changes, by images accepted and not answered yet.

    Attributes:
      lower_at: level i + 1 begins at (i + 1) times as many waiting images.
      raise_at: the next higher level returns when no more than this many wait,
      hold_seconds: for this long.
    """

    lower_at: int = 32
    raise_at: int = 8
    hold_seconds: float = 2.0

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  (a configuration's typing errors)

    def __post_init__(self) -> None:
        if not 0 <= self.raise_at < self.lower_at or self.hold_seconds < 0:
            raise InputError(
                "thresholds: expected 0 <= raise_at < lower_at and hold_seconds >= 0; got "
                f"raise_at={self.raise_at}, lower_at={self.lower_at}, "
                f"hold_seconds={self.hold_seconds}"
            )


class Policy:
    """Goes down at once, as far as the load asks, and up one level at a time, after a while."""

    def __init__(self, levels: int, thresholds: Thresholds) -> None:
        """For so many levels; starts at the highest."""
        self._last, self._thresholds = levels - 1, thresholds
        self._level = 0
        self._busy_until = 0.0

    def choose(self, waiting: int, now: float) -> int:
        """The level for a request.

        Args:
          waiting: images accepted and not answered yet, this request's too.
          now: seconds of a clock that never goes back.
        """
        wanted = min(waiting // self._thresholds.lower_at, self._last)
        if waiting > self._thresholds.raise_at:
            self._busy_until = now + self._thresholds.hold_seconds
        if wanted > self._level:
            self._level = wanted
        elif self._level and now >= self._busy_until:
            self._level -= 1
            self._busy_until = now + self._thresholds.hold_seconds
        return self._level
