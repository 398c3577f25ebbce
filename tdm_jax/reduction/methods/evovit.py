"""Evo-ViT: Slow-Fast Token Evolution (Xu et al., AAAI 2022, arXiv 2108.01390).

A global class attention `g` runs along with the blocks: the class token's attention summed over
heads, averaged with what came before, `g <- (1 - t) g + t new`. At the start of a stage (blocks 4
and 8, from 0) the `floor(keep_rate * n)` patches with the highest g go on and are updated; the
others wait as placeholders and come back as they were after the stage's last block (7 and 11), so
that every stage chooses from all patches. The head reads the mean of the patch tokens.

As the authors' program for DeiT has it: no representative token evolves for the placeholders, and
only patches that are updated have their g updated. The second head that the authors train on the
class token is not here; it takes no part in inference.

"evovit+tdm": the tokens of a stage are TDM's, attentive ones and clusters of the others. After its
last block every patch comes back with the change that its token went through, as the paper's fast
updating has it for its single representative token.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax.numpy as jnp

from tdm_jax.errors import InputError, unknown
from tdm_jax.ops.gathering import gather_tokens
from tdm_jax.ops.ordering import argtopk
from tdm_jax.reduction.composed import Composed
from tdm_jax.reduction.contract import BlockContext, BlockPlan, ViTShape, require
from tdm_jax.reduction.importance import Importance
from tdm_jax.reduction.schedules import Schedule
from tdm_jax.reduction.stages import StageReducer
from tdm_jax.reduction.token_state import TokenState

HEADS = ("mean", "class")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvoViT(StageReducer):
    """Updates the patches with the highest global class attention, and lets the others wait.

    Attributes:
      schedule: its layers are the blocks where a stage starts; it lasts until the next one starts.
      tradeoff: weight of the new class attention in the global one; one for all blocks, or one for
        each. The authors' published models have 1 in the first four blocks and 0.5 elsewhere.
      head: what the classifier reads: "mean" of the patch tokens, as the authors train it, or the
        "class" token, for weights that were trained that way (a plain DeiT's).
      merger: what makes the tokens of a stage instead; None for the best patches alone.
    """

    needs_class_token: ClassVar[bool] = True

    schedule: Schedule = Schedule(keep_rate=0.5, layers="later_thirds")
    tradeoff: float | tuple[float, ...] = 0.5
    head: str = "mean"
    merger: Composed | None = None

    @property
    def before(self) -> bool:
        return True

    @property
    def title(self) -> str:
        return "EvoViT" if self.merger is None else "EvoViT with TDM"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._merger()  # checks its settings
        if self.head not in HEADS:
            raise unknown("EvoViT head", self.head, HEADS)
        each = self.tradeoff if isinstance(self.tradeoff, tuple) else (self.tradeoff,)
        require(self, "tradeoff", all(0 <= t <= 1 for t in each), "be in [0, 1]")

    def check(self, shape: ViTShape) -> None:
        super().check(shape)
        if self.head == "mean" and shape.pool != "token":
            raise InputError(
                "EvoViT: head='mean' puts the mean of the patches where a head reads the class "
                f"token, and the model's reads {shape.pool!r}; expected head='class', which leaves "
                "that to the model"
            )
        if self.stages(shape)[:1] == (0,):
            raise InputError(
                "EvoViT: before block 0 there is no class attention yet; expected layers from 1; "
                f"got {self.stages(shape)}"
            )
        if isinstance(self.tradeoff, tuple) and len(self.tradeoff) != shape.depth:
            raise InputError(
                f"EvoViT: tradeoff must be one number or one for each of the {shape.depth} blocks; "
                f"got {len(self.tradeoff)}"
            )

    def _merger(self) -> Composed | None:
        return self.merger and dataclasses.replace(
            self.merger, title=self.title, schedule=self.schedule
        )

    def stage_count(self, stage: int, n: int, shape: ViTShape) -> int:
        schedule, merger = self.schedule, self._merger()
        if merger is not None:
            return merger.stage_count(stage, n, shape)
        if not schedule.by_rate:
            return schedule.count(stage, n, shape)
        return schedule.rounded(math.floor(schedule.rate(stage) * n + 1e-9), n)

    def ends(self, layer: int, shape: ViTShape) -> bool:
        """Whether a stage ends with this block."""
        starts = self.stages(shape)
        return bool(starts) and layer >= starts[0] and layer + 1 in (*starts, shape.depth)

    def block_plan(self, layer: int, n: int, shape: ViTShape) -> BlockPlan:
        plan = super().block_plan(layer, n, shape)
        return plan._replace(out=shape.patches) if self.ends(layer, shape) else plan

    def macs(self, layer: int, n: int, shape: ViTShape) -> int:
        merger = self._merger()
        stage = merger.macs(layer, n, shape) if merger is not None else 0
        # The two products of the running average.
        return stage + (2 * self.block_plan(layer, n, shape).attention if layer else 0)

    def reduce(self, state: TokenState, context: BlockContext) -> TokenState:
        score, merger, stage = state.carry["attention"], self._merger(), self.stage(context)
        if merger is None:
            index = argtopk(score, self.stage_count(stage, state.count, context.shape))
            chosen = state.select(index)
        else:
            counts: Any = merger.counts(stage, state.count, context.shape)
            chosen = merger.apply(state, score, counts, context)
        return chosen.replace(carry={**state.carry, "home": state.tokens, "start": chosen.tokens})

    def after_attention(self, state: TokenState, context: BlockContext) -> TokenState:
        new = context.attention.class_row().sum(axis=1) / jnp.maximum(state.size, 1.0)
        # Per patch, wherever its token stands now; those that wait keep what they had.
        new = gather_tokens(new, jnp.maximum(state.assign, 0))
        if "attention" in state.carry:
            t = self.tradeoff[context.layer] if isinstance(self.tradeoff, tuple) else self.tradeoff
            old = state.carry["attention"]
            new = jnp.where(state.assign >= 0, (1 - t) * old + t * new, old)
        return state.replace(carry={**state.carry, "attention": new})

    def after_block(self, state: TokenState, context: BlockContext) -> TokenState:
        if "home" not in state.carry or not self.ends(context.layer, context.shape):
            return state
        carry = dict(state.carry)
        home, start = carry.pop("home"), carry.pop("start")
        stand = jnp.maximum(state.assign, 0)
        changed = gather_tokens(state.tokens, stand)
        if self.merger is not None:
            shared = gather_tokens(state.size, stand)[..., None] > 1
            changed = jnp.where(shared, home + changed - gather_tokens(start, stand), changed)
        tokens = jnp.where((state.assign >= 0)[..., None], changed, home)
        again = TokenState.start(state.prefix, tokens, state.dropped_values is not None)
        return again.replace(dropped_values=state.dropped_values, carry=carry)

    @property
    def rewrites_prefix(self) -> bool:
        return self.head != "class"

    def finish(self, state: TokenState, shape: ViTShape) -> TokenState:
        if self.head == "class":
            return state
        mean = state.tokens.astype(jnp.float32).mean(axis=1, keepdims=True)
        prefix = jnp.concatenate([mean.astype(state.prefix.dtype), state.prefix[:, 1:]], axis=1)
        return state.replace(prefix=prefix)


class Running(Importance):
    """Evo-ViT's global class attention, which it keeps itself."""


EVOVIT_TDM = EvoViT(merger=Composed(importance=Running()))
