"""The transformer's layers, with gradients that cost little.

Parameters are those of flax's layers. The backward passes are written out where what JAX derives is
slower: all of them allow reverse-mode differentiation only.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Num

Dtype = Any
Residuals = tuple[Array, ...]
init = nn.initializers.truncated_normal(0.02)


@jax.custom_vjp
def product(x: Float[Array, "... k"], kernel: Float[Array, "k n"]) -> Float[Array, "... n"]:
    """`x @ kernel`."""
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _product_forward(
    x: Float[Array, "... k"], kernel: Float[Array, "k n"]
) -> tuple[Float[Array, "... n"], Residuals]:
    return product(x, kernel), (x, kernel)


def _product_backward(
    residuals: Residuals, g: Float[Array, "... n"]
) -> tuple[Float[Array, "... k"], Float[Array, "k n"]]:
    x, kernel = residuals
    rows = tuple(range(x.ndim - 1))

    def over_rows(narrow: Array, wide: Array) -> Array:
        # XLA's CPU backend lays the first factor out anew: cheap for the narrow one.
        return lax.dot_general(narrow, wide, ((rows, rows), ((), ())))

    if kernel.shape[0] <= kernel.shape[1]:
        gradient = over_rows(x, g)
    else:
        # The barrier keeps XLA from swapping the factors back.
        gradient = lax.optimization_barrier(over_rows(g, x)).T
    return lax.dot_general(g, kernel, (((g.ndim - 1,), (1,)), ((), ()))), gradient


product.defvjp(_product_forward, _product_backward)


# flax's dense layer, by `product`.
Dense = functools.partial(
    nn.Dense, kernel_init=init, dot_general=lambda x, kernel, *_, **__: product(x, kernel)
)


class LayerNorm(nn.Module):
    """Layer normalisation over the channels, in float32 (Ba et al., arXiv 1607.06450).

    Attributes:
      epsilon: added to the variance.
      dtype: of the output.
    """

    epsilon: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return layer_norm(x, scale, bias, self.epsilon).astype(self.dtype)


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


class PatchEmbed(nn.Module):
    """Non-overlapping patches through one linear map, as a strided convolution."""

    patch_size: int
    width: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Num[Array, "b h w c"]) -> Float[Array, "b p d"]:
        size = (self.patch_size, self.patch_size)
        x = nn.Conv(
            self.width,
            size,
            size,
            "VALID",
            dtype=self.dtype,
            kernel_init=init,
            conv_general_dilated=_convolve_patches,
            name="proj",
        )(images)
        return x.reshape(x.shape[0], -1, self.width)


def _convolve_patches(
    images: Float[Array, "b h w c"], kernel: Float[Array, "p p c d"], *strides: Any, **settings: Any
) -> Float[Array, "b h2 w2 d"]:
    def convolution(images: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(images, kernel, *strides, **settings)

    # XLA's CPU backend convolves more slowly than it multiplies.
    return lax.platform_dependent(images, kernel, cpu=_patch_product, default=convolution)


def _patch_product(
    images: Float[Array, "b h w c"], kernel: Float[Array, "p p c d"]
) -> Float[Array, "b h2 w2 d"]:
    b, h, w, c = images.shape
    p, d = kernel.shape[0], kernel.shape[-1]
    rows = images.reshape(b, h // p, p, w // p, p * c)
    return jnp.einsum("bhiwc,icd->bhwd", rows, kernel.reshape(p, p * c, d))


class Mlp(nn.Module):
    """Two linear maps with the exact GELU between them."""

    hidden: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        hidden = Dense(self.hidden, dtype=self.dtype, name="fc1")(x)
        return Dense(x.shape[-1], dtype=self.dtype, name="fc2")(gelu(hidden))


@jax.checkpoint
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact GELU, in float32; by erf, which is twice as fast as erfc on CPUs.

    The backward pass computes erf again: that is cheaper than storing it.
    """
    y = x.astype(jnp.float32)
    return (0.5 * y * (1 + lax.erf(y * 2**-0.5))).astype(x.dtype)
