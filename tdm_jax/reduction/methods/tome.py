"""ToMe: Token Merging, Your ViT But Faster (Bolya et al., ICLR 2023, arXiv 2210.09461).

In every block, between attention and MLP, r tokens are merged into others that are alike:

1. All tokens alternate by position, the prefix counted: even positions are A, odd ones B.
2. Each patch token of A finds its most similar one in B: cosine of the keys, averaged over heads.
3. The r pairs that are most alike merge, at most half of the tokens; a token of B may take several.
   A merged token is the mean of its patches: `sum(s_i x_i) / sum(s_i)` with sizes s.
4. What is left of A stands before B, both in order of position.

Prefix tokens neither merge nor are merged into. With proportional attention each key's logit gets
`log(s)` added (equation 1): off the shelf the method needs it, a model trained with ToMe may do
without.

The authors set r by hand (13 in DeiT-S at 224 pixels). A single keep rate, as other methods have
it, becomes the constant r that costs about the same, see `with_constant_r`.
"""

import dataclasses
import functools

from jaxtyping import Array, Float

from tdm_jax.errors import InputError
from tdm_jax.ops.merging import Merge
from tdm_jax.reduction.contract import BlockContext, ViTShape, plan
from tdm_jax.reduction.matching import (
    at_most_half,
    by_similarity,
    matching_macs,
    mean_keys,
    mean_keys_macs,
)
from tdm_jax.reduction.schedules import three_stages
from tdm_jax.reduction.stages import Layers, StageReducer
from tdm_jax.reduction.token_state import TokenState


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToMe(StageReducer):
    """Merges the r most similar pairs of tokens.

    Attributes:
      proportional_attention: whether a token counts in the attention as often as it has patches.
    """

    layers: Layers = "all"
    proportional_attention: bool = True

    def check(self, shape: ViTShape) -> None:
        super().check(shape)
        most = 0 if self.r is None else max(self.removed(shape))
        if most > shape.patches // 2:
            raise InputError(
                f"{self.title}: r must be at most half of the {shape.patches} patches; got {most}"
            )

    def stage_count(self, stage: int, n: int, shape: ViTShape) -> int:
        if self.by_rate and not isinstance(self.keep_rate, tuple):
            return with_constant_r(self, shape).stage_count(stage, n, shape)
        # As in the authors' program, r shrinks where too few tokens are left.
        count = super().stage_count(stage, n, shape)
        return at_most_half(self.title, count, n, self.r is not None)

    def macs(self, layer: int, n: int, shape: ViTShape) -> int:
        if self.block_plan(layer, n, shape) == (n, n, n):
            return 0
        # The matching, and the sizes times the tokens.
        return self.match_macs(n, shape) + (n + shape.prefix) * shape.width

    def match_macs(self, n: int, shape: ViTShape) -> int:
        """Multiply-adds of `match`."""
        own, width = self.metric_macs(n, shape)
        return own + matching_macs(n + shape.prefix, width)

    def metric_macs(self, n: int, shape: ViTShape) -> tuple[int, int]:
        """Multiply-adds of the metric of n tokens, and its width."""
        return mean_keys_macs(n, shape), shape.width // shape.num_heads

    def key_weight(self, state: TokenState, context: BlockContext) -> Float[Array, "b t"] | None:
        return state.proportional() if self.proportional_attention else None

    def reduce(self, state: TokenState, context: BlockContext) -> TokenState:
        return state.merge([self.match(state, context)], state.size)

    def match(self, state: TokenState, context: BlockContext) -> Merge:
        """Which tokens a stage merges into which others."""
        n = state.count
        merging = n - self.stage_count(self.stage(context), n, context.shape)
        return by_similarity(self.metric(state, context), context.shape.prefix, merging)

    def metric(self, state: TokenState, context: BlockContext) -> Float[Array, "b n k"]:
        """What two tokens are compared by."""
        return mean_keys(context)


@functools.lru_cache(maxsize=64)
def with_constant_r(reducer: ToMe, shape: ViTShape) -> ToMe:
    """The constant r that stands for a single keep rate.

    It is the r with which the blocks see, on average, most nearly as many tokens as with a method
    that keeps this rate in three stages, a quarter, a half and three quarters of the way.
    """
    goal = three_stages(reducer.rate(0), shape.patches, shape.depth)

    def distance(r: int) -> float:
        blocks = plan(dataclasses.replace(reducer, r=r), shape)
        return abs(sum((block.attention + block.mlp) / 2 for block in blocks) - goal)

    best = min(range(shape.patches // 2 + 1), key=distance)
    return dataclasses.replace(reducer, r=best)
