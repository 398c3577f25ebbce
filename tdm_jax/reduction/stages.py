"""Methods that reduce at a few stages, by a schedule."""

import dataclasses
from collections.abc import Sequence

from tdm_jax.errors import InputError
from tdm_jax.reduction.contract import BlockContext, BlockPlan, Reducer, ViTShape
from tdm_jax.reduction.schedules import Schedule
from tdm_jax.reduction.token_state import TokenState


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageReducer(Reducer):
    """A method that reduces at a few stages, by a schedule.

    Attributes:
      schedule: which blocks, and which counts.
    """

    schedule: Schedule = Schedule()

    def __post_init__(self) -> None:
        self.schedule.validate(self.title)

    @property
    def before(self) -> bool:
        """Whether a stage stands before its block, or between the block's attention and MLP."""
        return False

    @property
    def by_rate(self) -> bool:
        """Whether the keep rate decides the counts."""
        return self.schedule.by_rate

    def scheduled(self, schedule: Schedule) -> "StageReducer":
        """The same method by another schedule."""
        return dataclasses.replace(self, schedule=schedule)

    def at_keep_rate(self, keep_rate: float | tuple[float, ...]) -> Reducer:
        return self.scheduled(self.schedule.at_keep_rate(keep_rate))

    def variants(self, shape: ViTShape) -> Sequence[Reducer]:
        return [self.scheduled(schedule) for schedule in self.schedule.variants(shape)]

    def warmed_up(self, share: float) -> Reducer:
        if not (self.by_rate or self.adaptive):
            raise InputError(
                f"{self.title}: counts, r and ratio overrule the keep rate, which a warm-up moves; "
                f"got counts={self.schedule.counts}, r={self.schedule.r}"
            )
        return self.scheduled(self.schedule.warmed_up(share))

    def stages(self, shape: ViTShape) -> tuple[int, ...]:
        """The blocks with a stage."""
        return self.schedule.stages(shape)

    def check(self, shape: ViTShape) -> None:
        super().check(shape)
        self.schedule.check(self.title, shape)

    def stage_count(self, stage: int, n: int, shape: ViTShape) -> int:
        """Tokens that leave a stage of the n that reach it."""
        return self.schedule.count(stage, n, shape)

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
