"""Which blocks reduce, and to how many patch tokens: the schedule, in Python integers.

ToMe's schedules (Bolya et al., ICLR 2023, arXiv 2210.09461, section 3.3) remove r tokens a stage:
the same number everywhere, or a number that falls or rises linearly between 2r and 0. All three
remove the same total, up to rounding. Pruning methods keep a share, of what reaches a stage or of
all patches; DiffRate publishes lists (`diffrate_counts`).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable

from tdm_jax.errors import InputError, unknown
from tdm_jax.reduction.contract import ViTShape, require
from tdm_jax.reduction.diffrate_counts import PUBLISHED, published_counts

RAMPS = ("constant", "decreasing", "increasing")
# Places of the stages as shares of the depth.
PLACES = {
    "quarters": (0.25, 0.5, 0.75),
    "thirds": (0.0, 1 / 3, 2 / 3),
    "later_thirds": (1 / 3, 2 / 3),
}

# Where the runs begin that last to the end.
RUNS = {"all": 0.0, "from_sixth": 1 / 6}
GRADUAL = "gradual"

Layers = tuple[int, ...] | str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which blocks have a stage, and how many patch tokens leave it.

    Attributes:
      keep_rate: share of the patch tokens that leaves a stage, in (0, 1]; one for all stages, or
        one for each.
      layers: the blocks with a stage, from 0, ascending; "quarters" for those at a quarter, a half
        and three quarters of the depth (3, 6 and 9 of 12), "thirds" for 0, 4 and 8 of 12,
        "later_thirds" for 4 and 8; "all" for every block, "from_sixth" for every block from a
        sixth of the depth on (2 of 12), "gradual" for the latter unless a keep rate would then
        leave less than an eighth of the patches: in that case for all.
      counts: patch tokens that leave each stage, instead of what follows from the keep rate; or the
        name of counts that DiffRate published, of `diffrate_counts.PUBLISHED`, which are of all
        blocks and are carried to the model's patches.
      r: patch tokens that a stage removes, instead of the keep rate; one number for all stages, or
        one for each. A stage never removes the last token. A number below 1 is a share of what
        reaches the stage.
      ratio: share of its tokens that every stage leaves, instead of the keep rate.
      ramp: how an `r` for all stages is spread: "constant", "decreasing" from 2r to 0, or
        "increasing" from 0 to 2r.
      inflection: the same as a slope, from -1 (2r to 0) to 1 (0 to 2r), see `inflected`.
      round_to: counts are rounded up to a multiple of this, for hardware tiles.
      of_image: whether keep rates multiply to a share of all patches, instead of each being one of
        what reaches a stage.
      at_cost_of: "r" or "ratio" where a single keep rate is what another method costs by it in
        three stages, see `at_equal_cost`; None where it is a rate of each stage.
    """

    keep_rate: float | tuple[float, ...] = 0.7
    layers: Layers = "quarters"
    counts: tuple[int, ...] | str | None = None
    r: int | float | tuple[int, ...] | None = None
    ratio: float | None = None
    ramp: str = "constant"
    inflection: float = 0.0
    round_to: int = 1
    of_image: bool = dataclasses.field(default=False, metadata={"fixed": True})
    at_cost_of: str | None = dataclasses.field(default=None, metadata={"fixed": True})

    def validate(self, title: str) -> None:
        """Raises InputError, in the name of a method, unless every setting is in range."""
        demand = functools.partial(require, self, title=title)
        if isinstance(self.layers, str):
            if self.layers not in (names := (GRADUAL, *RUNS, *PLACES)):
                raise unknown(f"{title} layers", self.layers, names)
        else:
            ascending = isinstance(self.layers, tuple)
            ascending = ascending and list(self.layers) == sorted(set(self.layers))
            ascending = ascending and min(self.layers, default=0) >= 0
            names = tuple(map(repr, (GRADUAL, *RUNS, *PLACES)))
            demand(
                "layers",
                ascending,
                f"be ascending block indices from 0, or one of {', '.join(names)}",
            )
        self._check_lengths(title)
        demand("keep_rate", all(0 < rate <= 1 for rate in self.rates), "be in (0, 1]")
        demand("ratio", self.ratio is None or 0 < self.ratio <= 1, "be in (0, 1]")
        given = [name for name in ("counts", "r", "ratio") if getattr(self, name) is not None]
        if len(given) > 1:
            got = ", ".join(f"{name}={getattr(self, name)}" for name in given)
            raise InputError(f"{title}: expected one of counts, r and ratio; got {got}")
        if isinstance(self.counts, str):
            if self.counts not in PUBLISHED:
                raise unknown(f"{title} counts", self.counts, PUBLISHED)
        else:
            demand("counts", falls(self.counts or ()), "be at least 1 and must not rise")
        demand("r", min(_each(self.r or 0), default=0) >= 0, "be at least 0")
        whole = not isinstance(self.r, float) or self.r < 1
        demand("r", whole, "be a whole number, or a share below 1")
        if self.ramp not in RAMPS:
            raise unknown(f"{title} ramp", self.ramp, RAMPS)
        demand("inflection", -1 <= self.inflection <= 1, "be from -1 to 1")
        if self.inflection and self.ramp != "constant":
            raise InputError(
                f"{title}: expected a ramp or an inflection; got ramp={self.ramp!r}, "
                f"inflection={self.inflection:g}"
            )
        demand("round_to", self.round_to >= 1, "be at least 1")

    def _check_lengths(self, title: str, stages: int | None = None) -> None:
        stages = self.number if stages is None else stages
        for field in ("keep_rate", "counts", "r"):
            value = getattr(self, field)
            if isinstance(value, tuple) and stages is not None and len(value) != stages:
                raise InputError(
                    f"{title}: {field} must have one number for each of the "
                    f"{stages} layers; got {len(value)}"
                )

    def check(self, title: str, shape: ViTShape) -> None:
        """Raises InputError, in the name of a method, if it does not fit a transformer."""
        demand, patches = functools.partial(require, self, title=title), shape.patches
        if isinstance(self.counts, str):
            listed = len(PUBLISHED[self.counts].prune)
            if shape.depth != listed:
                raise InputError(
                    f"{title}: published counts are of {listed} blocks and the model has "
                    f"{shape.depth}; expected counts, one number for each stage"
                )
            return
        layers = self.stages(shape)
        blocks = f"lie within the {shape.depth} blocks 0..{shape.depth - 1}"
        demand("layers", max(layers, default=0) < shape.depth, blocks)
        self._check_lengths(title, len(layers))
        fits = max(self.counts or (), default=0) <= patches
        demand("counts", fits, f"be at most the {patches} patches")
        fits = max(_each(self.r or 0), default=0) < patches
        demand("r", fits, f"be below the {patches} patches")

    @property
    def number(self) -> int | None:
        """How many stages there are; None where that depends on the model's depth."""
        if self.layers in (GRADUAL, *RUNS) or isinstance(self.counts, str):
            return None
        return len(PLACES[self.layers]) if isinstance(self.layers, str) else len(self.layers)

    @property
    def rates(self) -> tuple[float, ...]:
        """The keep rate of each stage; only one where all are the same and every block is one."""
        if isinstance(self.keep_rate, tuple):
            return self.keep_rate
        return (float(self.keep_rate),) * (self.number or 1)

    @property
    def by_rate(self) -> bool:
        """Whether the keep rate decides the counts."""
        return self.counts is None and self.r is None and self.ratio is None

    @property
    def by_stage(self) -> bool:
        """Whether the keep rate is a rate of each stage, and decides its count."""
        return self.by_rate and (isinstance(self.keep_rate, tuple) or not self.at_cost_of)

    @property
    def shrinks(self) -> bool:
        """Whether a stage may keep more than it should where it can remove only some tokens."""
        numbered = isinstance(self.r, int | tuple) or isinstance(self.counts, str)
        return numbered or (self.by_rate and not self.by_stage)

    def rate(self, stage: int) -> float:
        """The keep rate of a stage."""
        return self.keep_rate[stage] if isinstance(self.keep_rate, tuple) else self.keep_rate

    def at_keep_rate(self, keep_rate: float | tuple[float, ...]) -> "Schedule":
        """The same with a keep rate; what was asked for by number would overrule it."""
        return dataclasses.replace(self, keep_rate=keep_rate, counts=None, r=None, ratio=None)

    def variants(self, shape: ViTShape) -> list["Schedule"]:
        """The same from many tokens to few, in steps as fine as its counts allow.

        What removes a number of tokens falls by as many in every stage, which may be a fraction.
        """
        if self.at_cost_of == "ratio":
            return [dataclasses.replace(self, ratio=step / 1000) for step in range(999, 499, -1)]
        if self.at_cost_of != "r":
            return [self.at_keep_rate(step / 1000) for step in range(999, 0, -1)]
        if self.layers == GRADUAL:
            late, every = (dataclasses.replace(self, layers=run) for run in ("from_sixth", "all"))
            first, most = len(late.stages(shape)), shape.patches * 7 / 8
            # Where the late blocks end, all take over at the same cost.
            start = most * (first + 1) / (shape.depth + 1)
            return [v for v in late.variants(shape) if sum(v.removed(shape)) <= most] + [
                v for v in every.variants(shape) if sum(v.removed(shape)) > start
            ]
        stages = len(self.stages(shape))
        # More than all, because a stage that cannot remove so many removes what it can.
        totals = range(1, 2 * shape.patches)
        return [dataclasses.replace(self, counts=None, r=spread(total, stages)) for total in totals]

    def warmed_up(self, share: float) -> "Schedule":
        """On the way from no reduction, at a share of 0, to this, at 1."""
        if share == 1:
            return self
        rates = tuple(1.0 - (1.0 - rate) * share for rate in self.rates)
        keep_rate = rates if isinstance(self.keep_rate, tuple) else rates[0]
        return dataclasses.replace(self, keep_rate=keep_rate)

    def stages(self, shape: ViTShape) -> tuple[int, ...]:
        """The blocks with a stage."""
        if isinstance(self.counts, str):
            return tuple(range(shape.depth))
        if self.layers == GRADUAL:
            return gradual(self, shape).stages(shape)
        if self.layers in RUNS:
            return tuple(range(int(shape.depth * RUNS[str(self.layers)] + 1e-9), shape.depth))
        if isinstance(self.layers, str):
            # Shallow models have fewer blocks than places.
            places = PLACES[self.layers]
            return tuple(sorted({int(shape.depth * place + 1e-9) for place in places}))
        return self.layers

    def removed(self, shape: ViTShape) -> tuple[int, ...]:
        """Patch tokens that each stage is to remove, where `r` says so."""
        stages = len(self.stages(shape))
        if isinstance(self.r, float):
            return (int(shape.patches * self.r),) * stages
        if self.inflection and isinstance(self.r, int):
            return inflected(self.r, self.inflection, stages)
        return removals(self.r or 0, self.ramp, stages)

    def of_all(self, stage: int, patches: int) -> int:
        """`floor(patches * k_0 * ... * k_stage)`."""
        rate = math.prod(self.rate(i) for i in range(stage + 1))
        return math.floor(patches * rate + 1e-9)

    def count(self, stage: int, n: int, shape: ViTShape) -> int:
        """Patch tokens that leave a stage of the n that reach it."""
        if isinstance(self.counts, str):
            count = published_counts(self.counts, shape.patches).merge[stage] - 1
        elif self.counts is not None:
            count = self.counts[stage]
        elif isinstance(self.r, float):
            count = n - int(n * self.r + 1e-9)
        elif self.r is not None:
            count = n - self.removed(shape)[stage]
        elif self.ratio is not None:
            count = n - math.floor(n - n * self.ratio)
        elif not self.by_stage:
            return at_equal_cost(self, shape).count(stage, n, shape)
        elif self.of_image:
            count = self.of_all(stage, shape.patches)
        else:
            count = ceil(self.rate(stage) * n)
        return self.rounded(count, n)

    def rounded(self, count: int, n: int) -> int:
        """A count of n tokens that fills whole tiles."""
        count = min(max(count, 1), n)
        return min(-(-count // self.round_to) * self.round_to, n)


@functools.lru_cache(maxsize=256)
def at_equal_cost(schedule: Schedule, shape: ViTShape) -> Schedule:
    """The constant r, or the ratio in steps of 1/400, that stands for a single keep rate.

    With it the blocks see, on average, most nearly as many tokens as with a method that keeps this
    rate in three stages, a quarter, a half and three quarters of the way. A stage removes at most
    half of its tokens.
    """
    goal = three_stages(schedule.rate(0), shape.patches, shape.depth)
    if schedule.layers == GRADUAL:
        schedule = gradual(schedule, shape)
    if schedule.at_cost_of == "r":
        trials = [dataclasses.replace(schedule, r=r) for r in range(shape.patches // 2 + 1)]
    else:
        trials = [dataclasses.replace(schedule, ratio=1 - step / 400) for step in range(201)]

    def distance(trial: Schedule) -> float:
        stages, n, seen = trial.stages(shape), shape.patches, 0.0
        for layer in range(shape.depth):
            before = n
            if layer in stages:
                n = max(trial.count(stages.index(layer), n, shape), n - n // 2)
            seen += (before + n) / 2
        return abs(seen - goal)

    return min(trials, key=distance)


@functools.lru_cache(maxsize=256)
def gradual(schedule: Schedule, shape: ViTShape) -> Schedule:
    """With the blocks that a gradual schedule stands in, see `Schedule.layers`."""
    late = dataclasses.replace(schedule, layers="from_sixth")
    if schedule.by_rate and not schedule.by_stage:
        n = shape.patches
        for stage in range(len(late.stages(shape))):
            n = max(late.count(stage, n, shape), n - n // 2)
        if n < shape.patches / 8:
            return dataclasses.replace(schedule, layers="all")
    return late


def _each(value: float | tuple[int, ...]) -> Iterable[float]:
    return value if isinstance(value, tuple) else (value,)


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


def spread(total: int, stages: int) -> tuple[int, ...]:
    """So many tokens removed in all, as evenly as whole numbers allow."""
    ends = [round(total * stage / stages) for stage in range(stages + 1)]
    return tuple(after - before for before, after in itertools.pairwise(ends))


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
