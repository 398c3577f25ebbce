"""Activation functions."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@jax.checkpoint
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact GELU, in float32; by erf, and again in the backward pass.

    On CPUs erf is twice as fast as erfc, and cheaper than storing it (docs/performance.md, CPU,
    "GELU through erf", "GELU computed again").
    """
    y = x.astype(jnp.float32)
    return (0.5 * y * (1 + lax.erf(y * 2**-0.5))).astype(x.dtype)
