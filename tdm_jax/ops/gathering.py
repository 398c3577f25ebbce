"""Tokens by their indices, and indices of tokens."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tdm_jax.ops.layouts import token_major
from tdm_jax.ops.platform import by_platform


def gather_tokens(values: Array, index: Int[Array, "b k"]) -> Array:
    """`values[b, index[b, k]]` for values of shape [b, n] or [b, n, d]."""
    return by_platform(values, index, reference=by_index, tpu=by_product)


def gather_patches(
    sequence: Float[Array, "b t d"], prefix: int, index: Int[Array, "b k"]
) -> Float[Array, "b k d"]:
    """`gather_tokens` of the patch tokens, which stand behind `prefix` others in a sequence.

    Never taken apart for it: a TPU would copy the part (docs/measurements.md, "no sequence is
    taken apart").
    """
    return gather_tokens(sequence, prefix + index)


def gather_sequence(
    sequence: Float[Array, "b t d"], index: Int[Array, "b k"]
) -> Float[Array, "b k d"]:
    """`gather_tokens` of a whole sequence, which blocks go on with."""
    return by_platform(sequence, index, reference=by_index, tpu=by_product_token_major)


def by_index(values: Array, index: Int[Array, "b k"]) -> Array:
    """A gather, which a CPU does best (docs/measurements.md, CPU, "permuting")."""
    index = index.reshape(index.shape + (1,) * (values.ndim - 2))
    return jnp.take_along_axis(values, index, axis=1, mode="promise_in_bounds")


def by_product(values: Array, index: Int[Array, "b k"]) -> Array:
    """By ones and zeros: TPUs gather slowly (docs/measurements.md, TPU, "a TDM stage's takes")."""
    chosen = one_hot(index, values.shape[1], values.dtype)
    if values.ndim == 2:
        return (chosen * values[:, None, :]).sum(axis=-1, dtype=values.dtype)
    return weighted_sum(jnp.swapaxes(chosen, 1, 2), values)


def by_product_token_major(
    sequence: Float[Array, "b t d"], index: Int[Array, "b k"]
) -> Float[Array, "b k d"]:
    """Laid out as the blocks want it (docs/measurements.md, TPU, "the sequence after a stage")."""
    return token_major(by_product(sequence, index))


def leading_indices(count: int, like: Array) -> Int[Array, "b {count}"]:
    """0, 1, ... `count` - 1 for each image."""
    return jnp.broadcast_to(jnp.arange(count), (like.shape[0], count))


def one_hot(route: Int[Array, "b n"], count: int, dtype: Any = jnp.float32) -> Array:
    """[b, n, count]: 1 where token n goes to slot m. A route of -1 is a row of zeros."""
    return (route[..., None] == jnp.arange(count)).astype(dtype)


def inverse_index(index: Int[Array, "b k"], count: int) -> Int[Array, "b n"]:
    """Where each of `count` tokens stands in `index`, -1 for those that are not in it."""
    hit: Bool[Array, "b n k"] = index[:, None, :] == jnp.arange(count)[:, None]
    # A sum, which XLA vectorises where an argmax is a loop.
    return (hit * jnp.arange(1, index.shape[1] + 1)).sum(axis=-1) - 1


def weighted_sum(
    share: Float[Array, "b n m"], tokens: Float[Array, "b n d"]
) -> Float[Array, "b m d"]:
    """`sum_n share[n, m] x[n]`, accumulated in float32, in the tokens' type."""
    # Default precision would round the kept tokens of a float32 model to bfloat16 on a TPU.
    return jnp.einsum(
        "bnm,bnd->bmd",
        share.astype(tokens.dtype),
        tokens,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    ).astype(tokens.dtype)
