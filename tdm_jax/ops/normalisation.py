"""Layer normalisation, with a gradient that keeps little and sums seldom."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Residuals = tuple[Array, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x: Float[Array, "... d"], scale: Float[Array, " d"], bias: Float[Array, " d"], epsilon: float
) -> Float[Array, "... d"]:
    """`(x - mean) / sqrt(variance + epsilon) * scale + bias`, in float32.

    The backward pass keeps only `x` and two numbers a token, and takes four sums.
    """
    return _norm_forward(x, scale, bias, epsilon)[0]


def _norm_forward(
    x: Float[Array, "... d"], scale: Float[Array, " d"], bias: Float[Array, " d"], epsilon: float
) -> tuple[Float[Array, "... d"], Residuals]:
    y = x.astype(jnp.float32)
    mean = y.mean(axis=-1, keepdims=True)
    # One pass over x for both; rounding can make it negative where all channels are alike.
    variance = jnp.maximum((y * y).mean(axis=-1, keepdims=True) - mean * mean, 0)
    rate = lax.rsqrt(variance + epsilon)
    return (y - mean) * rate * scale + bias, (x, mean, rate, scale)


def _norm_backward(epsilon: float, residuals: Residuals, g: Float[Array, "... d"]) -> Residuals:
    x, mean, rate, scale = residuals
    normed = (x.astype(jnp.float32) - mean) * rate
    scaled = g * scale
    along = normed * (scaled * normed).mean(axis=-1, keepdims=True)
    dx = rate * (scaled - scaled.mean(axis=-1, keepdims=True) - along)
    tokens = tuple(range(x.ndim - 1))
    return dx.astype(x.dtype), (g * normed).sum(tokens), g.sum(tokens)


layer_norm.defvjp(_norm_forward, _norm_backward)
