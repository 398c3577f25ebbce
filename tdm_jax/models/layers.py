"""The transformer's layers, with flax's parameters and the operations of `tdm_jax.ops`."""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from tdm_jax.ops.activations import ACTIVATIONS
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


class LayerScale(nn.Module):
    """A learned factor for each channel of a branch (Touvron et al., arXiv 2103.17239)."""

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        gamma = self.param("gamma", nn.initializers.constant(1e-5), x.shape[-1:])
        return x * gamma.astype(x.dtype)


class PatchEmbed(nn.Module):
    """Non-overlapping patches through one linear map."""

    patch_size: int
    width: int
    bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Num[Array, "b h w c"]) -> Float[Array, "b p d"]:
        size = (self.patch_size, self.patch_size)
        x = nn.Conv(
            self.width,
            size,
            size,
            "VALID",
            use_bias=self.bias,
            dtype=self.dtype,
            kernel_init=init,
            conv_general_dilated=lambda images, kernel, *_, **__: embed_patches(images, kernel),
            name="proj",
        )(images)
        return x.reshape(x.shape[0], -1, self.width)


class Mlp(nn.Module):
    """Two linear maps with an activation between them.

    Attributes:
      hidden: channels that the second map reads.
      activation: one of `ACTIVATIONS`.
      gated: SwiGLU (Shazeer, arXiv 2002.05202): the first map makes twice as many, and the
        activation of the first half multiplies the second.
      norm_eps: epsilon of a layer norm before the second map; None for no norm.
      dtype: of the computation.
    """

    hidden: int
    activation: str = "gelu"
    gated: bool = False
    norm_eps: float | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        hidden = Dense(self.hidden * (1 + self.gated), dtype=self.dtype, name="fc1")(x)
        activation = ACTIVATIONS[self.activation]
        if self.gated:
            gate, value = jnp.split(hidden, 2, axis=-1)
            hidden = activation(gate) * value
        else:
            hidden = activation(hidden)
        if self.norm_eps is not None:
            hidden = LayerNorm(self.norm_eps, self.dtype, name="norm")(hidden)
        return Dense(x.shape[-1], dtype=self.dtype, name="fc2")(hidden)
