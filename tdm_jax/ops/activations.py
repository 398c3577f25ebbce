"""Activation functions, by the names that timm and Hugging Face have for them."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@jax.checkpoint
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact GELU, in float32; by erf, and again in the backward pass.

    On CPUs erf is twice as fast as erfc, and cheaper than storing it (docs/measurements.md, CPU,
    "GELU through erf", "GELU computed again").
    """
    y = x.astype(jnp.float32)
    return (0.5 * y * (1 + lax.erf(y * 2**-0.5))).astype(x.dtype)


@jax.checkpoint
def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU by its approximation with tanh (Hendrycks and Gimpel, arXiv 1606.08415), in float32."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


@jax.checkpoint
def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU by its approximation with the sigmoid, `x sigmoid(1.702 x)` (OpenAI's CLIP)."""
    y = x.astype(jnp.float32)
    return (y * jax.nn.sigmoid(1.702 * y)).astype(x.dtype)


@jax.checkpoint
def silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x sigmoid(x)`, in float32."""
    return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)


ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "quick_gelu": quick_gelu, "silu": silu}
