"""The family of methods that rank the tokens and keep the best.

A member says how it scores (`score`) and how many it keeps (`count`). What is left over is
dropped, unless the member does something else with it (`keep`), or hands its scores to TDM's
merger ("topk+tdm", "dyvit+tdm", ...).
"""

import dataclasses

from jaxtyping import Array, Float

from tdm_jax.reduction.base import Attention, StageReducer, Step, ViTShape, ceil
from tdm_jax.reduction.tdm import Merger
from tdm_jax.tokens import TokenState, top


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneReducer(StageReducer):
    """Keeps the tokens with the highest score, best first.

    Attributes:
      merger: TDM's decoupling and merging, instead of dropping what is not kept.
    """

    merger: Merger | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merger is not None:
            for rate in self.rates:
                if rate < 1:
                    self.merger.rates(rate)

    def count(self, stage: int, n: int, patches: int) -> int:
        del patches
        return ceil(self.rates[stage] * n)

    def stage_count(self, stage: int, n: int, patches: int) -> int:
        kept = super().stage_count(stage, n, patches)
        if self.merger is None or self.rates[stage] == 1:
            return kept
        return min(self.merger.counts(n, self.rates[stage], kept).total, n)

    def macs(self, layer: int, n: int, shape: ViTShape) -> int:
        if self.block_plan(layer, n, shape) == (n, n, n):
            return 0
        stage = self.layers.index(layer)
        kept = super().stage_count(stage, n, shape.patches)
        own = self.score_macs(n, shape)
        if self.merger is not None:
            rate = self.rates[stage]
            return own + self.merger.macs(n, rate, self.merger.counts(n, rate, kept), shape)
        return own + self.keep_macs(n, kept, shape)

    def score_macs(self, n: int, shape: ViTShape) -> int:
        """Multiply-adds of `score`."""
        del n, shape
        return 0

    def keep_macs(self, n: int, count: int, shape: ViTShape) -> int:
        """Multiply-adds of `keep`."""
        del n, count, shape
        return 0

    def score(
        self, state: TokenState, step: Step, attention: Attention | None
    ) -> Float[Array, "b n"]:
        """Importance of each token: positive, higher is better."""
        raise NotImplementedError

    def reduce(self, state: TokenState, step: Step, attention: Attention | None) -> TokenState:
        stage, n, patches = self.layers.index(step.layer), state.count, step.shape.patches
        if self.stage_count(stage, n, patches) == n:
            return state
        score = self.score(state, step, attention)
        kept = super().stage_count(stage, n, patches)
        if self.merger is not None:
            return self.merger(state, score, self.merger.counts(n, self.rates[stage], kept))
        return self.keep(state, score, kept)

    def keep(self, state: TokenState, score: Float[Array, "b n"], count: int) -> TokenState:
        """Reduces the tokens to `count`."""
        return state.select(top(score, count))
