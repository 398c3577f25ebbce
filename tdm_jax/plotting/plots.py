"""Plots of results: accuracy against keep rate, FLOPs, throughput and diversity.

Rows become lines in `curves`. Methods differ in colour and marker and are named at their lines: no
legend has to be matched, nor colours told apart.

Needs matplotlib, the extra `viz`.
"""

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tdm_jax.analysis.results import Result
from tdm_jax.errors import InputError, unknown
from tdm_jax.files import replacing
from tdm_jax.plotting import colors
from tdm_jax.plotting.curves import AXES, TOP1, Axis, Point, Value, collect, pareto_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Yellow is left out: on white it has no contrast.
_COLORS = (
    colors.BLUE,
    colors.VERMILLION,
    colors.GREEN,
    colors.PURPLE,
    colors.ORANGE,
    colors.SKY,
    colors.mix(colors.INK, colors.PAPER, 0.25),
)
_MARKERS = "osD^vPX<>"
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))
_INK, _QUIET, _FAINT = (
    colors.hex_code(colors.mix(colors.INK, colors.PAPER, share)) for share in (0, 0.4, 0.85)
)


class Look(NamedTuple):
    """How a line is drawn."""

    color: str
    label_color: str
    marker: str
    dash: Any

    @classmethod
    def of(cls, index: int) -> "Look":
        """Of the index-th line; the first seven differ in colour, 63 in colour and marker."""
        rgb = _COLORS[index % len(_COLORS)]
        return cls(
            colors.hex_code(rgb),
            # Text needs more contrast than a line.
            colors.hex_code(colors.mix(rgb, colors.INK, 0.35)),
            _MARKERS[index % len(_MARKERS)],
            _DASHES[index // len(_COLORS) % len(_DASHES)],
        )


def installed() -> bool:
    """Whether there is matplotlib to plot with."""
    return importlib.util.find_spec("matplotlib") is not None


def check_installed() -> None:
    """To be called before the work whose results are to be plotted.

    Raises:
      InputError: there is no matplotlib.
    """
    if not installed():
        raise InputError("plots need matplotlib; expected pip install 'tdm_jax[viz]'")


def plot(
    rows: Sequence[Result],
    against: str,
    title: str = "",
    size: tuple[float, float] = (7.2, 4.4),
    value: Value = TOP1,
) -> "Figure":
    """Plots accuracy, or another value, against something, a line for each method.

    Where the horizontal axis is a cost, the Pareto front of all rows lies behind the lines: the
    rows that no other beats in accuracy at no more cost. Its points show their keep rates.

    Args:
      rows: at least one; those that lack the accuracy or the horizontal value are left out.
      against: one of `AXES`.
      title: "" for none.
      size: width and height in inches; on a smaller plot the text is larger beside the rest.
      value: what stands on the vertical axis.

    Returns:
      A matplotlib figure; see `save`.

    Raises:
      InputError: no such axis, no row with both values, or matplotlib is not installed.
    """
    if against not in AXES:
        raise unknown("axis", against, AXES)
    axis = AXES[against]
    lines, references = collect(rows, axis, value)
    if not lines and not references:
        raise InputError(f"plot: expected rows with {value.key} and {axis.key}; got none")
    figure = _figure(size)
    axes = figure.add_subplot()
    _frame(axes, axis, value, title)
    ends = []
    for name, (index, points) in lines.items():
        look = Look.of(index)
        _draw_line(axes, points, look)
        ends.append((name, points[-1], look.label_color))
    for name, point in references.items():
        _draw_reference(axes, point)
        ends.append((f"{name} {point.y:.3g}", point, _INK))
    if axis.better:
        points = [point for _, line in lines.values() for point in line]
        _draw_front(axes, pareto_front([*points, *references.values()], axis.better))
    if against == "keep_rate":
        rates = {point.x for _, points in lines.values() for point in points}
        axes.set_xticks(sorted(rates), [f"{rate:.2g}" for rate in sorted(rates)])
    _name_ends(axes, ends)
    return figure


def save(figure: "Figure", path: str | Path) -> None:
    """Writes a plot, whole or not at all; the same rows give the same file.

    Raises:
      InputError: the suffix is neither .png nor .svg, or nothing can be written there.
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise InputError(f"cannot write {path}: expected a name that ends in .png or .svg")
    import matplotlib

    stable: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "tdm_jax"}
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    with replacing(path) as beside, matplotlib.rc_context(stable):
        figure.savefig(beside, dpi=200, metadata=metadata)


def _figure(size: tuple[float, float]) -> "Figure":
    check_installed()
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained", facecolor="white")


def _frame(axes: "Axes", axis: Axis, value: Value, title: str) -> None:
    axes.set_xlabel(axis.label, color=_INK, loc="left")
    axes.set_ylabel(value.label, color=_INK)
    if title:
        axes.set_title(title, loc="left", color=_INK, fontweight="bold", parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_QUIET)
    axes.tick_params(colors=_QUIET)
    axes.grid(color=_FAINT, linewidth=0.8)
    axes.margins(y=0.1)
    axes.set_axisbelow(True)
    if axis.reverse:
        axes.invert_xaxis()


def _draw_line(axes: "Axes", points: Sequence[Point], look: Look) -> None:
    errors: dict[str, Any] = {
        "xerr": np.array([p.x_error for p in points]).T,
        "yerr": np.array([p.y_error for p in points]).T,
    }
    axes.errorbar(
        [p.x for p in points], [p.y for p in points],
        **{name: lengths for name, lengths in errors.items() if lengths.any()},
        color=look.color, marker=look.marker, linestyle=look.dash, linewidth=1.8, markersize=6,
        markeredgecolor="white", markeredgewidth=0.8, elinewidth=1, capsize=2, zorder=3,
    )  # fmt: skip


def _draw_reference(axes: "Axes", point: Point) -> None:
    if math.isnan(point.x):
        axes.axhline(point.y, color=_INK, linewidth=1.2, linestyle=(0, (4, 3)), zorder=2)
    else:
        axes.plot(point.x, point.y, "*", ms=13, color=_INK, markeredgecolor="white", zorder=4)


def _draw_front(axes: "Axes", front: Sequence[Point]) -> None:
    axes.plot(
        [p.x for p in front], [p.y for p in front], color=_FAINT, linewidth=9, zorder=1,
        solid_capstyle="round", solid_joinstyle="round", label="Pareto front, with keep rates",
    )  # fmt: skip
    axes.legend(
        frameon=False, loc="lower right", bbox_to_anchor=(1, 1), fontsize=9, labelcolor=_QUIET
    )
    width = abs(float(np.ptp(axes.get_xlim())))
    last = math.inf
    for point in front:
        if point.keep_rate is not None and abs(point.x - last) > 0.04 * width:
            last = point.x
            axes.annotate(
                f"{point.keep_rate:.2g}", (point.x, point.y), (0, 9), ha="center",
                textcoords="offset points", fontsize=8.5, color=_QUIET,
            )  # fmt: skip


def _name_ends(axes: "Axes", ends: Sequence[tuple[str, Point, str]]) -> None:
    """Names the lines at the right of the plot, where they do not overlap."""
    figure: Any = axes.get_figure()
    width, height = figure.get_size_inches()
    gap = 0.27 / height  # a line of text, in inches
    longest = int(5 * width)  # characters; more would leave the lines no room
    low, high = axes.get_ylim()
    right = axes.get_xlim()[1]
    heights = spread_out([(point.y - low) / (high - low) for _, point, _ in ends], gap)
    for (name, point, color), height in zip(ends, heights, strict=True):
        axes.annotate(
            _shortened(name, longest), (right if math.isnan(point.x) else point.x, point.y),
            (1.04, height), textcoords="axes fraction", va="center",
            color=color, fontweight="bold", parse_math=False, annotation_clip=False,
            arrowprops=dict(
                arrowstyle="-", color=color, linewidth=0.7, alpha=0.6, shrinkA=2, shrinkB=6
            ),
        )  # fmt: skip


def _shortened(name: str, longest: int) -> str:
    """The name, or its beginning and end."""
    if len(name) <= longest:
        return name
    return f"{name[: longest // 2]}…{name[-(longest // 2) :]}"


def spread_out(heights: Sequence[float], gap: float) -> list[float]:
    """Moves heights apart until each is `gap` from the next, in their order, by little.

    Neighbours that must give way keep their mean; all stays within [0, 1] while there is room.
    """
    order = sorted(range(len(heights)), key=lambda i: (heights[i], i))
    # With i gaps taken from the i-th, "apart" reads "ascending": isotonic regression, by pooling.
    blocks: list[list[float]] = []  # [sum, count]
    for place, i in enumerate(order):
        blocks.append([heights[i] - place * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    flat = [total / count for total, count in blocks for _ in range(int(count))]
    top = 1 - (len(heights) - 1) * gap
    placed = [0.0] * len(heights)
    for place, i in enumerate(order):
        placed[i] = max(0.0, min(flat[place], top)) + place * gap
    return placed
