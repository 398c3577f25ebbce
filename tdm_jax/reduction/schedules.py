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


def inflected(r: int, inflection: float, stages: int, total: int | None = None) -> tuple[int, ...]:
    """Tokens that each stage removes, on a line whose steepness is a number.

    From `int(r (1 - inflection))` to 2r less that, each rounded down: -1 and 1 are the falling and
    the rising ramp of `removals`, 0 is a constant.

    Args:
      r: the mean of all stages.
      inflection: from -1 to 1.
      stages: their number.
      total: removed in all, at least what the line removes; what is left over goes to the first
        stage where the line falls, to the last otherwise. None for what the line removes.
    """
    first = int(r * (1 - inflection))
    step = (2 * r - 2 * first) / max(stages - 1, 1)
    line = [int(first + step * stage) for stage in range(stages)]
    if total is not None:
        line[0 if inflection < 0 else -1] += total - sum(line)
    return tuple(line)


def three_stages(rate: float, patches: int, depth: int) -> float:
    """Tokens that all blocks see together where three stages keep this rate of them.

    The stages stand a quarter, a half and three quarters of the way.
    """
    goal, n = 0.0, float(patches)
    for layer in range(depth):
        before, n = n, patches * rate ** min(int(layer / (depth / 4)), 3)
        goal += (before + n) / 2
    return goal


def falls(counts: tuple[int, ...]) -> bool:
    """Whether counts are at least 1 and never rise."""
    return list(counts) == sorted(counts, reverse=True) and min(counts, default=1) >= 1


def ceil(value: float) -> int:
    """The ceiling, with 0.7 * 10 counted as 7 (TDM.md)."""
    return math.ceil(value - 1e-9)
