"""Methods that reduce at a few stages, by a schedule."""

import dataclasses
import math
from typing import ClassVar, Literal

from tdm_jax.errors import InputError, unknown
from tdm_jax.reduction.contract import BlockContext, BlockPlan, Reducer, ViTShape, require
from tdm_jax.reduction.schedules import RAMPS, ceil, falls, removals
from tdm_jax.reduction.token_state import TokenState

Layers = tuple[int, ...] | Literal["all"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageReducer(Reducer):
    """A method that reduces at a few stages, by a schedule.

    Attributes:
      keep_rate: share of the patch tokens that leaves a stage, in (0, 1]; one for all stages, or
        one for each.
      layers: the blocks with a stage, from 0, ascending; "all" for every block.
      counts: patch tokens that leave each stage, instead of what follows from the keep rate.
      r: patch tokens that a stage removes, instead of the keep rate; one number for all stages, or
        one for each. A stage never removes the last token.
      ramp: how an `r` for all stages is spread: "constant", "decreasing" from 2r to 0, or
        "increasing" from 0 to 2r.
      round_to: counts are rounded up to a multiple of this, for hardware tiles.
    """

    keep_rate: float | tuple[float, ...] = 0.7
    layers: Layers = (3, 6, 9)
    counts: tuple[int, ...] | None = None
    r: int | tuple[int, ...] | None = None
    ramp: str = "constant"
    round_to: int = 1

    # Whether a stage stands before its block, or between the block's attention and MLP.
    before: ClassVar[bool] = False
    # Whether keep rates multiply to a share of all patches, or each is one of what reaches a stage.
    cumulative: ClassVar[bool] = False

    def __post_init__(self) -> None:
        layers = self.layers
        if layers != "all":
            ascending = isinstance(layers, tuple) and list(layers) == sorted(set(layers))
            ascending = ascending and min(layers, default=0) >= 0
            require(self, "layers", ascending, "be ascending block indices from 0, or 'all'")
            self._check_lengths(len(layers))
        require(self, "keep_rate", all(0 < rate <= 1 for rate in self.rates), "be in (0, 1]")
        if self.counts is not None and self.r is not None:
            raise InputError(
                f"{self.title}: expected counts or r, not both; got counts={self.counts}, "
                f"r={self.r}"
            )
        require(self, "counts", falls(self.counts or ()), "be at least 1 and must not rise")
        require(self, "r", min(self._removed, default=0) >= 0, "be at least 0")
        if self.ramp not in RAMPS:
            raise unknown(f"{self.title} ramp", self.ramp, RAMPS)
        require(self, "round_to", self.round_to >= 1, "be at least 1")

    def _check_lengths(self, stages: int) -> None:
        for field in ("keep_rate", "counts", "r"):
            value = getattr(self, field)
            if isinstance(value, tuple) and len(value) != stages:
                raise InputError(
                    f"{self.title}: {field} must have one number for each of the "
                    f"{stages} layers; got {len(value)}"
                )

    @property
    def rates(self) -> tuple[float, ...]:
        """The keep rate of each stage; only one where all are the same and every block is one."""
        if isinstance(self.keep_rate, tuple):
            return self.keep_rate
        return (float(self.keep_rate),) * (1 if self.layers == "all" else len(self.layers))

    @property
    def _removed(self) -> tuple[int, ...]:
        return self.r if isinstance(self.r, tuple) else (self.r or 0,)

    @property
    def by_rate(self) -> bool:
        """Whether the keep rate decides the counts."""
        return self.counts is None and self.r is None

    def rate(self, stage: int) -> float:
        """The keep rate of a stage."""
        return self.keep_rate[stage] if isinstance(self.keep_rate, tuple) else self.keep_rate

    def at_keep_rate(self, keep_rate: float | tuple[float, ...]) -> Reducer:
        # Counts that were asked for by number would overrule it.
        return dataclasses.replace(self, keep_rate=keep_rate, counts=None, r=None)

    def warmed_up(self, share: float) -> Reducer:
        if not (self.by_rate or self.adaptive):
            raise InputError(
                f"{self.title}: counts and r overrule the keep rate, which a warm-up moves; "
                f"got counts={self.counts}, r={self.r}"
            )
        if share == 1:
            return self
        rates = tuple(1.0 - (1.0 - rate) * share for rate in self.rates)
        keep_rate = rates if isinstance(self.keep_rate, tuple) else rates[0]
        return dataclasses.replace(self, keep_rate=keep_rate)

    def cumulative_count(self, stage: int, patches: int) -> int:
        """`floor(patches * k_0 * ... * k_stage)`."""
        rate = math.prod(self.rate(i) for i in range(stage + 1))
        return math.floor(patches * rate + 1e-9)

    def stages(self, shape: ViTShape) -> tuple[int, ...]:
        """The blocks with a stage."""
        return tuple(range(shape.depth)) if self.layers == "all" else self.layers

    def check(self, shape: ViTShape) -> None:
        super().check(shape)
        layers, patches = self.stages(shape), shape.patches
        blocks = f"lie within the {shape.depth} blocks 0..{shape.depth - 1}"
        require(self, "layers", max(layers, default=0) < shape.depth, blocks)
        self._check_lengths(len(layers))
        fits = max(self.counts or (), default=0) <= patches
        require(self, "counts", fits, f"be at most the {patches} patches")
        fits = max(self._removed, default=0) < patches
        require(self, "r", fits, f"be below the {patches} patches")

    def removed(self, shape: ViTShape) -> tuple[int, ...]:
        """Patch tokens that each stage is to remove, where `r` says so."""
        return removals(self.r or 0, self.ramp, len(self.stages(shape)))

    def count(self, stage: int, n: int, patches: int) -> int:
        """Tokens that leave a stage by its keep rate, before rounding, of the n that reach it."""
        if self.cumulative:
            return self.cumulative_count(stage, patches)
        return ceil(self.rate(stage) * n)

    def stage_count(self, stage: int, n: int, shape: ViTShape) -> int:
        """Tokens that leave a stage of the n that reach it."""
        if self.counts is not None:
            count = self.counts[stage]
        elif self.r is not None:
            count = n - self.removed(shape)[stage]
        else:
            count = self.count(stage, n, shape.patches)
        count = min(max(count, 1), n)
        return min(-(-count // self.round_to) * self.round_to, n)

    def block_plan(self, layer: int, n: int, shape: ViTShape) -> BlockPlan:
        if layer not in self.stages(shape):
            return BlockPlan(n, n, n)
        m = self.stage_count(self.stages(shape).index(layer), n, shape)
        return BlockPlan(m if self.before else n, m, m)

    def reduce(self, state: TokenState, context: BlockContext) -> TokenState:
        """One stage that leaves fewer tokens than reach it."""
        raise NotImplementedError

    def stage(self, context: BlockContext) -> int:
        """Which stage a hook in a reducing block belongs to."""
        return self.stages(context.shape).index(context.layer)

    def reduces(self, state: TokenState, context: BlockContext) -> bool:
        """Whether this block has a stage that leaves fewer tokens."""
        stages = self.stages(context.shape)
        return context.layer in stages and (
            self.stage_count(self.stage(context), state.count, context.shape) < state.count
        )

    def before_block(self, state: TokenState, context: BlockContext) -> TokenState:
        if self.before and self.reduces(state, context):
            return self.reduce(state, context)
        return state

    def after_attention(self, state: TokenState, context: BlockContext) -> TokenState:
        if not self.before and self.reduces(state, context):
            return self.reduce(state, context)
        return state
