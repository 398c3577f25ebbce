"""Layer normalisation, with a gradient that keeps little and sums seldom."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from tdm_jax.ops.platform import by_platform

_LONG = 4096  # rows: fewer it leaves alone by itself


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def layer_norm(
    x: Float[Array, "... d"], scale: Float[Array, " d"], bias: Float[Array, " d"], epsilon: float
) -> Float[Array, "... d"]:
    """`(x - mean) / sqrt(variance + epsilon) * scale + bias`, in float32.

    Its tangent is written out, so that the transpose, the backward pass, takes four sums, which run
    on one core of a CPU (docs/measurements.md, CPU, "a layer norm with its own backward pass").
    """
    return _alone(_normalise(x, epsilon)[0] * scale + bias)


def _normalise(
    x: Float[Array, "... d"], epsilon: float
) -> tuple[Float[Array, "... d"], Float[Array, "... 1"]]:
    y = x.astype(jnp.float32)
    mean = y.mean(axis=-1, keepdims=True)
    # One pass over x for both; rounding can make it negative where all channels are alike.
    variance = jnp.maximum((y * y).mean(axis=-1, keepdims=True) - mean * mean, 0)
    rate = lax.rsqrt(variance + epsilon)
    return (y - mean) * rate, rate


def _alone(y: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """As it is; where it is long, a kernel of its own on CPUs.

    Otherwise XLA's library computes a norm within the product behind it, again for each tile
    (docs/measurements.md, CPU, "norms alone"). It takes in no choice between two values.
    """
    if isinstance(y.size, int) and y.size < _LONG * y.shape[-1]:
        return y
    return by_platform(y, reference=lambda y: y, cpu=lambda y: jnp.where(y > -jnp.inf, y, 2 * y))


@layer_norm.defjvp
def _layer_norm_jvp(
    epsilon: float, primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[Float[Array, "... d"], Float[Array, "... d"]]:
    x, scale, bias = primals
    dx, dscale, dbias = tangents
    normed, rate = _normalise(x, epsilon)
    dx = dx.astype(jnp.float32)
    along = normed * (dx * normed).mean(axis=-1, keepdims=True)
    across = rate * (dx - dx.mean(axis=-1, keepdims=True) - along)
    return _alone(normed * scale + bias), across * scale + normed * dscale + dbias
