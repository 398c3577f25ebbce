"""Non-overlapping patches through one linear map."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from tdm_jax.ops.platform import by_platform


def embed_patches(
    images: Float[Array, "b h w c"], kernel: Float[Array, "p p c d"]
) -> Float[Array, "b h2 w2 d"]:
    """Each patch of p x p pixels as a vector of d channels."""
    return by_platform(images, kernel, reference=by_convolution, cpu=by_product)


def by_convolution(
    images: Float[Array, "b h w c"], kernel: Float[Array, "p p c d"]
) -> Float[Array, "b h2 w2 d"]:
    """What accelerators have units for."""
    layout = ("NHWC", "HWIO", "NHWC")
    strides = kernel.shape[:2]
    return lax.conv_general_dilated(images, kernel, strides, "VALID", dimension_numbers=layout)


def by_product(
    images: Float[Array, "b h w c"], kernel: Float[Array, "p p c d"]
) -> Float[Array, "b h2 w2 d"]:
    """A CPU multiplies faster (docs/measurements.md, CPU, "patches by a product")."""
    b, h, w, c = images.shape
    p, d = kernel.shape[0], kernel.shape[-1]
    rows = images.reshape(b, h // p, p, w // p, p * c)
    return jnp.einsum("bhiwc,icd->bhwd", rows, kernel.reshape(p, p * c, d))
