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
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from tdm_jax.errors import InputError
from tdm_jax.ops.distances import cosine_similarity
from tdm_jax.ops.gathering import gather_tokens, inverse_index, leading_indices
from tdm_jax.ops.merging import Merge
from tdm_jax.ops.ordering import argtopk
from tdm_jax.reduction.contract import BlockContext, ViTShape, plan
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
        count, half = super().stage_count(stage, n, shape), n - n // 2
        if count < half and self.r is None:
            raise InputError(
                f"{self.title}: a stage merges at most half of its {n} tokens; expected a count "
                f"of at least {half}; got {count}"
            )
        # As in the authors' program, r shrinks where too few tokens are left.
        return max(count, half)

    def macs(self, layer: int, n: int, shape: ViTShape) -> int:
        if self.block_plan(layer, n, shape) == (n, n, n):
            return 0
        # The matching, and the sizes times the tokens.
        return bipartite_macs(n, shape) + (n + shape.prefix) * shape.width

    def key_weight(self, state: TokenState, context: BlockContext) -> Float[Array, "b t"] | None:
        return state.proportional() if self.proportional_attention else None

    def reduce(self, state: TokenState, context: BlockContext) -> TokenState:
        return state.merge([self.match(state, context)], state.size)

    def match(self, state: TokenState, context: BlockContext) -> Merge:
        """Which tokens a stage merges into which others."""
        n = state.count
        merging = n - self.stage_count(self.stage(context), n, context.shape)
        return bipartite(mean_keys(context), context.shape.prefix, merging)


def mean_keys(context: BlockContext) -> Float[Array, "b n k"]:
    """The patch tokens' keys, averaged over heads, in float32."""
    attention: Any = context.attention  # there is one at a stage
    return attention.keys().astype(jnp.float32).mean(axis=2)


def mean_keys_macs(n: int, shape: ViTShape) -> int:
    """Multiply-adds of that, the prefix counted: one for each mean."""
    return (n + shape.prefix) * (shape.width // shape.num_heads)


def bipartite(metric: Float[Array, "b n k"], prefix: int, merging: int) -> Merge:
    """Matches tokens of even position with those of odd position, steps 1, 2 and 4.

    Args:
      metric: of the patch tokens, alike where its cosine is high.
      prefix: tokens before them.
      merging: how many merge.
    """
    a, b = prefix % 2, 1 - prefix % 2  # where they begin; then every second token
    similarity = cosine_similarity(metric[:, a::2], metric[:, b::2])
    _, sources, others = similarity.shape
    rank = inverse_index(argtopk(similarity.max(axis=-1), sources), sources)
    # Those that stay come first.
    order = argtopk((rank >= merging).astype(jnp.float32), sources)
    left, gone = order[:, : sources - merging], order[:, sources - merging :]
    return Merge(
        keep=jnp.concatenate([a + 2 * left, b + 2 * leading_indices(others, left)], axis=1),
        gone=a + 2 * gone,
        into=sources - merging + jnp.argmax(gather_tokens(similarity, gone), axis=-1),
    )


def bipartite_macs(n: int, shape: ViTShape) -> int:
    """Multiply-adds of `bipartite` by keys: their mean over heads, and their similarities."""
    t, k = n + shape.prefix, shape.width // shape.num_heads
    return mean_keys_macs(n, shape) + (t // 2) * (t - t // 2) * k


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
