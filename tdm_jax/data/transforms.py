"""Host-side transforms on Pillow images; all randomness comes from the generator passed in."""

import dataclasses
import math

import numpy as np
from PIL import Image, ImageEnhance

from tdm_jax.data import images, randaugment
from tdm_jax.data.config import DataConfig

Box = tuple[float, float, float, float]

# Pillow's own recommendation: decoding at twice the final size is indistinguishable from decoding
# at full size, and saves most of the time on photographs of many megapixels.
_DRAFT_GAP = 2.0


def random_crop_box(
    size: tuple[int, int],
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) of a random resized crop (arXiv 1409.4842).

    Its area is a uniform share of the image within `scale`, its aspect ratio (width / height)
    log-uniform within `ratio`. After ten draws that do not fit it is the largest centred box of an
    allowed ratio.

    Args:
      size: (width, height) of the image.
      rng: random generator.
      scale: (low, high) share of the image's area.
      ratio: (low, high) width / height.
    """
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return int(left), int(top), int(left) + w, int(top) + h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w = min(width, max(1, round(height * aspect)))
    h = min(height, max(1, round(width / aspect)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def crop_and_resize(
    image: Image.Image, box: Box, size: tuple[int, int], channels: int, resample: Image.Resampling
) -> Image.Image:
    """Decodes only as finely as the crop needs, then crops and resizes with antialiasing.

    Args:
      image: as `images.open_image` gives it, not yet decoded.
      box: (left, top, right, bottom) in pixels of the whole image.
      size: (height, width) of the result.
      channels: of the result, 3 or 1.
      resample: Pillow's interpolation.
    """
    height, width = size
    shrink = min((box[2] - box[0]) / width, (box[3] - box[1]) / height) / _DRAFT_GAP
    full = image.size
    if shrink >= 2:
        image.draft(image.mode, (int(full[0] / shrink), int(full[1] / shrink)))
    scale = (image.size[0] / full[0], image.size[1] / full[1])
    left, top, right, bottom = (
        min(edge * scale[i % 2], image.size[i % 2]) for i, edge in enumerate(box)
    )
    box = left, top, right, bottom
    return images.load(image, channels).resize((width, height), resample, box=box)


def color_jitter(image: Image.Image, rng: np.random.Generator, amount: float) -> Image.Image:
    """Brightness, contrast and saturation in random order, each by a factor in 1 ± amount."""
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    factors = rng.uniform(max(0.0, 1.0 - amount), 1.0 + amount, size=3)
    for which in rng.permutation(3):
        image = enhancers[which](image).enhance(factors[which])
    return image


def random_affine(
    image: Image.Image,
    rng: np.random.Generator,
    *,
    shift: float,
    scale: float,
    degrees: float,
    resample: Image.Resampling,
) -> Image.Image:
    """Rotates and scales about the centre, then shifts; what is uncovered is black.

    Args:
      image: decoded.
      rng: random generator.
      shift: largest shift, as a share of each side.
      scale: the image grows or shrinks by a factor in 1 ± scale.
      degrees: largest rotation either way.
      resample: Pillow's interpolation.
    """
    width, height = image.size
    angle = math.radians(rng.uniform(-degrees, degrees))
    factor = rng.uniform(1.0 - scale, 1.0 + scale)
    dx, dy = rng.uniform(-shift, shift) * width, rng.uniform(-shift, shift) * height
    # Pillow wants the way back, from a place in the result to a place in the source.
    cos, sin = math.cos(angle) / factor, math.sin(angle) / factor
    cx, cy = width / 2, height / 2
    x0 = cx - cos * (cx + dx) - sin * (cy + dy)
    y0 = cy + sin * (cx + dx) - cos * (cy + dy)
    matrix = (cos, sin, x0, -sin, cos, y0)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=resample)


def resize_and_center_crop(
    image: Image.Image, size: tuple[int, int], crop_pct: float, resample: Image.Resampling
) -> Image.Image:
    """The evaluation transform: cover size / crop_pct, keep the aspect ratio, take the centre.

    For squares these are torchvision's Resize and CenterCrop to the pixel, as timm evaluates.

    Args:
      image: decoded.
      size: (height, width) of the result.
      crop_pct: share of the covered square's side that the crop keeps.
      resample: Pillow's interpolation.
    """
    height, width = size
    cover_h, cover_w = math.floor(height / crop_pct), math.floor(width / crop_pct)
    w, h = image.size
    if cover_h * w >= cover_w * h:
        target = (max(width, int(cover_h * w / h)), cover_h)
    else:
        target = (cover_w, max(height, int(cover_w * h / w)))
    if target != image.size:
        image = image.resize(target, resample)
    left, top = round((target[0] - width) / 2), round((target[1] - height) / 2)
    return image.crop((left, top, left + width, top + height))


def to_array(image: Image.Image) -> np.ndarray:
    """uint8 [h, w, channels]."""
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """From an opened image to uint8 [h, w, c]: resize, centre crop."""

    config: DataConfig

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Decodes and transforms; `images.CorruptImage` if the data is damaged."""
        return to_array(_whole(image, self.config))


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """From an opened image and a generator to uint8 [h, w, c]; `config.augmentation` says how."""

    config: DataConfig

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        """Decodes and transforms; `images.CorruptImage` if the data is damaged."""
        config, resample = self.config, _resample(self.config)
        if config.augmentation == "crop":
            box = random_crop_box(image.size, rng, config.crop_scale, config.crop_ratio)
            image = crop_and_resize(image, box, config.image_size, config.channels, resample)
            return to_array(distort(image, config, rng))
        image = _whole(image, config)
        if config.augmentation == "affine":
            image = random_affine(
                image,
                rng,
                shift=config.affine_shift,
                scale=config.affine_scale,
                degrees=config.affine_degrees,
                resample=resample,
            )
        return to_array(image)


def _whole(image: Image.Image, config: DataConfig) -> Image.Image:
    image = images.load(image, config.channels)
    return resize_and_center_crop(image, config.image_size, config.crop_pct, _resample(config))


def distort(image: Image.Image, config: DataConfig, rng: np.random.Generator) -> Image.Image:
    """What follows the random resized crop: a flip, then RandAugment or else colour jitter."""
    if rng.random() < config.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # timm too turns the jitter off where RandAugment is on.
    if config.rand_augment:
        return _rand_augment(image, config, rng)
    return color_jitter(image, rng, config.color_jitter) if config.color_jitter else image


def _rand_augment(image: Image.Image, config: DataConfig, rng: np.random.Generator) -> Image.Image:
    mean = tuple(min(255, round(255 * value)) for value in config.mean)
    # Lanczos exists for resizing only.
    geometric = "bicubic" if config.interpolation == "lanczos" else config.interpolation
    return randaugment.parse(config.rand_augment)(
        image,
        rng,
        fill=mean if config.channels == 3 else mean[0],
        resample=Image.Resampling[geometric.upper()],
    )


def _resample(config: DataConfig) -> Image.Resampling:
    return Image.Resampling[config.interpolation.upper()]
