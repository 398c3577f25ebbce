"""Images to look at: files of any kind, or some of a data set, as a model takes them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging
from jaxtyping import UInt8
from PIL import UnidentifiedImageError

from tdm_jax.data.config import DataConfig
from tdm_jax.data.images import IMAGE_SUFFIXES, CorruptImage, open_image
from tdm_jax.data.sources import open_source
from tdm_jax.data.transforms import EvalTransform
from tdm_jax.errors import InputError


class Picture(NamedTuple):
    """An image as a model takes it, before normalisation.

    Attributes:
      name: safe as a file's.
      pixels: of the model's size and channels.
      label: its class; None where nobody says.
    """

    name: str
    pixels: UInt8[np.ndarray, "h w c"]
    label: int | None = None


def read_images(path: str | Path, data_config: DataConfig, smallest: int = 1) -> list[Picture]:
    """Reads an image, or all images below a folder in the order of their names.

    Transparent, grey, 16-bit and animated images are converted (of an animation the first frame).

    Args:
      path: of a file or a folder.
      data_config: says how an image is scaled and cropped.
      smallest: least width and height of an image, in pixels.

    Raises:
      InputError: there is nothing, no image, or one that cannot be read or is too small.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(f"{path} does not exist; expected an image or a folder of images")
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        files = [p for p in files if p.is_file() and not p.name.startswith(".")]
    if not files:
        raise InputError(f"no image in {path}; expected {', '.join(IMAGE_SUFFIXES)}")
    names = _names([file.relative_to(path) if file != path else Path(file.name) for file in files])
    transform = EvalTransform(data_config)
    pixels = [_read(file, transform, smallest) for file in files]
    return [Picture(*named) for named in zip(names, pixels, strict=True)]


def _read(file: Path, transform: EvalTransform, smallest: int) -> UInt8[np.ndarray, "h w c"]:
    try:
        image = open_image(file.read_bytes())
        if min(image.size) < smallest:
            raise InputError(
                f"{file}: {image.width} x {image.height} pixels; expected at least "
                f"{smallest} x {smallest}"
            )
        return transform(image)
    except (OSError, CorruptImage) as error:
        # Pillow names no file here, but an address.
        unidentified = isinstance(error.__cause__, UnidentifiedImageError)
        reason = "no known format" if unidentified else str(error) or type(error).__name__
        raise InputError(f"{file}: expected a readable image; got: {reason}") from error


def _names(paths: Sequence[Path]) -> list[str]:
    """A file name without suffix for each path, no two alike even where case is ignored."""
    short = ["_".join(path.with_suffix("").parts) for path in paths]
    if len({name.casefold() for name in short}) == len(short):
        return short
    return [f"{i:04d}_{name}" for i, name in enumerate(short)]


def read_examples(
    data_config: DataConfig, count: int, *, spread: bool = False, split: str = "validation"
) -> list[Picture]:
    """Images of a split of a data set; what cannot be read is left out, with a warning.

    Args:
      data_config: which data.
      count: how many, if there are so many.
      spread: take them evenly from the whole split instead of its first ones.
      split: "validation" or "train".

    Raises:
      InputError: the data set, or not one of the images, can be read.
    """
    records, transform = open_source(data_config, split), EvalTransform(data_config)
    count = min(count, len(records))
    stem = data_config.name.replace(":", "_").replace("/", "_")
    pictures = []
    for index in np.linspace(0, len(records) - 1, count).astype(int) if spread else range(count):
        try:
            record = records[int(index)]
            pixels = transform(open_image(record["image"]))
        except (OSError, CorruptImage) as error:
            logging.warning("left out %s: %s", records.describe(int(index)), error)
            continue
        pictures.append(Picture(f"{stem}_{index:04d}", pixels, int(record["label"])))
    if not pictures:
        raise InputError(f"no image of {data_config.name} could be read; expected at least one")
    return pictures
