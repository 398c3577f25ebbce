"""Images put together of four photographs, with a class for each patch: what dense use looks like.

A cross at a random place, on the borders of patches, divides an image; each part shows a whole
photograph of some class. Nobody has to draw masks, and what a patch belongs to has to be seen.
"""

import dataclasses
import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from tdm_jax.data.config import DataConfig
from tdm_jax.data.images import CorruptImage, open_image
from tdm_jax.data.source import Source
from tdm_jax.data.sources import open_source
from tdm_jax.data.transforms import EvalTransform
from tdm_jax.errors import InputError


class Mosaics(NamedTuple):
    """Images before normalisation, and the class of each patch, row by row."""

    pixels: UInt8[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, "n p"]


def make_mosaics(
    config: DataConfig, split: str, count: int, patch_size: int, seed: int = 0
) -> Mosaics:
    """Draws mosaics of a split's photographs; what cannot be read is drawn again.

    Args:
      config: the data, as a model takes them.
      split: "train" or "validation".
      count: how many.
      patch_size: side of a patch in pixels; it divides the image.
      seed: of the draws.

    Raises:
      InputError: there are no classes, fewer than four patches a side, or only unreadable images.
    """
    if config.unlabelled:
        raise InputError("photos have no classes to make mosaics of; expected a labelled data set")
    grid = tuple(side // patch_size for side in config.image_size)
    if min(grid) < 4:
        raise InputError(f"mosaics need four patches a side or more; the image has {grid}")
    source, rng = open_source(config, split), np.random.default_rng(seed)
    pixels = np.zeros((count, *config.image_size, config.channels), np.uint8)
    labels = np.zeros((count, *grid), np.int32)
    for image, label in zip(pixels, labels, strict=True):
        cuts = [(0, int(rng.integers(n // 4, n - n // 4 + 1)), n) for n in grid]
        for rows, columns in itertools.product(*map(itertools.pairwise, cuts)):
            sides = [patch_size * (stop - start) for start, stop in (rows, columns)]
            part = dataclasses.replace(config, image_size=(sides[0], sides[1]), crop_pct=1.0)
            place = tuple(slice(patch_size * a, patch_size * b) for a, b in (rows, columns))
            image[place], label[slice(*rows), slice(*columns)] = _drawn(source, part, rng)
    return Mosaics(pixels, labels.reshape(count, -1))


def _drawn(source: Source, config: DataConfig, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """A photograph of the split in that size, and its class."""
    for _ in range(config.max_corrupt + 1):
        try:
            record = source[int(rng.integers(len(source)))]
            return EvalTransform(config)(open_image(record["image"])), record["label"]
        except (OSError, CorruptImage):
            continue
    raise InputError(f"more than {config.max_corrupt} unreadable images of {config.name} in a row")
