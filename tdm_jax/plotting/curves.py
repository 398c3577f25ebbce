"""Rows of results as lines of points: what a plot of accuracy against something shows.

A row without a keep rate is a reference, the unreduced model as a rule.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tdm_jax.analysis.results import Result, known


class Axis(NamedTuple):
    """What stands on the horizontal axis.

    Attributes:
      key: field of a `Result`.
      label: with its unit, and which way is better.
      scale: what a value is divided by.
      better: 1 if more is better, -1 if less is, 0 if it is no cost.
      spread: field of the low and the high end of the value.
      reverse: whether values fall from left to right, so that reduction grows.
    """

    key: str
    label: str
    scale: float = 1.0
    better: int = 0
    spread: str = ""
    reverse: bool = False


class Value(NamedTuple):
    """What stands on the vertical axis, more being better.

    Attributes:
      key: field of a `Result`.
      label: with its unit.
      spread: field of its interval, low and high, or of half its width.
    """

    key: str
    label: str
    spread: str


TOP1 = Value("top1_percent", "Top-1 accuracy (%)", "top1_interval")
AGREEMENT = Value(
    "agreement_percent", "Agreement with the unreduced model (%)", "agreement_percent_interval"
)
DENSE = Value("dense_cosine", "Cosine with the unreduced model's patches", "dense_cosine_interval")
COSINE = Value("cosine", "Cosine with the unreduced model's feature", "cosine_interval")

# Reduction grows from left to right, and the best place is the top right corner.
AXES: dict[str, Axis] = {
    "keep_rate": Axis("keep_rate", "Keep rate", reverse=True),
    "flops": Axis("macs", "Multiply-adds per image (G), fewer →", 1e9, -1, reverse=True),
    "throughput": Axis(
        "images_per_second", "Images per second, more →", 1.0, 1, "images_per_second_quartiles"
    ),
    "diversity": Axis("diversity", "Diversity score r(Z)", reverse=True),
    "block": Axis("block", "Block"),
}


class Point(NamedTuple):
    """One row on a plot."""

    x: float
    y: float
    keep_rate: float | None = None
    x_error: tuple[float, float] = (0.0, 0.0)
    y_error: tuple[float, float] = (0.0, 0.0)


def collect(
    rows: Sequence[Result], axis: Axis, value: Value = TOP1
) -> tuple[dict[str, tuple[int, list[Point]]], dict[str, Point]]:
    """Lines by name, each with its number and its points from left to right; references by name."""
    # What all rows share is no part of a name.
    telling = [k for k in ("model", "training") if len({getattr(row, k) for row in rows}) > 1]
    names = [_name(row, telling) for row in rows]
    # A method has the same number on every plot of the same rows, whatever a row lacks.
    methods = dict.fromkeys(n for n, row in zip(names, rows, strict=True) if _reduces(row))
    numbers = {name: i for i, name in enumerate(methods)}
    lines: dict[str, tuple[int, list[Point]]] = {}
    references: dict[str, Point] = {}
    for name, row in zip(names, rows, strict=True):
        if _reduces(row) and _has(row, value.key, axis.key):
            lines.setdefault(name, (numbers[name], []))[1].append(_point(row, axis, value))
        elif _is_reference(row, axis, value):
            references[name] = _point(row, axis, value)
    for _, points in lines.values():
        points.sort(key=lambda p: p.x, reverse=axis.reverse)
    return lines, references


def suffices(rows: Sequence[Result], axis: Axis, value: Value = TOP1) -> bool:
    """Whether some row has both values."""
    return any(_has(row, axis.key, value.key) for row in rows)


def _reduces(row: Result) -> bool:
    # What is described in full has counts of its own instead of a keep rate.
    return _has(row, "keep_rate") or _has(row, "description")


def _is_reference(row: Result, axis: Axis, value: Value) -> bool:
    # Against the keep rate, which it does not have, a reference is a level.
    is_level = axis.key == "keep_rate"
    return not _reduces(row) and _has(row, value.key, *[axis.key] * (not is_level))


def _has(row: Result, *keys: str) -> bool:
    return all(known(getattr(row, key)) for key in keys)


def _name(row: Result, telling: Sequence[str]) -> str:
    keys = [key for key in ("model", "method", "training") if key == "method" or key in telling]
    return " ".join(getattr(row, key) for key in keys if known(getattr(row, key)))


def _point(row: Any, axis: Axis, value: Value) -> Point:
    x = low = high = math.nan
    if _has(row, axis.key):
        # One keep rate a stage: their mean stands for them.
        x = low = high = float(np.mean(getattr(row, axis.key))) / axis.scale
    if axis.spread and _has(row, axis.spread):
        low, high = (float(end) / axis.scale for end in getattr(row, axis.spread))
    y, y_error = getattr(row, value.key), (0.0, 0.0)
    if _has(row, value.spread):
        spread: Any = getattr(row, value.spread)
        is_pair = isinstance(spread, tuple)
        y_error = (y - spread[0], spread[1] - y) if is_pair else (spread, spread)
    return Point(
        x,
        y,
        float(np.mean(row.keep_rate)) if _has(row, "keep_rate") else None,
        (max(0.0, x - low), max(0.0, high - x)),
        y_error,
    )


def pareto_front(points: Sequence[Point], better: int) -> list[Point]:
    """The points that no other beats in one coordinate without losing in the other.

    Args:
      points: more of y is better.
      better: 1 if more of x is better too, -1 if less is.

    Returns:
      The front, from the best x to the best y.
    """
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (-better * p.x, -p.y)):
        if not front or point.y > front[-1].y:
            front.append(point)
    return front
