"""From a request's bytes to what a program takes: refused by its header, or decoded and resized.

Images of a batch must have one size, and programs for all sizes would be compiled under load. So
each is resized and cropped here, on the host, exactly as `tdm_jax.preprocess` does it.
"""

import io
import math
import struct
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from launch.serve.limits import Limits, Refusal
from tdm_jax.data.config import make_config
from tdm_jax.data.images import CorruptImage
from tdm_jax.data.transforms import EvalTransform
from tdm_jax.errors import InputError
from tdm_jax.models.preprocessing import Preprocessing

FORMATS = ("JPEG", "PNG", "WEBP")


def transform_of(manifest: dict[str, Any]) -> tuple[EvalTransform, Preprocessing]:
    """How an export's images are prepared, by its manifest.

    A program that prepares images itself gets the square (or rectangle) that it crops the centre
    of; its own resize then has nothing to do.

    Raises:
      InputError: the export does not say how.
    """
    described = manifest["model"].get("preprocessing")
    if described is None:
        raise InputError(
            "the export does not say how its images are prepared; expected one of a checkpoint "
            "that does"
        )
    settings = Preprocessing.from_description(described)
    size, crop_pct = manifest["model"]["image_size"], settings.crop_pct
    if manifest["preprocessing"]:
        size, crop_pct = [math.floor(side / crop_pct) for side in size], 1.0
    config = {
        "name": "folder",
        "data_dir": ".",
        "image_size": tuple(size),
        "channels": manifest["model"]["in_channels"],
        "mean": settings.mean,
        "std": settings.std,
        "crop_pct": crop_pct,
        "interpolation": settings.interpolation,
    }
    return EvalTransform(make_config(config)), settings


def decode(data: bytes, transform: EvalTransform, limits: Limits) -> UInt8[np.ndarray, "h w c"]:
    """An image as a program takes it.

    Args:
      data: a JPEG, PNG or WebP file; of an animation the first frame counts.
      transform: resize and crop.
      limits: are held before anything is decoded.

    Raises:
      Refusal: it is none, too large, damaged or truncated.
    """
    if not data:
        raise Refusal(400, "expected an image; got an empty body")
    try:
        # Pillow knows formats that start other programs; a server reads these three alone.
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Refusal(413, f"expected at most {limits.pixels} pixels: {error}") from error
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error) as error:
        raise Refusal(400, f"expected {', '.join(FORMATS)}; got bytes of no such image") from error
    limits.check_size(*image.size)
    try:
        return transform(image)
    except CorruptImage as error:
        raise Refusal(400, f"the {image.format} image is damaged: {error}") from error
