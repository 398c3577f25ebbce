"""RandAugment as DeiT uses it, on Pillow images: timm's "rand-m9-mstd0.5-inc1" and its relatives.

Cubuk et al., "RandAugment" (arXiv 1909.13719), with the operations, ranges and notation of timm
(https://github.com/huggingface/pytorch-image-models, Apache-2.0), on which DeiT's recipe stands:
`layers` operations are drawn with replacement, each is applied with probability `prob`, at a
magnitude drawn from N(magnitude, std) and clipped to [0, 10]. "Increasing" variants make a larger
magnitude mean a stronger change for every operation.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from tdm_jax.errors import InputError

Fill = int | tuple[int, ...]

MAX_MAGNITUDE = 10.0


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """What a specification such as "rand-m9-mstd0.5-inc1" says.

    Attributes:
      magnitude: mean strength, `m`.
      layers: operations per image, `n`.
      prob: probability that a drawn operation is applied, `p`.
      std: standard deviation of the strength, `mstd`; above 100 it is uniform in [0, magnitude].
      limit: the strength's upper bound, `mmax`.
      increasing: whether the increasing variants are used, `inc`.
    """

    magnitude: float = 10.0
    layers: int = 2
    prob: float = 0.5
    std: float = 0.0
    limit: float = MAX_MAGNITUDE
    increasing: bool = False

    def __call__(
        self,
        image: Image.Image,
        rng: np.random.Generator,
        *,
        fill: Fill,
        resample: Image.Resampling,
    ) -> Image.Image:
        """Applies the drawn operations to an RGB or grey image.

        Args:
          image: mode RGB or L.
          rng: the only source of randomness.
          fill: colour of what a geometric operation uncovers.
          resample: Pillow's interpolation of the geometric operations.
        """
        names = tuple(OPERATIONS)
        for choice in rng.integers(len(names), size=self.layers):
            if rng.random() >= self.prob:
                continue
            image = apply(
                names[choice], image, self._strength(rng), rng,
                increasing=self.increasing, fill=fill, resample=resample,
            )  # fmt: skip
        return image

    def _strength(self, rng: np.random.Generator) -> float:
        if self.std > 100:
            strength = rng.uniform(0, self.magnitude)
        elif self.std > 0:
            strength = rng.normal(self.magnitude, self.std)
        else:
            strength = self.magnitude
        return float(np.clip(strength, 0, self.limit))


@functools.cache
def parse(spec: str) -> RandAugment:
    """Reads timm's notation: "rand", then any of m, n, p, mstd, mmax, inc, joined by hyphens.

    Raises:
      InputError: anything else.
    """
    head, *parts = spec.split("-")
    if head != "rand":
        raise InputError(
            f"rand_augment: got {spec!r}, expected something like rand-m9-mstd0.5-inc1"
        )
    values = {}
    for part in parts:
        key = part.rstrip("0123456789.")
        if key not in _FIELDS or key == part:
            raise InputError(
                f"rand_augment: got {part!r} in {spec!r}, expected one of "
                f"{', '.join(_FIELDS)} followed by a number"
            )
        name, convert = _FIELDS[key]
        try:
            values[name] = convert(part[len(key) :])
        except ValueError:
            raise InputError(f"rand_augment: got {part!r} in {spec!r}, expected a number") from None
    result = RandAugment(**values)
    if not 0 <= result.prob <= 1 or not 0 < result.limit <= MAX_MAGNITUDE:
        raise InputError(
            f"rand_augment: got {spec!r}, expected p within [0, 1], mmax within (0, 10]"
        )
    return result


_FIELDS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "m": ("magnitude", float),
    "n": ("layers", int),
    "p": ("prob", float),
    "mstd": ("std", float),
    "mmax": ("limit", float),
    "inc": ("increasing", lambda text: bool(int(text))),
}


def apply(
    name: str,
    image: Image.Image,
    magnitude: float,
    rng: np.random.Generator,
    *,
    increasing: bool = True,
    fill: Fill = 0,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
    """One operation of `OPERATIONS` at a magnitude in [0, 10]; signs are drawn from `rng`."""
    change = OPERATIONS[name](magnitude / MAX_MAGNITUDE, rng, increasing)
    return change(image, fill, resample)


# Each operation turns (strength in [0, 1], rng, increasing) into a function of an image, a fill
# colour and an interpolation; the draws happen first, so that they never depend on the image.
Change = Callable[[Image.Image, Fill, Image.Resampling], Image.Image]


def _sign(rng: np.random.Generator) -> float:
    return -1.0 if rng.random() < 0.5 else 1.0


def _plain(function: Callable[[Image.Image], Image.Image]) -> Callable[..., Change]:
    return lambda strength, rng, increasing: lambda image, fill, resample: function(image)


def _enhance(enhancer: type) -> Callable[..., Change]:
    def operation(strength: float, rng: np.random.Generator, increasing: bool) -> Change:
        stronger = max(0.1, 1.0 + 0.9 * strength * _sign(rng))
        factor = stronger if increasing else 0.1 + 1.8 * strength
        return lambda image, fill, resample: enhancer(image).enhance(factor)

    return operation


def _rotate(strength: float, rng: np.random.Generator, increasing: bool) -> Change:
    degrees = 30.0 * strength * _sign(rng)
    return lambda image, fill, resample: image.rotate(degrees, resample=resample, fillcolor=fill)


def _shear(axis: int) -> Callable[..., Change]:
    def operation(strength: float, rng: np.random.Generator, increasing: bool) -> Change:
        amount = 0.3 * strength * _sign(rng)
        matrix = (1, amount, 0, 0, 1, 0) if axis == 0 else (1, 0, 0, amount, 1, 0)
        return lambda image, fill, resample: _affine(image, matrix, fill, resample)

    return operation


def _translate(axis: int) -> Callable[..., Change]:
    def operation(strength: float, rng: np.random.Generator, increasing: bool) -> Change:
        share = 0.45 * strength * _sign(rng)

        def change(image: Image.Image, fill: Fill, resample: Image.Resampling) -> Image.Image:
            pixels = share * image.size[axis]
            matrix = (1, 0, pixels, 0, 1, 0) if axis == 0 else (1, 0, 0, 0, 1, pixels)
            return _affine(image, matrix, fill, resample)

        return change

    return operation


def _affine(
    image: Image.Image, matrix: tuple[float, ...], fill: Fill, resample: Image.Resampling
) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=resample, fillcolor=fill
    )


def _posterize(strength: float, rng: np.random.Generator, increasing: bool) -> Change:
    bits = 4 - int(4 * strength) if increasing else int(4 * strength)
    # No bit kept is a black image, as the published recipe had it; Pillow itself refuses 0 bits.
    mask = 256 - 2 ** (8 - bits)
    return lambda image, fill, resample: _lookup(image, [value & mask for value in range(256)])


def _solarize(strength: float, rng: np.random.Generator, increasing: bool) -> Change:
    threshold = min(256, int(256 * strength))
    threshold = 256 - threshold if increasing else threshold
    return lambda image, fill, resample: ImageOps.solarize(image, threshold)


def _solarize_add(strength: float, rng: np.random.Generator, increasing: bool) -> Change:
    add = min(128, int(110 * strength))
    table = [min(255, value + add) if value < 128 else value for value in range(256)]
    return lambda image, fill, resample: _lookup(image, table)


def _lookup(image: Image.Image, table: list[int]) -> Image.Image:
    return image.point(table * len(image.getbands()))


OPERATIONS: dict[str, Callable[[float, np.random.Generator, bool], Change]] = {
    "AutoContrast": _plain(ImageOps.autocontrast),
    "Equalize": _plain(ImageOps.equalize),
    "Invert": _plain(ImageOps.invert),
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": _enhance(ImageEnhance.Color),
    "Contrast": _enhance(ImageEnhance.Contrast),
    "Brightness": _enhance(ImageEnhance.Brightness),
    "Sharpness": _enhance(ImageEnhance.Sharpness),
    "ShearX": _shear(0),
    "ShearY": _shear(1),
    "TranslateX": _translate(0),
    "TranslateY": _translate(1),
}
