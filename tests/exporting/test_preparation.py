"""Preparation as a program: Pillow's own, to one step of 255."""

import functools

import jax
import numpy as np
import pytest
from jax import export
from PIL import Image

from tdm_jax.data.transforms import resize_and_center_crop
from tdm_jax.exporting.preparation import prepare
from tdm_jax.models.preprocessing import Preprocessing


@functools.cache
def photograph():
    """Smooth shapes, sharp edges and noise."""
    y, x = np.mgrid[:91, :131]
    waves = 127 + 100 * np.sin(x / 5 + y / 9) * np.cos(y / 3)
    noise = np.random.default_rng(0).integers(0, 256, (91, 131))
    edges = 255.0 * ((x // 13 + y // 11) % 2)
    return np.stack([waves, noise, edges], axis=-1).astype(np.uint8)


@functools.cache
def program(interpolation, crop_pct, size):
    """A program for any number of images of any size."""
    settings = Preprocessing((0.0,) * 3, (1.0,) * 3, crop_pct, interpolation)
    images = jax.ShapeDtypeStruct(export.symbolic_shape("b, h, w, 3"), np.uint8)
    exported = export.export(jax.jit(lambda x: prepare(x, size, settings)))(images)
    return lambda x: np.asarray(exported.call(x)) * 255


# Odd: at even ones Pillow's rounding errors decide which pixel is the nearest of two.
SIDES = [(91, 131), (131, 91), (33, 77), (65, 65), (25, 31), (91, 25)]


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(("crop_pct", "size"), [(0.875, (56, 56)), (1.0, (32, 48))])
def test_it_is_pillows(interpolation, crop_pct, size):
    resample = Image.Resampling[interpolation.upper()]
    whole = Image.fromarray(photograph())
    for height, width in SIDES:
        image = whole.resize((width, height))
        expected = np.asarray(resize_and_center_crop(image, size, crop_pct, resample), int)
        got = program(interpolation, crop_pct, size)(np.asarray(image)[None])[0]
        off = np.abs(got - expected)
        assert off.max() < 1.01, (height, width)
        assert (off < 0.01).mean() > 0.97


def test_several_images_at_once():
    run = program("bicubic", 0.875, (56, 56))
    images = np.stack([photograph(), photograph()[::-1]])
    np.testing.assert_array_equal(run(images)[1], run(images[1:])[0])
