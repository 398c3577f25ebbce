"""From encoded bytes to an RGB or grey Pillow image, or one error for all that can go wrong."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp"),
    *(".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
)
# What Pillow's decoders raise on damaged data; anything else is a defect of ours and stays visible.
_DAMAGED = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class CorruptImage(ValueError):
    """Data that cannot be decoded into an image."""


def open_image(data: bytes | np.ndarray) -> Image.Image:
    """Opens without decoding: the size is known, the pixels come with `load`.

    Args:
      data: an encoded image, or uint8 [h, w], [h, w, 1] or [h, w, 3].

    Raises:
      CorruptImage: the header cannot be read.
    """
    if isinstance(data, np.ndarray):
        return Image.fromarray(data[..., 0] if data.ndim == 3 and data.shape[-1] == 1 else data)
    try:
        return Image.open(io.BytesIO(data))
    except _DAMAGED as error:
        raise CorruptImage(str(error)) from error


def load(image: Image.Image, channels: int) -> Image.Image:
    """Decodes and converts to RGB (3 channels) or grey (1).

    Transparent images are laid over white, 16-bit ones scaled to 8 bits; of an animation the first
    frame is taken. An EXIF orientation is ignored, as ImageNet's usual readers do.

    Raises:
      CorruptImage: truncated or damaged data, or a mode that has no meaning as a picture.
    """
    try:
        image.load()
        return _convert(image, "RGB" if channels == 3 else "L")
    except _DAMAGED as error:
        raise CorruptImage(str(error)) from error


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    """From 16 bits by the high byte, from floating point by its range: [0, 1] or [0, 255]."""
    values = np.asarray(image).astype(np.float64)
    top = values.max(initial=0.0)
    if image.mode == "F":
        scale = 255.0 if top <= 1.0 else 1.0
    else:
        scale = 255.0 / 65535.0 if top > 255 or image.mode.startswith("I;16") else 1.0
    return Image.fromarray(np.clip(values * scale + 0.5, 0, 255).astype(np.uint8))
