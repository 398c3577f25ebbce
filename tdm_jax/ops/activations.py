"""Activation functions."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@jax.checkpoint
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact GELU, in float32; by erf, which is twice as fast as erfc on CPUs.

    The backward pass computes erf again: that is cheaper than storing it.
    """
    y = x.astype(jnp.float32)
    return (0.5 * y * (1 + lax.erf(y * 2**-0.5))).astype(x.dtype)
