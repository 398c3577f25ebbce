"""Non-overlapping patches through one linear map."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from tdm_jax.ops.platform import by_platform


def convolve_patches(
    images: Float[Array, "b h w c"], kernel: Float[Array, "p p c d"], *strides: Any, **settings: Any
) -> Float[Array, "b h2 w2 d"]:
    def convolution(images: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(images, kernel, *strides, **settings)

    # XLA's CPU backend convolves more slowly than it multiplies.
    return by_platform(images, kernel, reference=convolution, cpu=by_product)


def by_product(
    images: Float[Array, "b h w c"], kernel: Float[Array, "p p c d"]
) -> Float[Array, "b h2 w2 d"]:
    b, h, w, c = images.shape
    p, d = kernel.shape[0], kernel.shape[-1]
    rows = images.reshape(b, h // p, p, w // p, p * c)
    return jnp.einsum("bhiwc,icd->bhwd", rows, kernel.reshape(p, p * c, d))
