"""The axes of the space of methods: the parts that there are by name, and where each method is."""

from collections.abc import Mapping

from tdm_jax.reduction.averages import AVERAGES
from tdm_jax.reduction.composed import Composed
from tdm_jax.reduction.groupings import GROUPINGS
from tdm_jax.reduction.importance import IMPORTANCES
from tdm_jax.reduction.metrics import METRICS
from tdm_jax.reduction.parts import Part

AXES: dict[str, Mapping[str, Part]] = {
    "importance": IMPORTANCES,
    "grouping": GROUPINGS,
    "metric": METRICS,
    "average": AVERAGES,
}


def place(point: Composed) -> dict[str, str]:
    """What a method is on each axis, in words."""
    schedule, decoupling = point.schedule, point.decoupling
    by = {"r": "one r", "ratio": "one ratio"}.get(schedule.at_cost_of or "", "share of a stage")
    where = "before" if point.place == "before" else "in"
    blocks = schedule.layers if isinstance(schedule.layers, str) else f"{schedule.layers}"
    if decoupling.drops:
        who = "best kept, rest fused" if decoupling.fuse else "best kept, rest dropped"
    elif decoupling.groups_all:
        who = "all grouped"
    elif decoupling.share is not None:
        who = f"{decoupling.share:.0%} of what stays kept, rest grouped"
    else:
        who = "attentive matched, rest grouped" + (" and fused" if decoupling.fuse else "")
    groups = not decoupling.drops
    return {
        "schedule": f"{where} {blocks}, {'share of the image' if schedule.of_image else by}",
        "importance": _name("importance", point.importance),
        "attentive, others": who,
        "grouping": _name("grouping", point.grouping) if groups else "–",
        "metric": _name("metric", point.metric) if groups else "–",
        "average": _name("average", point.average) if groups else "–",
        "attention afterwards": _attention(point.proportional_attention),
    }


def _attention(power: bool | float) -> str:
    if not power:
        return "plain"
    return "proportional" if power == 1 else f"proportional, power {power:g}"


def _name(axis: str, part: Part | None) -> str:
    if part is None:
        return "–"
    names = [name for name, other in AXES[axis].items() if type(other) is type(part)]
    if names:
        return names[0]
    return "learned" if part.learned else "class, or mean"


def table(points: Mapping[str, object]) -> str:
    """The methods that are made of parts, by axis: a Markdown table.

    Args:
      points: as `registry.REDUCERS`; what is no point is left out.
    """
    rows = {name: place(point) for name, point in points.items() if isinstance(point, Composed)}
    headings = ["method", *next(iter(rows.values()))]
    lines = [headings, ["---"] * len(headings)]
    lines += [[f"`{name}`", *row.values()] for name, row in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
