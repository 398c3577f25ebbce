"""Density-peak clustering of tokens (Rodriguez & Laio, Science 2014), with a fixed count.

TDM uses it with the mean over all tokens of a group, DPC-KNN (TCFormer, arXiv 2204.08680) with the
k nearest. Ties are broken by index instead of by noise, so the result is a function of the tokens.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tdm_jax.ops.distances import nearest, pairwise_distance
from tdm_jax.ops.gathering import gather_tokens
from tdm_jax.ops.merging import Merge
from tdm_jax.ops.ordering import argtopk


def density_peaks(
    tokens: Float[Array, "b n d"], clusters: int, neighbors: int | None = None
) -> Merge:
    """Merges each token into one of `clusters` clusters.

    With `D_ij = ||z_i - z_j|| / sqrt(d)`: density `rho_i = exp(-mean_j D_ij^2)` over all j, or over
    the `neighbors` nearest (itself included); separation `delta_i` is the distance to the nearest
    denser token, for the densest the largest distance of the group; the centres are the tokens
    with the highest `rho_i delta_i`, and every token joins its nearest centre.

    Args:
      tokens: the group to cluster.
      clusters: how many clusters, at most n.
      neighbors: nearest tokens that make the density; None for all.

    Returns:
      The centres, by descending `rho delta`, and the others, each of which joins one of them.
    """
    n = tokens.shape[1]
    # An assignment has no gradient: say so here, rather than let one be traced and thrown away.
    distance = pairwise_distance(jax.lax.stop_gradient(tokens)) * tokens.shape[-1] ** -0.5
    squared = distance**2
    if neighbors is not None:
        squared = jnp.sort(squared, axis=-1)[..., : min(neighbors, n)]
    # Only comparisons and the order of the products matter. In logarithms they are the same, and
    # tokens that lie far apart do not all end at a density of 0.
    density = -squared.mean(axis=-1)

    row, column = density[:, :, None], density[:, None, :]
    earlier = jnp.arange(n)[None, :] < jnp.arange(n)[:, None]
    denser = (column > row) | ((column == row) & earlier)
    largest = distance.max(axis=(1, 2))[:, None]
    separation = jnp.where(denser, distance, jnp.inf).min(axis=-1)
    separation = jnp.where(denser.any(axis=-1), separation, largest)

    order = argtopk(density + jnp.log(separation), n)
    centres, others = order[:, :clusters], order[:, clusters:]
    return Merge(centres, others, gather_tokens(nearest(distance, centres), others))
