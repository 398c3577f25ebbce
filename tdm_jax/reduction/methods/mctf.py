"""MCTF: Multi-criteria Token Fusion with One-step-ahead Attention (Lee et al., CVPR 2024).

arXiv 2403.10030. In some blocks r tokens, at most half and never so many that fewer than ten would
be left (the prefix counted), are fused into others:

1. All tokens alternate by position, the prefix counted: even positions are A, odd ones B. Patches
   attract each other by three criteria, W, the product of `((cos + 1) / 2)^(1/tau_sim)`,
   `(u_a u_b)^(1/tau_info)` and `(z_a z_b)^(1/tau_size)`: the cosine of the tokens before the norm;
   uninformativeness u, one over the attention that a token receives; and smallness z, one over its
   size. A tau of 0 leaves its criterion out.
2. Each of A picks its best of B, and the floor(r / 2) strongest edges merge. Then, by the same W,
   each of B picks its best of what is left of A, and the other strongest edges merge, with all that
   they hold. Order: what is left of A by position, what is left of B by its edge. One way only, all
   r of A merge, and B keeps its order.
3. A group becomes the mean of its patches; or, with `pooling=1`, of its tokens by size
   over the largest size times attention received. Prefix tokens pass.

One step ahead: the attention of step 1 is the coming block's own, of its input, and is not computed
again for what is left: the columns of a group are summed, its rows averaged like its tokens. The
block then needs values alone. `one_step_ahead=2` computes it again, which is more precise; 0 fuses
at the end of a block, by the attention that was in it. With proportional attention each key's logit
gets the log of its size, in every block.

Published, after 30 epochs of training: r = 16 in blocks 1 to 11 (from 0) and, fast, r = 0.35, a
share of the patches and the same as a keep rate of 0.65, in blocks 3, 6 and 9. The training's
second pass is not here.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tdm_jax.ops.distances import cosine_similarity
from tdm_jax.ops.gathering import gather_tokens, inverse_index, leading_indices, one_hot
from tdm_jax.ops.merging import Merge, merge_groups
from tdm_jax.ops.ordering import argtopk
from tdm_jax.reduction.contract import AttentionMap, BlockContext, BlockPlan, ViTShape, require
from tdm_jax.reduction.matching import at_most_half, halves, matching_macs, split_best
from tdm_jax.reduction.stages import StageReducer
from tdm_jax.reduction.token_state import TokenState

_FEWEST = 10  # tokens, the prefix counted
_MAP = "mctf/map"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MCTF(StageReducer):
    """Fuses tokens that are alike, of little information, and small.

    Attributes:
      proportional_attention: whether a token counts in the attention as often as it has patches.
      one_step_ahead: whose attention decides: 1 for the coming block's, merged with the tokens; 2
        for the same, computed again of what is left; 0 for a block's at whose end they fuse.
      tau_sim: temperature of likeness; 0 leaves it out.
      tau_info: temperature of uninformativeness; 0 leaves it out.
      tau_size: temperature of smallness; 0 leaves it out.
      bidirectional: whether half of the edges go from B to A.
      pooling: what weighs a token in its group's mean: 0 for its size, 1 for its size times the
        attention it receives.
    """

    proportional_attention: bool = True
    one_step_ahead: int = 1
    tau_sim: float = 1.0
    tau_info: float = 20.0
    tau_size: float = 40.0
    bidirectional: bool = True
    pooling: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.schedule.r, float):
            # A share stands for a keep rate.
            rated = dataclasses.replace(self.schedule, keep_rate=1 - self.schedule.r, r=None)
            object.__setattr__(self, "schedule", rated)
        require(self, "one_step_ahead", self.one_step_ahead in (0, 1, 2), "be 0, 1 or 2")
        require(self, "pooling", self.pooling in (0, 1), "be 0 for size or 1 for attention")
        for name in ("tau_sim", "tau_info", "tau_size"):
            require(self, name, getattr(self, name) >= 0, "be at least 0")

    def stage_count(self, stage: int, n: int, shape: ViTShape) -> int:
        count = max(super().stage_count(stage, n, shape), min(n, _FEWEST - shape.prefix))
        return at_most_half(self.title, count, n, self.schedule.shrinks)

    def block_plan(self, layer: int, n: int, shape: ViTShape) -> BlockPlan:
        m = super().block_plan(layer, n, shape).out
        return BlockPlan(n, n, m) if not self.one_step_ahead else BlockPlan(m, m, m)

    def macs(self, layer: int, n: int, shape: ViTShape) -> int:
        if not self.acts(layer, n, shape):
            return 0
        d, heads, m = shape.width, shape.num_heads, self.block_plan(layer, n, shape).out
        t, left = n + shape.prefix, m + shape.prefix
        # Of an edge: the similarity; informations' and sizes' products; and those of the criteria.
        criteria = [tau > 0 for tau in (self.tau_sim, self.tau_info, self.tau_size)]
        edge = d * criteria[0] + sum(criteria[1:]) + max(sum(criteria) - 1, 0)
        # The mean of the received attention; sizes times it, for pooling, and times tokens.
        own = matching_macs(t, edge) + t + t * (self.pooling + d)
        if not self.one_step_ahead:
            return own
        # Norm, queries, keys and scaled logits of all tokens.
        own += t * d + 2 * t * d * d + t * t * d + heads * t * t
        if self.one_step_ahead == 1:
            # The weights times the rows; queries and keys of what is left are not computed again.
            own += heads * t * left - 2 * left * d * d - left * left * d - heads * left * left
        return own

    def key_weight(
        self, state: TokenState, context: BlockContext
    ) -> Float[Array, "b t"] | AttentionMap | None:
        if _MAP in state.carry:
            return AttentionMap(state.carry[_MAP])
        return state.proportional() if self.proportional_attention else None

    def before_block(self, state: TokenState, context: BlockContext) -> TokenState:
        if not self.one_step_ahead or not self.reduces(state, context):
            return state
        preview: Any = context.preview  # there is one before a block
        attention = preview(state).map()
        groups, weight = self.groups(state, context, attention.sum(axis=(1, 2)))
        fused = state.merge([groups], weight)
        if self.one_step_ahead == 2:
            return fused
        merged = merged_map(attention, groups, weight)
        return fused.replace(carry={**state.carry, _MAP: merged})

    def after_attention(self, state: TokenState, context: BlockContext) -> TokenState:
        carry = {name: value for name, value in state.carry.items() if name != _MAP}
        return state.replace(carry=carry)

    def after_block(self, state: TokenState, context: BlockContext) -> TokenState:
        if self.one_step_ahead or not self.reduces(state, context):
            return state
        view: Any = context.attention  # there is one behind the attention
        groups, weight = self.groups(state, context, view.map().sum(axis=(1, 2)))
        return state.merge([groups], weight)

    def groups(
        self, state: TokenState, context: BlockContext, received: Float[Array, "b t"]
    ) -> tuple[Merge, Float[Array, "b n"]]:
        """Which tokens fuse, and the weight of each patch token in its group's mean."""
        prefix = context.shape.prefix
        removed = state.count - self.stage_count(self.stage(context), state.count, context.shape)
        received = received[:, prefix:]
        attraction = jax.lax.stop_gradient(self.attraction(state, received, prefix))
        first = removed // 2 if self.bidirectional else removed
        merge = fusion(attraction, halves(prefix), first, removed - first)
        if not self.pooling:
            return merge, state.size
        largest = state.size.max(axis=-1, keepdims=True)
        return merge, state.size / largest * received / received.max(axis=-1, keepdims=True)

    def attraction(
        self, state: TokenState, received: Float[Array, "b n"], prefix: int
    ) -> Float[Array, "b m l"]:
        """How much the patches of A and B attract each other; larger is more."""
        a, b = halves(prefix)
        left, right = state.tokens[:, a::2], state.tokens[:, b::2]
        factors = [jnp.ones((*left.shape[:2], right.shape[1]), jnp.float32)]
        if self.tau_sim:
            alike = jnp.maximum(cosine_similarity(left, right) + 1, 0.0) / 2
            factors.append(alike ** (1 / self.tau_sim))
        for tau, amount in ((self.tau_info, received), (self.tau_size, state.size)):
            if tau:
                rare = scarcity(amount)
                factors.append((rare[:, a::2, None] * rare[:, None, b::2]) ** (1 / tau))
        return math.prod(factors[1:], start=factors[0])


def scarcity(amount: Float[Array, "b n"]) -> Float[Array, "b n"]:
    """One over an amount, over its maximum."""
    amount = jnp.maximum(amount.astype(jnp.float32), 1e-12)
    return amount.min(axis=-1, keepdims=True) / amount


def fusion(
    attraction: Float[Array, "b m l"], starts: tuple[int, int], first: int, second: int
) -> Merge:
    """Merges A into B by the strongest edges, then B into what is left of A.

    Args:
      attraction: of A and B.
      starts: the first patch of A and of B; every second one follows.
      first: how many of A merge.
      second: how many of B; where there are none B keeps its order.
    """
    (a, b), others = starts, attraction.shape[2]
    left, gone = split_best(attraction.max(axis=-1), first)
    partner = jnp.argmax(gather_tokens(attraction, gone), axis=-1)
    stay = left.shape[1]
    if not second:
        keep = jnp.concatenate([a + 2 * left, b + 2 * leading_indices(others, left)], axis=1)
        return Merge(keep, a + 2 * gone, stay + partner)
    back = jnp.swapaxes(gather_tokens(attraction, left), 1, 2)  # of B and what is left of A
    order = argtopk(back.max(axis=-1), others)
    leave, remain = order[:, :second], order[:, second:]
    into = jnp.argmax(gather_tokens(back, leave), axis=-1)
    end = jnp.concatenate([into, stay + leading_indices(others - second, into)], axis=1)
    end = gather_tokens(end, inverse_index(order, others))  # where each of B ends
    return Merge(
        keep=jnp.concatenate([a + 2 * left, b + 2 * remain], axis=1),
        gone=jnp.concatenate([a + 2 * gone, b + 2 * leave], axis=1),
        into=jnp.concatenate([gather_tokens(end, partner), into], axis=1),
    )


def merged_map(
    attention: Float[Array, "b h t t"], groups: Merge, weight: Float[Array, "b n"]
) -> Float[Array, "b h m m"]:
    """The attention of merged tokens: columns of a group summed, its rows averaged by weight."""
    b, heads, t, _ = attention.shape
    n = weight.shape[1]
    route = groups.route(n)
    count = jnp.pad(
        one_hot(route, groups.keep.shape[1]).sum(axis=1), ((0, 0), (t - n, 0)), constant_values=1.0
    )
    by_key = jnp.transpose(attention, (0, 3, 1, 2)).reshape(b, t, heads * t)
    columns = merge_groups(by_key, jnp.ones_like(weight), [groups], route) * count[..., None]
    m = columns.shape[1]
    by_query = jnp.transpose(columns.reshape(b, m, heads, t), (0, 3, 2, 1)).reshape(b, t, heads * m)
    rows = merge_groups(by_query, weight, [groups], route)
    return jnp.swapaxes(rows.reshape(b, m, heads, m), 1, 2)
