"""A model's preparation of images as part of its program: resize, crop the centre, normalise.

The same as `tdm_jax.data.transforms.resize_and_center_crop`, in Pillow's own way: a product with
each row's weights, then one with each column's, both rounded to whole numbers. Only what the crop
shows is computed. Within one of 255, but for "nearest" where a place lies just between two pixels.
A JPEG decoder's shortcuts belong to whoever decodes.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from tdm_jax.data.device_transforms import normalise
from tdm_jax.models.preprocessing import Preprocessing

# How far each of Pillow's filters reaches, in pixels of the result.
_REACH = {"bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0}


def prepare(
    images: UInt8[Array, "b h w c"], size: tuple[int, int], preparation: Preprocessing
) -> Float[Array, "b height width c"]:
    """From decoded images of one size, any size, to a model's input.

    Args:
      images: as they are decoded; their sides may be symbols of `jax.export`.
      size: height and width of the result.
      preparation: the model's.
    """
    height, width = size
    cover_h, cover_w = (math.floor(side / preparation.crop_pct) for side in size)
    h, w = (jnp.asarray(side) for side in images.shape[1:3])
    tall = cover_h * w < cover_w * h
    target_h = jnp.where(tall, jnp.maximum(height, cover_w * h // w), cover_h)
    target_w = jnp.where(tall, cover_w, jnp.maximum(width, cover_h * w // h))
    x = images.astype(jnp.float32)
    rows, columns = (
        _weights(own, target, side, images.shape[axis], preparation.interpolation)
        for own, target, side, axis in ((h, target_h, height, 1), (w, target_w, width, 2))
    )
    x = _whole(_product("ow,bhwc->bhoc", columns, x))
    x = _whole(_product("oh,bhwc->bowc", rows, x))
    return normalise(x.astype(jnp.uint8), preparation.mean, preparation.std)


def _weights(
    own: Int[Array, ""], target: Int[Array, ""], count: int, length: Any, interpolation: str
) -> Float[Array, "o i"]:
    """How much of each pixel of a line is in each of the middle `count` of the `target` new ones.

    Args:
      own: pixels of the line.
      target: pixels of the resized line.
      count: pixels of the crop.
      length: the same as `own`, as a size.
      interpolation: one of `preprocessing.INTERPOLATIONS`.
    """
    new = jnp.round((target - count) / 2).astype(jnp.int32) + jnp.arange(count)[:, None]
    place = jnp.arange(length)[None]
    if interpolation == "nearest":
        return (place == (2 * new + 1) * own // (2 * target)).astype(jnp.float32)
    scale = own / target
    centre = (new + 0.5) * scale
    stretch = jnp.maximum(scale, 1.0)
    reach = _REACH[interpolation] * stretch
    begin = jnp.maximum(jnp.floor(centre - reach + 0.5), 0)
    end = jnp.floor(centre + reach + 0.5)
    weight = _filter((place - centre + 0.5) / stretch, interpolation)
    weight = jnp.where((place >= begin) & (place < end), weight, 0.0)
    return weight / weight.sum(axis=1, keepdims=True)


def _filter(x: Float[Array, "o i"], interpolation: str) -> Float[Array, "o i"]:
    """Pillow's filters; the cubic one is Keys' with a = -1/2."""
    x = jnp.abs(x)
    if interpolation == "bilinear":
        return jnp.maximum(1 - x, 0)
    if interpolation == "lanczos":
        return jnp.where(x < 3, jnp.sinc(x) * jnp.sinc(x / 3), 0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0))


def _product(
    subscripts: str, weight: Float[Array, "o i"], x: Float[Array, "b h w c"]
) -> Float[Array, "b p q c"]:
    return jnp.einsum(subscripts, weight, x, precision=jax.lax.Precision.HIGHEST)


def _whole(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Pillow keeps eight bits between its two passes, and after them."""
    return jnp.clip(jnp.floor(x + 0.5), 0, 255)
