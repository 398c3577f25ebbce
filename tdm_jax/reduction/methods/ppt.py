"""PPT: Token Pruning and Pooling for Efficient Vision Transformers (Wu et al., arXiv 2310.01812).

In some blocks, between attention and MLP, each image either prunes or pools r tokens, at most half:

1. A patch scores `g_j = sum_h A_h[cls, j] ||v_j||`, with `v_j` its value of all heads, normalised
   to sum 1.
2. Where the scores differ much, their unbiased variance at or above `threshold`, the patches of
   highest g stay, ordered by g, and the others are dropped.
3. Where they differ little, ToMe's matching merges those that are alike (`matching`): cosine of the
   keys, averaged over heads, and the size-weighted mean.

Both leave as many tokens, so both are computed, and each image goes on with its own. With
proportional attention a token counts, in every block, as often as it has patches; without it a
merge is the plain mean of the tokens as they are.

Published: r = 50 in blocks 3, 6 and 9 (from 0), and a threshold of 7e-5 off the shelf, 6e-5
trained, at 224 pixels in patches of 16. The variance of p scores that sum to 1 falls like 1 / p^2.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tdm_jax.ops.ordering import argtopk
from tdm_jax.reduction.contract import BlockContext, ViTShape, require
from tdm_jax.reduction.importance import ValueNorm
from tdm_jax.reduction.matching import at_most_half, by_similarity, matching_macs
from tdm_jax.reduction.metrics import Keys
from tdm_jax.reduction.stages import StageReducer
from tdm_jax.reduction.token_state import TokenState


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPT(StageReducer):
    """Prunes where the tokens' scores differ much, pools where they differ little.

    Attributes:
      threshold: variance of the scores below which an image pools.
      proportional_attention: whether a token counts in the attention as often as it has patches.
    """

    threshold: float = 7e-5
    proportional_attention: bool = True

    needs_class_token: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "threshold", self.threshold >= 0, "be at least 0")

    def stage_count(self, stage: int, n: int, shape: ViTShape) -> int:
        count = super().stage_count(stage, n, shape)
        return at_most_half(self.title, count, n, self.schedule.shrinks)

    def macs(self, layer: int, n: int, shape: ViTShape) -> int:
        if not self.acts(layer, n, shape):
            return 0
        t, k = n + shape.prefix, shape.width // shape.num_heads
        scores = ValueNorm().macs(n, shape) + n  # the variance's squares
        # The mean of the keys, their similarities, and the sizes times the tokens.
        return scores + t * k + matching_macs(t, k) + t * shape.width

    def key_weight(self, state: TokenState, context: BlockContext) -> Float[Array, "b t"] | None:
        return state.proportional() if self.proportional_attention else None

    def reduce(self, state: TokenState, context: BlockContext) -> TokenState:
        count = self.stage_count(self.stage(context), state.count, context.shape)
        score = ValueNorm().measure(state, context, {})
        metric = Keys().of(state, context, {}, None)
        merge = by_similarity(metric, context.shape.prefix, state.count - count)
        weight = state.size if self.proportional_attention else jnp.ones_like(state.size)
        pooled, pruned = state.merge([merge], weight), state.select(argtopk(score, count))
        return either(spread(score) < self.threshold, pooled, pruned)


def spread(score: Float[Array, "b n"]) -> Float[Array, " b"]:
    """The unbiased variance of an image's scores; of a single one 0."""
    off = score - score.mean(axis=-1, keepdims=True)
    return (off * off).sum(axis=-1) / max(score.shape[1] - 1, 1)


def either(condition: Bool[Array, " b"], first: TokenState, second: TokenState) -> TokenState:
    """For each image the one state or the other, which have as many tokens."""

    def choose(x: Array, y: Array) -> Array:
        return jnp.where(condition.reshape(-1, *(1,) * (x.ndim - 1)), x, y)

    return jax.tree.map(choose, first, second)
