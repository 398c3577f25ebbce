"""Weighted K-Medoids of tokens (Token Pooling, arXiv 2110.03860, algorithm 2)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tdm_jax.ops.distances import nearest, pairwise_distance
from tdm_jax.ops.gathering import gather_tokens, inverse_index, one_hot
from tdm_jax.ops.merging import Merge
from tdm_jax.ops.ordering import argtopk


def medoids(
    metric: Float[Array, "b n k"], weight: Float[Array, "b n"], clusters: int, iterations: int
) -> Merge:
    """Each token joins the nearest medoid.

    The centres start as the tokens of the highest weight; then, `iterations` times, each token
    joins its nearest centre, and in each cluster the token i with the least `w_i sum_j D_ij`, with
    j over all tokens, becomes the centre. A centre is in its own cluster, whatever equals it, so
    that no two clusters can get the same one.

    Args:
      metric: what is compared.
      weight: of each token.
      clusters: how many.
      iterations: updates of the centres.
    """
    distance = pairwise_distance(jax.lax.stop_gradient(metric))
    # Neither choice nor assignment has a gradient.
    cost = jax.lax.stop_gradient(weight) * distance.sum(axis=-1)
    centres = argtopk(weight, clusters)
    for _ in range(iterations):
        member = one_hot(_route(distance, centres), clusters, bool)
        centres = jnp.argmin(jnp.where(member, cost[..., None], jnp.inf), axis=1)
    n = metric.shape[1]
    is_centre = inverse_index(centres, n) >= 0
    gone = argtopk((~is_centre).astype(jnp.float32), n)[:, : n - clusters]
    return Merge(centres, gone, gather_tokens(_route(distance, centres), gone))


def _route(distance: Float[Array, "b n n"], centres: Int[Array, "b m"]) -> Int[Array, "b n"]:
    own = inverse_index(centres, distance.shape[1])
    return jnp.where(own >= 0, own, nearest(distance, centres))
