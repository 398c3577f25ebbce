"""The axes of the space of methods, and the parts that there are on each by name."""

from collections.abc import Mapping

from tdm_jax.reduction.averages import AVERAGES
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
