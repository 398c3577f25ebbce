"""Augmentation on the device, inside jit: normalising, random erasing, mixup, cutmix, soft targets.

All of it is local to a pair of neighbouring rows: with the batch sharded, and an even number of
rows on every device, it compiles without communication, and gives the same numbers on any number
of devices.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, UInt8

from tdm_jax.data.config import DataConfig
from tdm_jax.errors import InputError

_ERASING_AREA = (0.02, 1 / 3)
_ERASING_ASPECT = (0.3, 1 / 0.3)
_ERASING_ATTEMPTS = 10


def augment_batch(
    key: Key[Array, ""],
    images: UInt8[Array, "b h w ch"],
    labels: Int[Array, " b"],
    config: DataConfig,
    num_classes: int,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "b h w ch"], Float[Array, "b c"]]:
    """Normalises, erases, mixes; DeiT's order.

    Args:
      key: from the seed and the step, the same on every device.
      images: as the host pipeline gives them.
      labels: in [0, num_classes).
      config: the data config.
      num_classes: c.
      dtype: of the returned images.

    Returns:
      Normalised images, and targets whose rows add up to 1.

    Raises:
      InputError: the batch is odd, so that its rows cannot be mixed in pairs.
    """
    erase_key, mix_key = jax.random.split(key)
    images = normalise(images, config.mean, config.std)
    targets = smooth_targets(labels, num_classes, config.label_smoothing)
    if config.erasing:
        images = random_erasing(erase_key, images, config.erasing)
    if mixes(config):
        images, targets = mix_pairs(
            mix_key,
            images,
            targets,
            mixup=config.mixup,
            cutmix=config.cutmix,
            prob=config.mix_prob,
            switch=config.mix_switch,
        )
    return images.astype(dtype), targets


def mixes(config: DataConfig) -> bool:
    """Whether images are mixed in pairs."""
    return bool(config.mix_prob and (config.mixup or config.cutmix))


def normalise(
    images: UInt8[Array, "b h w ch"],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "b h w ch"]:
    """(images / 255 - mean) / std, computed in float32."""
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return ((images.astype(jnp.float32) / 255 - mean) / std).astype(dtype)


def smooth_targets(
    labels: Int[Array, " b"], num_classes: int, smoothing: float = 0.0
) -> Float[Array, "b c"]:
    """One-hot rows with the share `smoothing` spread evenly over all classes, the true one too."""
    return jax.nn.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes


def random_erasing(
    key: Key[Array, ""], images: Float[Array, "b h w ch"], prob: float
) -> Float[Array, "b h w ch"]:
    """Replaces one box of some images by N(0, 1) noise (Zhong et al., arXiv 1708.04896).

    As timm's mode "pixel": the box's area is a uniform share in [0.02, 1/3] of the image, its
    aspect ratio (height / width) log-uniform in [0.3, 1 / 0.3]; of ten draws the first that fits is
    taken, and if none does, the image stays whole.

    Args:
      key: random key.
      images: normalised.
      prob: share of the images that are erased.
    """
    box_key, noise_key = jax.random.split(key)
    # Few draws: each is a loop of its own to compile (docs/measurements.md, "Compiling").
    uniform = jax.random.uniform(box_key, (images.shape[0], 2 * _ERASING_ATTEMPTS + 3))
    noise = jax.random.normal(noise_key, images.shape, images.dtype)
    return jax.vmap(functools.partial(_erase, prob=prob))(uniform, noise, images)


def _erase(
    uniform: Float[Array, " u"],
    noise: Float[Array, "h w ch"],
    image: Float[Array, "h w ch"],
    prob: float,
) -> Float[Array, "h w ch"]:
    height, width, _ = image.shape
    n = _ERASING_ATTEMPTS
    low, high = _ERASING_AREA
    area = (low + (high - low) * uniform[:n]) * (height * width)
    low, high = (math.log(ratio) for ratio in _ERASING_ASPECT)
    aspect = jnp.exp(low + (high - low) * uniform[n : 2 * n])
    rows, columns = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
    fits = (rows < height) & (columns < width)
    # The first that fits, as a one-hot weight: an index would gather across devices.
    first = fits & (jnp.cumsum(fits) == 1)
    box_h, box_w = jnp.sum(first * rows), jnp.sum(first * columns)
    u, v, chance = uniform[2 * n :]
    top = jnp.floor(u * (height - box_h + 1))
    left = jnp.floor(v * (width - box_w + 1))
    chosen = chance < prob
    inside = _box(height, width, top, top + box_h, left, left + box_w) & chosen
    return jnp.where(inside[..., None], noise, image)


def mix_pairs(
    key: Key[Array, ""],
    images: Float[Array, "b h w ch"],
    targets: Float[Array, "b c"],
    *,
    mixup: float,
    cutmix: float,
    prob: float = 1.0,
    switch: float = 0.5,
) -> tuple[Float[Array, "b h w ch"], Float[Array, "b c"]]:
    """Mixes rows 2i and 2i + 1 by mixup or cutmix, in timm's "batch" mode.

    One draw for the whole batch decides whether it is mixed, by which method, with which
    λ ~ Beta(alpha, alpha) and, for cutmix, with which box; cutmix's λ is then the share of the
    image outside the box as it was cut (Zhang et al., arXiv 1710.09412; Yun et al., arXiv
    1905.04899).

    timm pairs row i with row b - 1 - i. In a shuffled batch a neighbour is as random a partner, and
    neighbours lie on one device.

    Args:
      key: random key.
      images: normalised; b even.
      targets: rows of probabilities.
      mixup: alpha of mixup, 0 is off.
      cutmix: alpha of cutmix, 0 is off; not both.
      prob: probability that the batch is mixed.
      switch: probability of cutmix, where both are on.

    Raises:
      InputError: b is odd.
    """
    if images.shape[0] % 2:
        raise InputError(
            f"mixup and cutmix need an even batch, got {images.shape[0]} images; "
            "set mixup and cutmix to 0, or change the batch size"
        )
    chance, *uniform = jax.random.uniform(key, (8,))
    weight = _mix_weight(uniform, images.shape[1:3], mixup, cutmix, switch)
    weight = jnp.where(chance < prob, weight, 1.0)
    share = jnp.mean(weight)
    mixed = images * weight[..., None] + _partner(images) * (1 - weight[..., None])
    return mixed.astype(images.dtype), targets * share + _partner(targets) * (1 - share)


def _mix_weight(
    uniform: Sequence[Float[Array, ""]],
    size: tuple[int, ...],
    mixup: float,
    cutmix: float,
    switch: float,
) -> Float[Array, "h w"]:
    """Weight of the image itself at each pixel: λ everywhere, or 0 inside a box and 1 outside."""
    height, width = size
    which, row, column, *rest = uniform
    if mixup:
        blend = jnp.full(size, symmetric_beta(rest[0], rest[1], mixup))
    if cutmix:
        side = jnp.sqrt(1 - symmetric_beta(rest[2], rest[3], cutmix))
        half_h, half_w = jnp.floor(height * side) // 2, jnp.floor(width * side) // 2
        u, v = jnp.floor(row * height), jnp.floor(column * width)
        cut = 1.0 - _box(height, width, u - half_h, u + half_h, v - half_w, v + half_w)
    if mixup and cutmix:
        return jnp.where(which < switch, cut, blend)
    return blend if mixup else cut


def symmetric_beta(
    u: Float[Array, "..."], v: Float[Array, "..."], alpha: float
) -> Float[Array, "..."]:
    """A draw from Beta(alpha, alpha) made of two uniform ones in [0, 1).

    `(1 + t / sqrt(2 alpha + t^2)) / 2` of Student's t with 2 alpha degrees of freedom, which is
    `sqrt(2 alpha (u^(-1 / alpha) - 1)) cos(2 pi v)` (Bailey, Math. Comp. 62, 1994).
    `jax.random.beta` draws until it accepts, in loops that took as long to compile for a CPU as all
    else in a training step (docs/measurements.md, "Compiling").
    """
    radius = u ** (1 / alpha)
    side = (1 - radius) * jnp.cos(2 * jnp.pi * v) ** 2
    away = jnp.sqrt(side / (radius + side))
    return 0.5 + 0.5 * jnp.where((v > 0.25) & (v < 0.75), -away, away)


def _partner(rows: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """Swaps rows 2i and 2i + 1."""
    pairs = rows.reshape(rows.shape[0] // 2, 2, *rows.shape[1:])
    return pairs[:, ::-1].reshape(rows.shape)


def _box(
    height: int,
    width: int,
    top: Float[Array, ""],
    bottom: Float[Array, ""],
    left: Float[Array, ""],
    right: Float[Array, ""],
) -> Array:
    """True inside [top, bottom) × [left, right), clipped to the image; boolean [height, width]."""
    y, x = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    return (y >= top) & (y < bottom) & (x >= left) & (x < right)
