"""The order of scores, ties to the lower index."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from tdm_jax.ops import gathering
from tdm_jax.ops.platform import by_platform


def argtopk(score: Float[Array, "b n"], k: int) -> Int[Array, "b k"]:
    """The indices of the k highest scores, best first, ties to the lower index."""
    order = by_platform(-score, reference=by_stable_sort, cpu=by_radix_sort)
    return order[:, :k]


def by_stable_sort(x: Float[Array, "b n"]) -> Int[Array, "b n"]:
    """Needs no collective when the batch is sharded, unlike `lax.top_k`."""
    return jnp.argsort(x, axis=-1, stable=True)


def by_radix_sort(x: Float[Array, "b n"]) -> Int[Array, "b n"]:
    """Sorts half a number's bits with the number's index (docs/measurements.md, CPU, "radix sort").

    XLA's CPU backend sorts plain integers five times as fast as pairs.
    """
    if x.dtype != jnp.float32 or x.shape[1] > 1 << 16:
        return by_stable_sort(x)
    # Integers in the order of the numbers: 0 and -0 are equal, whatever is no number comes last.
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
    key = jnp.where(jnp.isnan(x), -1, bits ^ ((bits >> 31) | -(1 << 31))).astype(jnp.uint32)
    place = jax.lax.broadcasted_iota(jnp.uint32, key.shape, 1)

    def order(half: UInt32[Array, "b n"]) -> Int[Array, "b n"]:
        return (jnp.sort((half << 16) | place, axis=1, stable=False) & 0xFFFF).astype(jnp.int32)

    by_lower = order(key)
    return gathering.by_index(by_lower, order(gathering.by_index(key, by_lower) >> 16))
