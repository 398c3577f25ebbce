"""The family of methods that rank the tokens and keep the best.

A member says how it scores (`score`) and how many it keeps (`count`). What is left over is
dropped, unless the member does something else with it (`keep`), or hands its scores to TDM's
merger ("topk+tdm", "dyvit+tdm", ...).
"""

import dataclasses

from jaxtyping import Array, Float

from tdm_jax.errors import InputError
from tdm_jax.ops.ordering import argtopk
from tdm_jax.reduction.contract import BlockContext, KeyMask, Reducer, ViTShape
from tdm_jax.reduction.merger import Merger, TDMCounts
from tdm_jax.reduction.stages import StageReducer
from tdm_jax.reduction.token_state import TokenState


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneReducer(StageReducer):
    """Keeps the tokens with the highest score, best first.

    Attributes:
      merger: TDM's decoupling and merging, instead of dropping what is not kept.
    """

    merger: Merger | None = None

    @property
    def title(self) -> str:
        return type(self).__name__ + ("" if self.merger is None else " with TDM")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merger is None:
            return
        if self.by_rate:
            for rate in self.rates:
                if rate < 1:
                    self.merger.rates(rate)
        if self.merger.fixed and not (self.by_rate and self.round_to == 1):
            raise InputError(
                f"{self.title}: preset 'published' and an explicit cluster_rate fix the "
                "counts; expected them without counts, r and round_to"
            )

    def warmed_up(self, share: float) -> Reducer:
        if self.merger is None or share == 1:
            return super().warmed_up(share)
        # Settings for a few keep rates only cannot serve on the way.
        way = dataclasses.replace(self, merger=self.merger.derived())
        return super(PruneReducer, way).warmed_up(share)

    def stage_count(self, stage: int, n: int, shape: ViTShape) -> int:
        kept = super().stage_count(stage, n, shape)
        if self.merger is None or self._untouched(stage, n, kept):
            return kept
        return min(self._merged(stage, n, kept)[1].total, n)

    def _untouched(self, stage: int, n: int, kept: int) -> bool:
        return self.rate(stage) == 1 if self.by_rate else kept == n

    def _merged(self, stage: int, n: int, kept: int) -> tuple[float, TDMCounts]:
        """The merger's rate and counts at a stage that is to leave `kept` tokens."""
        rate = self.rate(stage) if self.by_rate else kept / n
        # A rate alone leaves the fused token out of what it counts (TDM.md); an explicit count is
        # the whole.
        exact = not self.by_rate or self.round_to > 1
        return rate, self.merger.counts(n, rate, kept, exact)

    def macs(self, layer: int, n: int, shape: ViTShape) -> int:
        if self.block_plan(layer, n, shape) == (n, n, n):
            return 0
        stage = self.stages(shape).index(layer)
        kept = super().stage_count(stage, n, shape)
        own = self.score_macs(n, shape)
        if self.merger is not None:
            return own + self.merger.macs(n, *self._merged(stage, n, kept), shape)
        return own + self.keep_macs(n, kept, shape)

    def score_macs(self, n: int, shape: ViTShape) -> int:
        """Multiply-adds of `score`."""
        return 0

    def keep_macs(self, n: int, count: int, shape: ViTShape) -> int:
        """Multiply-adds of `keep`."""
        return 0

    def score(self, state: TokenState, context: BlockContext) -> Float[Array, "b n"]:
        """Importance of each token: positive, higher is better."""
        raise NotImplementedError

    def key_weight(
        self, state: TokenState, context: BlockContext
    ) -> Float[Array, "b t"] | KeyMask | None:
        proportional = self.merger is not None and self.merger.proportional_attention
        return state.proportional() if proportional else None

    def reduce(self, state: TokenState, context: BlockContext) -> TokenState:
        stage, n = self.stage(context), state.count
        score = self.score(state, context)
        kept = super().stage_count(stage, n, context.shape)
        if self.merger is not None:
            return self.merger(state, score, self._merged(stage, n, kept)[1])
        return self.keep(state, score, kept)

    def keep(self, state: TokenState, score: Float[Array, "b n"], count: int) -> TokenState:
        """Reduces the tokens to `count`."""
        return state.select(argtopk(score, count))
