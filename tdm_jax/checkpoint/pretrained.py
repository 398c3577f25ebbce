"""Builds the model that a checkpoint is of, and fills it."""

from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np

from tdm_jax.checkpoint.architecture import architecture
from tdm_jax.checkpoint.foreign import refuse
from tdm_jax.checkpoint.names import detect
from tdm_jax.checkpoint.raw_checkpoint import RawCheckpoint, read_raw_checkpoint
from tdm_jax.checkpoint.weight_loader import WeightLoader
from tdm_jax.errors import InputError
from tdm_jax.models.registry import create_model
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.reduction import Reducer

Variables = dict[str, Any]


def read_state_dict(path: str | PathLike[str], *, ema: bool = False) -> Mapping[str, np.ndarray]:
    """The arrays of a checkpoint, by the names and in the layout that it has itself.

    Args:
      path: as in `load_pretrained`; what tdm_jax wrote answers with timm's names and layout.
      ema: take the moving average of the weights that a training keeps.

    Raises:
      InputError: there is nothing that could be read, or it is damaged.
    """
    return read_raw_checkpoint(path, ema=ema).arrays


def load_pretrained(
    path: str | PathLike[str] | RawCheckpoint,
    reducer: str | Reducer | None = None,
    keep_rate: float | tuple[float, ...] | None = None,
    *,
    reset_head: bool = False,
    fresh_reducer: bool = False,
    extra_weights: Mapping[str, np.ndarray] | None = None,
    ema: bool = False,
    **settings: Any,
) -> tuple[VisionTransformer, Variables]:
    """Builds the model that a checkpoint is of, and fills it.

    Names and layouts are those of timm, facebook, Hugging Face, OpenCLIP or big_vision. The
    architecture follows from the arrays' shapes. What they do not tell comes from a description
    beside them (our own, Hugging Face's, timm's), else it is the family's (see `families`):
    epsilon, activation, pooling, how positions are resampled, heads of 64 channels but where
    published models of that width have others, a square grid of patches, a preprocessing. Text
    towers and decoders beside the vision tower are passed over.

    Args:
      path: a PyTorch file (.pth, .pt, .bin), a .safetensors or .npz file, a folder of Hugging Face,
        timm or `save_model`, or the working directory of a training, finished or not; each on a
        disk or in an object store (gs://...). Or what `read_raw_checkpoint` made of one.
      reducer: a name, or an object from `make_reducer`; None for the one that the model was saved
        or trained with, calibrated counts included, else "none".
      keep_rate: as in `create_model`; without `reducer` the saved one goes to this keep rate.
      reset_head: start with a fresh head (or two), whatever the checkpoint has.
      fresh_reducer: let a learned reducer whose weights the checkpoint lacks start fresh, to be
        trained.
      extra_weights: of a learned reducer, by the names of its original program.
      ema: take the moving average of the weights that a training keeps.
      **settings: as in `create_model`: of the method, and fields of the model, which win over
        all of the above (`activation`, `layer_norm_eps`, `pool`, `interpolation`, ...). `num_heads`
        must be given if the width is no multiple of 64 and nothing tells; another `num_classes`
        than the checkpoint's needs `reset_head`, but for 0, the pooled feature without a head; for
        another `image_size` the position embedding is resampled by `interpolation`.

    Returns:
      The model, and variables in float32 as `model.init` would return them.

    Raises:
      InputError: the file is unreadable, or of an architecture that is none of ours or cannot be
        told; or parameters are missing, left over, of the wrong shape, NaN or infinite, all of
        them listed.
    """
    checkpoint = path if isinstance(path, RawCheckpoint) else read_raw_checkpoint(path, ema=ema)
    refuse(checkpoint.path, checkpoint.arrays)
    try:
        naming = detect(checkpoint.arrays)
    except InputError as error:
        raise InputError(f"{checkpoint.path}: {error}") from error
    chosen = {name: value for name, value in settings.items() if value is not None}
    fields, grid = architecture(checkpoint, naming, chosen)
    if reducer is None:
        reducer = checkpoint.description.get("reducer", "none")
    try:
        model = create_model("vit", reducer, keep_rate, **{**settings, **fields, **chosen})
    except InputError as error:
        raise InputError(f"{checkpoint.path}: {error}") from error
    loader = WeightLoader(checkpoint, naming, model, grid, reset_head, fresh_reducer, extra_weights)
    return model, {"params": loader.params()}
