"""Agglomerative clusters of tokens: the closest two become one until so many are left."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from tdm_jax.ops.distances import cosine_similarity
from tdm_jax.ops.gathering import gather_tokens, inverse_index, leading_indices
from tdm_jax.ops.merging import Merge
from tdm_jax.ops.ordering import argtopk

LINKAGES = ("single", "complete", "average")


def cosine_distance(metric: Float[Array, "b n k"]) -> Float[Array, "b n n"]:
    """`1 - cos`, to the last bit the same in either direction."""
    distance = 1 - cosine_similarity(metric, metric)
    return jnp.maximum(distance, jnp.swapaxes(distance, 1, 2))


def clusters(distance: Float[Array, "b n n"], count: int, linkage: str) -> Merge:
    """Agglomerative clusters: all join the first of their own, in the order of these.

    Args:
      distance: symmetric.
      count: how many clusters.
      linkage: one of `LINKAGES`.
    """
    if linkage == "single":
        return into_first(by_spanning_tree(distance, count), count)
    return into_first(by_closest_pairs(distance, count, linkage), count)


def into_first(first: Int[Array, "b n"], count: int) -> Merge:
    """Merges clusters, given for each token the first token of its own."""
    n = first.shape[1]
    order = argtopk((first == jnp.arange(n)).astype(jnp.float32), n)
    keep, gone = order[:, :count], order[:, count:]
    return Merge(keep, gone, gather_tokens(inverse_index(keep, n), gather_tokens(first, gone)))


def by_spanning_tree(distance: Float[Array, "b n n"], count: int) -> Int[Array, "b n"]:
    """Clusters by single linkage.

    Prim's algorithm visits all of a cluster before it takes an edge that is longer than those
    within. So the clusters are runs of the tokens in the order of its visits, and the `count` - 1
    longest edges begin new ones; of equal edges the later ones, which gives the same tree.

    Returns:
      For each token the first token of its cluster.
    """
    order, length = spanning_tree(distance)
    n, edges = order.shape[1], length.shape[1]
    longest = edges - 1 - argtopk(length[:, ::-1], count - 1)
    begins = jnp.pad(inverse_index(longest, edges) >= 0, ((0, 0), (1, 0)))
    cluster = gather_tokens(jnp.cumsum(begins, axis=1), inverse_index(order, n))
    return jnp.argmax(cluster[:, :, None] == cluster[:, None, :], axis=-1)


def spanning_tree(
    distance: Float[Array, "b n n"],
) -> tuple[Int[Array, "b n"], Float[Array, "b e"]]:
    """The shortest spanning tree, by Prim's algorithm from the first token.

    Returns:
      The tokens in the order of their visits, and the length of the edge to each but the first.
    """
    n = distance.shape[1]

    def visit(reach: Float[Array, "b n"], _: Any) -> tuple[Float[Array, "b n"], Any]:
        token, length = jnp.argmin(reach, axis=1), reach.min(axis=1)
        nearer = jnp.minimum(reach, gather_tokens(distance, token[:, None])[:, 0])
        # What has been visited is out of reach.
        away = (reach == jnp.inf) | (jnp.arange(n) == token[:, None])
        return jnp.where(away, jnp.inf, nearer), (token, length)

    reach = jnp.where(jnp.arange(n) == 0, jnp.inf, distance[:, 0])
    _, (tokens, lengths) = lax.scan(visit, reach, None, length=n - 1)
    order = jnp.concatenate([jnp.zeros_like(distance[:, :1, 0], tokens.dtype), tokens.T], axis=1)
    return order, lengths.T


def by_closest_pairs(
    distance: Float[Array, "b n n"], count: int, linkage: str
) -> Int[Array, "b n"]:
    """Clusters by complete or average linkage, one pair after the other.

    Returns:
      For each token the first token of its cluster.
    """
    n = distance.shape[1]
    place = jnp.arange(n)

    def merge(_: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        # A cluster is where its first token was; what is no cluster any more is at infinity.
        apart, members, first = carry
        # By columns, which a CPU compares several at a time.
        one = jnp.argmin(apart.min(axis=1), axis=1)[:, None]
        row = gather_tokens(apart, one)[:, 0]
        two = jnp.argmin(row, axis=1)[:, None]
        other = gather_tokens(apart, two)[:, 0]
        if linkage == "complete":
            joined = jnp.maximum(row, other)
        else:
            a, b = gather_tokens(members, one), gather_tokens(members, two)
            joined = (a * row + b * other) / (a + b)
        # Rounding may find either first: a program can compute `joined` anew where it is written.
        i, j = jnp.minimum(one, two), jnp.maximum(one, two)
        is_i, is_j = place == i, place == j
        joined = jnp.where(is_i | is_j, jnp.inf, joined)
        apart = jnp.where(is_i[:, :, None], joined[:, None, :], apart)
        apart = jnp.where(is_i[:, None, :], joined[:, :, None], apart)
        apart = jnp.where(is_j[:, :, None] | is_j[:, None, :], jnp.inf, apart)
        members = jnp.where(is_i, members + gather_tokens(members, j), members)
        return apart, members, jnp.where(first == j, i, first)

    apart = jnp.where(jnp.eye(n, dtype=bool), jnp.inf, distance)
    ones = jnp.ones_like(distance[:, :, 0])
    start = (apart, ones, leading_indices(n, distance))
    return lax.fori_loop(0, n - count, merge, start)[2]
