"""The transformer's layers, with flax's parameters and the operations of `tdm_jax.ops`."""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from tdm_jax.ops.activations import gelu
from tdm_jax.ops.normalisation import layer_norm
from tdm_jax.ops.patches import embed_patches
from tdm_jax.ops.products import product

Dtype = Any
init = nn.initializers.truncated_normal(0.02)


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


class PatchEmbed(nn.Module):
    """Non-overlapping patches through one linear map."""

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
            conv_general_dilated=lambda images, kernel, *_, **__: embed_patches(images, kernel),
            name="proj",
        )(images)
        return x.reshape(x.shape[0], -1, self.width)


class Mlp(nn.Module):
    """Two linear maps with the exact GELU between them."""

    hidden: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        hidden = Dense(self.hidden, dtype=self.dtype, name="fc1")(x)
        return Dense(x.shape[-1], dtype=self.dtype, name="fc2")(gelu(hidden))
