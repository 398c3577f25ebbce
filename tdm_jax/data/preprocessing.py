"""Images as a model wants them: for Python (`preprocess`), for data sets (`data_config_for`)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from tdm_jax.data.config import DataConfig, make_config
from tdm_jax.data.device_transforms import normalise
from tdm_jax.data.images import CorruptImage, open_image
from tdm_jax.data.transforms import EvalTransform
from tdm_jax.errors import InputError
from tdm_jax.models.vit import VisionTransformer


def data_config_for(model: VisionTransformer, name: str, **settings: Any) -> DataConfig:
    """A data set whose images are prepared as a model's own description of it says.

    Args:
      model: decides size and channels, and, where it carries a `Preprocessing`, mean, std, crop
        share and interpolation; a model that carries none takes the defaults of the data set.
      name: see `DataConfig`.
      **settings: of `DataConfig`, before the model's; None stands for not given.

    Raises:
      InputError: see `make_config`.
    """
    prepared = {} if model.preprocessing is None else dataclasses.asdict(model.preprocessing)
    own = {"image_size": model.image_size, "channels": model.in_channels, **prepared}
    chosen = {key: value for key, value in settings.items() if value is not None}
    return make_config({"name": name, **own, **chosen})


def preprocess(model: VisionTransformer) -> Callable[[Any], Float[Array, "b h w c"]]:
    """What makes a model's input of pictures, as its evaluation does: resize, crop, normalise.

    Args:
      model: must carry a `Preprocessing`.

    Returns:
      A function of one image or several: a Pillow image of any mode, uint8 [h, w, c], or a sequence
      of these, which may differ in size; or uint8 [b, h, w, c]. It returns float32
      [b, height, width, channels] of the model's size, and raises InputError for anything else.

    Raises:
      InputError: the model carries none.
    """
    if model.preprocessing is None:
        raise InputError(
            "the model does not say how its images are prepared; expected it made or loaded with "
            "preprocessing=Preprocessing(mean=..., std=...)"
        )
    config = data_config_for(model, "folder", data_dir=".")
    transform = EvalTransform(config)

    def prepare(images: Any) -> Float[Array, "b h w c"]:
        single = isinstance(images, Image.Image) or getattr(images, "ndim", 0) == 3
        if not single and not hasattr(images, "__len__"):
            raise InputError(f"expected images; got {type(images).__name__}")
        batch = [images] if single else images
        if not len(batch):
            raise InputError("expected at least one image; got none")
        arrays = [_array(transform, image, f"image {i}") for i, image in enumerate(batch)]
        return normalise(jnp.asarray(np.stack(arrays)), config.mean, config.std)

    return prepare


def _array(transform: EvalTransform, image: Any, place: str) -> UInt8[np.ndarray, "h w c"]:
    if not isinstance(image, Image.Image):
        pixels = np.asarray(image)
        wrong = pixels.dtype != np.uint8 or pixels.ndim != 3 or not pixels.size
        if wrong or pixels.shape[-1] not in (1, 3, 4):
            raise InputError(
                f"{place}: expected a Pillow image or uint8 [h, w, c] of 1, 3 or 4 channels; got "
                f"{pixels.dtype}{list(pixels.shape)}"
            )
        image = open_image(pixels)
    try:
        return transform(image)
    except CorruptImage as error:
        raise InputError(f"{place} cannot be decoded: {error}") from error
