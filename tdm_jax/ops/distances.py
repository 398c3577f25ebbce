"""How far tokens are from each other, and how alike."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tdm_jax.ops.gathering import gather_tokens


def pairwise_distance(
    x: Float[Array, "b n d"], y: Float[Array, "b m d"] | None = None
) -> Float[Array, "b n m"]:
    """Euclidean distances between tokens, in float32, by one product."""
    x = x.astype(jnp.float32)
    y = x if y is None else y.astype(jnp.float32)
    # |x|^2 + |y|^2 - 2xy cancels badly far from the origin: measure from the mean of y.
    middle = jax.lax.stop_gradient(y.mean(axis=1, keepdims=True))
    x, y = x - middle, y - middle
    dot = jnp.einsum("bnd,bmd->bnm", x, y, precision=jax.lax.Precision.HIGHEST)
    squared = (x * x).sum(-1)[:, :, None] + (y * y).sum(-1)[:, None, :] - 2.0 * dot
    # The square root has no gradient at 0, where a token meets itself.
    positive = squared > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1.0)), 0.0)


def nearest(distance: Float[Array, "b n n"], centres: Int[Array, "b m"]) -> Int[Array, "b n"]:
    """For each token which of the centres, which are tokens themselves, is nearest to it.

    A centre joins itself even where another has the same value, so no cluster is empty.
    """
    itself = centres[:, :, None] == jnp.arange(distance.shape[1])
    reach = jnp.where(itself, -1.0, gather_tokens(distance, centres))
    # A minimum and the first that has it, which XLA vectorises where an argmin is a loop.
    least = reach == reach.min(axis=1, keepdims=True)
    m = centres.shape[1]
    return m - (least * jnp.arange(m, 0, -1)[:, None]).max(axis=1)


def cosine_similarity(x: Float[Array, "b n d"], y: Float[Array, "b m d"]) -> Float[Array, "b n m"]:
    """Cosine similarities in float32."""
    # The product of the tokens as they are: in bfloat16 it is exact, and one pass of a TPU.
    product = jnp.einsum(
        "bnd,bmd->bnm",
        x,
        y,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return product * _reciprocal_norm(x)[:, :, None] * _reciprocal_norm(y)[:, None, :]


def _reciprocal_norm(x: Float[Array, "... d"]) -> Float[Array, "..."]:
    x = x.astype(jnp.float32)
    return jax.lax.rsqrt(jnp.maximum((x * x).sum(-1), 1e-24))


def unit(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """Vectors of length 1, in float32."""
    return x * _reciprocal_norm(x)[..., None]
