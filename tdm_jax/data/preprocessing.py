"""Images as a model wants them: for Python (`preprocess`), and for data sets (`data_config_for`)."""

import dataclasses
from typing import Any

from tdm_jax.data.config import DataConfig, make_config
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
