"""PiToMe: Accelerating Transformers with Spectrum-Preserving Token Merging.

Tran et al., NeurIPS 2024 (arXiv 2405.16148). In every block i of L, between attention and MLP,
n patch tokens lose `r = floor(n - n * ratio)`:

1. Similarity C: the cosine of the keys, averaged over heads.
2. Energy of token j: the mean over all l of `elu(C_jl - m_i)` with the margin
   `m_i = 0.75 - 0.75 i / L` (equation 4). It is high in a large group of tokens that are alike,
   such as background, and low for what stands alone; tokens are ranked by it.
3. In the first half of the blocks (`i < ceil(L / 2)`) even ranks are A, odd ones B; each token of A
   finds its most similar one in B, and the r pairs that are most alike merge. What is left of A
   comes first, most alike first, then B by rank.
   In the second half only the first 2r ranks take part, as A and B in turn, and all of A merge; the
   others come first, by rank, then B.

A merged token is the mean of its patches. The authors' image models have no proportional attention.
Prefix tokens take no part. They publish ratios of 0.9, 0.9125, 0.925, 0.95 and 0.975. Their model
for MAE swaps the halves, which is not here.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tdm_jax.errors import InputError
from tdm_jax.ops.distances import cosine_similarity
from tdm_jax.ops.gathering import gather_tokens
from tdm_jax.ops.merging import Merge
from tdm_jax.ops.ordering import argtopk
from tdm_jax.reduction.contract import BlockContext, Reducer, ViTShape, plan, require
from tdm_jax.reduction.matching import mean_keys, mean_keys_macs
from tdm_jax.reduction.schedules import three_stages
from tdm_jax.reduction.stages import Layers, StageReducer
from tdm_jax.reduction.token_state import TokenState

MARGIN = 0.75


@dataclasses.dataclass(frozen=True, kw_only=True)
class PiToMe(StageReducer):
    """Merges alike tokens of high energy.

    Attributes:
      ratio: share of its patch tokens that each stage leaves, from 0.5 to 1, instead of the keep
        rate, counts or r. A single keep rate becomes the ratio that costs about the same, see
        `with_ratio`.
      proportional_attention: whether a token counts in the attention as often as it has patches.
    """

    layers: Layers = "all"
    ratio: float | None = None
    proportional_attention: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio is None:
            return
        require(self, "ratio", 0.5 <= self.ratio <= 1, "be from 0.5 to 1")
        if not super().by_rate:
            raise InputError(
                f"{self.title}: expected one of ratio, counts and r; got ratio={self.ratio}, "
                f"counts={self.counts}, r={self.r}"
            )

    @property
    def by_rate(self) -> bool:
        return self.ratio is None and super().by_rate

    def at_keep_rate(self, keep_rate: float | tuple[float, ...]) -> Reducer:
        return dataclasses.replace(self, keep_rate=keep_rate, counts=None, r=None, ratio=None)

    def check(self, shape: ViTShape) -> None:
        super().check(shape)
        most = 0 if self.r is None else max(self.removed(shape))
        if most > shape.patches // 2:
            raise InputError(
                f"{self.title}: r must be at most half of the {shape.patches} patches; got {most}"
            )

    def count(self, stage: int, n: int, patches: int) -> int:
        if self.ratio is None:
            return super().count(stage, n, patches)
        return n - math.floor(n - n * self.ratio)

    def stage_count(self, stage: int, n: int, shape: ViTShape) -> int:
        if self.by_rate and not isinstance(self.keep_rate, tuple):
            return with_ratio(self, shape).stage_count(stage, n, shape)
        count, half = super().stage_count(stage, n, shape), n - n // 2
        if count < half and self.r is None:
            raise InputError(
                f"{self.title}: a stage merges at most half of its {n} tokens; expected a count "
                f"of at least {half}; got {count}"
            )
        return max(count, half)

    def macs(self, layer: int, n: int, shape: ViTShape) -> int:
        if not self.acts(layer, n, shape):
            return 0
        # The mean of the keys, their similarities, the energies, and the sizes times the tokens.
        k = shape.width // shape.num_heads
        return mean_keys_macs(n, shape) + n * n * k + n + n * shape.width

    def key_weight(self, state: TokenState, context: BlockContext) -> Float[Array, "b t"] | None:
        return state.proportional() if self.proportional_attention else None

    def reduce(self, state: TokenState, context: BlockContext) -> TokenState:
        n, layer, depth = state.count, context.layer, context.shape.depth
        merging = n - self.stage_count(self.stage(context), n, context.shape)
        keys = jax.lax.stop_gradient(mean_keys(context))
        similarity = cosine_similarity(keys, keys)
        rank = argtopk(energy(similarity, MARGIN - MARGIN * layer / depth), n)
        pairs = by_edge if layer < math.ceil(depth / 2) else by_rank
        return state.merge([pairs(similarity, rank, merging)], state.size)


def energy(similarity: Float[Array, "b n n"], margin: float) -> Float[Array, "b n"]:
    """How large a group of alike tokens each one belongs to: the mean of `elu(C - margin)`."""
    return jax.nn.elu(similarity - margin).mean(axis=-1)


def by_edge(similarity: Float[Array, "b n n"], rank: Int[Array, "b n"], merging: int) -> Merge:
    """Merges the most alike pairs of tokens of even and of odd rank.

    Args:
      similarity: of all tokens.
      rank: the tokens, best first.
      merging: how many merge.
    """
    even, odd = rank[:, 0::2], rank[:, 1::2]
    pairs = between(similarity, even, odd)
    order = argtopk(pairs.max(axis=-1), even.shape[1])
    gone, left = order[:, :merging], order[:, merging:]
    return Merge(
        keep=jnp.concatenate([gather_tokens(even, left), odd], axis=1),
        gone=gather_tokens(even, gone),
        into=left.shape[1] + gather_tokens(jnp.argmax(pairs, axis=-1), gone),
    )


def by_rank(similarity: Float[Array, "b n n"], rank: Int[Array, "b n"], merging: int) -> Merge:
    """Merges of the first ranks every second token into the most alike of those between.

    Args:
      similarity: of all tokens.
      rank: the tokens, best first.
      merging: how many merge.
    """
    paired, others = rank[:, : 2 * merging], rank[:, 2 * merging :]
    even, odd = paired[:, 0::2], paired[:, 1::2]
    return Merge(
        keep=jnp.concatenate([others, odd], axis=1),
        gone=even,
        into=others.shape[1] + jnp.argmax(between(similarity, even, odd), axis=-1),
    )


def between(
    similarity: Float[Array, "b n n"], rows: Int[Array, "b r"], columns: Int[Array, "b c"]
) -> Float[Array, "b r c"]:
    """The similarities of some tokens with some others. They are symmetric."""
    return gather_tokens(jnp.swapaxes(gather_tokens(similarity, columns), 1, 2), rows)


@functools.lru_cache(maxsize=64)
def with_ratio(reducer: PiToMe, shape: ViTShape) -> PiToMe:
    """The ratio, in steps of 1/400, that stands for a single keep rate.

    With it the blocks see, on average, most nearly as many tokens as with a method that keeps this
    rate in three stages, a quarter, a half and three quarters of the way.
    """
    goal = three_stages(reducer.rate(0), shape.patches, shape.depth)

    def at(step: int) -> PiToMe:
        return dataclasses.replace(reducer, ratio=1 - step / 400)

    def distance(step: int) -> float:
        blocks = plan(at(step), shape)
        return abs(sum((block.attention + block.mlp) / 2 for block in blocks) - goal)

    return at(min(range(201), key=distance))
