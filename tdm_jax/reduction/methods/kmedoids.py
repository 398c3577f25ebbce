"""K-Medoids: Token Pooling in Vision Transformers (Marin et al., WACV 2023, arXiv 2110.03860).

Before blocks 3, 6 and 9 (from 0) the tokens become `floor(p * keep_rate^i)` medoids, by weighted
K-Medoids (algorithm 2). The weight `w_j` of a token is the attention it received in the block
before, summed over heads and queries. The centres start as the tokens of the highest weight; then,
`iterations` times, each token joins its nearest centre, and in each cluster the token i with the
least `w_i sum_j D_ij`, with j over all tokens, becomes the centre. What goes on are the centres
themselves; every token is stood for by the nearest of them.

The sum over all tokens is the token reduction benchmarks' (arXiv 2308.04657), whose answers the
tests hold; one over the cluster's own members would be the textbook's.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tdm_jax.ops.distances import nearest, pairwise_distance
from tdm_jax.ops.gathering import gather_tokens, one_hot
from tdm_jax.ops.ordering import argtopk
from tdm_jax.reduction.cluster import ClusterReducer, clustered
from tdm_jax.reduction.contract import BlockContext, ViTShape, require
from tdm_jax.reduction.token_state import TokenState

_RECEIVED = "kmedoids/received"


@dataclasses.dataclass(frozen=True, kw_only=True)
class KMedoids(ClusterReducer):
    """Keeps the weighted medoids of the tokens.

    Attributes:
      iterations: updates of the centres.
    """

    iterations: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "iterations", self.iterations >= 0, "be at least 0")
        first = "begin at 1: tokens are weighed by the attention of the block before"
        require(self, "layers", self.layers[:1] != (0,), first)

    def stages(self, shape: ViTShape) -> tuple[int, ...]:
        # Before block 0 there is no attention to weigh by.
        stages = super().stages(shape)
        return stages[1:] if self.layers == "all" else stages

    def macs(self, layer: int, n: int, shape: ViTShape) -> int:
        # Distances count nothing; the weights times the sums of distances do, in every round.
        return self.iterations * n if self.acts(layer, n, shape) else 0

    def after_attention(self, state: TokenState, context: BlockContext) -> TokenState:
        if context.layer + 1 not in self.stages(context.shape):
            return state
        return state.replace(carry={**state.carry, _RECEIVED: context.attention.received()})

    def reduce(self, state: TokenState, context: BlockContext) -> TokenState:
        count = self.stage_count(self.stage(context), state.count, context.shape)
        carry = dict(state.carry)
        weight = carry.pop(_RECEIVED)
        centres, route = medoids(state.tokens, weight, count, self.iterations)
        state = state.replace(carry=carry)
        return clustered(state, gather_tokens(state.tokens, centres), route)


def medoids(
    tokens: Float[Array, "b n d"], weight: Float[Array, "b n"], clusters: int, iterations: int
) -> tuple[Int[Array, "b m"], Int[Array, "b n"]]:
    """The indices of the medoids, and for each token which of them is nearest."""
    distance = pairwise_distance(jax.lax.stop_gradient(tokens))
    # Neither choice nor assignment has a gradient.
    cost = jax.lax.stop_gradient(weight) * distance.sum(axis=-1)
    centres = argtopk(weight, clusters)
    for _ in range(iterations):
        member = one_hot(nearest(distance, centres), clusters, bool)
        centres = jnp.argmin(jnp.where(member, cost[..., None], jnp.inf), axis=1)
    return centres, nearest(distance, centres)
