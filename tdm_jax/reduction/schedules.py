"""How many tokens each stage removes, where a schedule says so outright instead of by a rate.

ToMe's schedules (Bolya et al., ICLR 2023, arXiv 2210.09461, section 3.3) remove r tokens a stage:
the same number everywhere, or a number that falls or rises linearly between 2r and 0. All three
remove the same total, up to rounding.
"""

import math

RAMPS = ("constant", "decreasing", "increasing")


def removals(r: int | tuple[int, ...], ramp: str, stages: int) -> tuple[int, ...]:
    """Tokens that each of `stages` stages removes.

    Args:
      r: the mean of all stages, or one number for each, which are then taken as they are.
      ramp: one of `RAMPS`.
      stages: their number.
    """
    if isinstance(r, tuple):
        return r
    if ramp == "constant" or stages == 1:
        return (r,) * stages
    rising = tuple(2 * r * stage // (stages - 1) for stage in range(stages))
    return rising if ramp == "increasing" else rising[::-1]


def falls(counts: tuple[int, ...]) -> bool:
    """Whether counts are at least 1 and never rise."""
    return list(counts) == sorted(counts, reverse=True) and min(counts, default=1) >= 1


def ceil(value: float) -> int:
    """The ceiling, with 0.7 * 10 counted as 7 (TDM.md)."""
    return math.ceil(value - 1e-9)
