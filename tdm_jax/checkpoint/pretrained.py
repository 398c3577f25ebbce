"""Builds the model that a checkpoint is of, and fills it."""

from collections.abc import Mapping
from os import PathLike
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tdm_jax.checkpoint.architecture import architecture
from tdm_jax.checkpoint.names import ParamMapping, detect
from tdm_jax.checkpoint.raw_checkpoint import RawCheckpoint, read_raw_checkpoint
from tdm_jax.checkpoint.weight_loader import WeightLoader
from tdm_jax.errors import InputError
from tdm_jax.models.registry import create_model
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.reduction import Reducer

Params = dict[str, Any]
# Fields that decide what the parameters are and what they compute; the rest is how training runs.
_DESCRIBED = (
    "image_size", "patch_size", "width", "depth", "num_heads", "num_classes", "in_channels",
    "mlp_ratio", "distilled", "class_token", "num_registers", "layer_norm_eps",
)  # fmt: skip


class Loaded(NamedTuple):
    """A model, its parameters, and which arrays of the file each came from."""

    model: VisionTransformer
    params: Params
    entries: tuple[ParamMapping, ...]


def describe(model: VisionTransformer) -> dict[str, Any]:
    """What `create_model` takes to build a model of the same weights, as JSON can hold it."""
    fields = {name: getattr(model, name) for name in _DESCRIBED}
    return {"name": "vit", **fields, "image_size": list(model.image_size)}


def read_state_dict(path: str | PathLike[str], *, ema: bool = False) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint, by the names and in the layout that it has itself.

    Args:
      path: a .pth, .pt or .bin file, a .safetensors file, a Hugging Face folder, or a folder that
        `save_model` wrote (which answers with timm's names and layout).
      ema: take the moving average of a training checkpoint's weights.

    Raises:
      InputError: there is nothing that could be read, or it is damaged.
    """
    return read_raw_checkpoint(path, ema=ema).arrays


def load_pretrained(
    path: str | PathLike[str],
    reducer: str | Reducer | None = None,
    keep_rate: float | tuple[float, ...] | None = None,
    *,
    num_heads: int | None = None,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    reset_head: bool = False,
    fresh_reducer: bool = False,
    extra_weights: Mapping[str, np.ndarray] | None = None,
    ema: bool = False,
    **overrides: Any,
) -> tuple[VisionTransformer, Params]:
    """Builds the model that a checkpoint is of, and fills it.

    The architecture follows from the arrays' shapes. What they do not tell comes from a config.json
    or our own description beside them, else it is DeiT's: heads of 64 channels, a layer norm
    epsilon of 1e-6, a square grid of patches.

    Args:
      path: as in `read_state_dict`.
      reducer: a name, or an object from `make_reducer`; None for the one that the model was saved
        with (`save_model(path, {**describe(model), "reducer": describe_reducer(reducer)}, params)`
        keeps calibrated counts, too), else "none".
      keep_rate: with a reducer by name; None for its default.
      num_heads: of the model; must be told if the width is no multiple of 64.
      num_classes: another number than the checkpoint's needs `reset_head`.
      image_size: height and width in pixels, or one number for both; the position embedding is
        resized if the grid of patches differs.
      reset_head: start with a fresh head (or two), whatever the checkpoint has.
      fresh_reducer: let a learned reducer whose weights the checkpoint lacks start fresh, to be
        trained.
      extra_weights: of a learned reducer, by the names of its original program.
      ema: take the moving average of a training checkpoint's weights.
      **overrides: further fields of `VisionTransformer`, or `layers` for the reducer.

    Returns:
      The model, and parameters in float32 as `model.init` would return them.

    Raises:
      InputError: the file is unreadable; the architecture cannot be told; or entries are missing,
        left over or of the wrong shape, all of them listed.
    """
    given = {"num_heads": num_heads, "num_classes": num_classes, "image_size": image_size}
    given = {key: value for key, value in given.items() if value is not None}
    loaded = load(
        read_raw_checkpoint(path, ema=ema),
        reducer,
        keep_rate,
        reset_head=reset_head,
        fresh_reducer=fresh_reducer,
        extra_weights=extra_weights,
        **given,
        **overrides,
    )
    return loaded.model, loaded.params


def load(
    source: RawCheckpoint,
    reducer: str | Reducer | None = None,
    keep_rate: float | tuple[float, ...] | None = None,
    *,
    reset_head: bool = False,
    fresh_reducer: bool = False,
    extra_weights: Mapping[str, np.ndarray] | None = None,
    **overrides: Any,
) -> Loaded:
    """`load_pretrained` for a checkpoint that was read before; also tells what was mapped."""
    naming = detect(source.arrays)
    fields, grid = architecture(source, naming, overrides)
    # A reducer that is given replaces the saved one with all that belongs to it.
    told = source.reducer if reducer is None else {"reducer": reducer}
    if keep_rate is not None:
        told = told | {"keep_rate": keep_rate}
    try:
        model = create_model("vit", **{**fields, **told, **overrides})
    except InputError as error:
        raise InputError(f"{source.path}: {error}") from error
    fit = WeightLoader(source, naming, model, grid, reset_head, fresh_reducer)
    params = fit.parameters()
    if model.reducer.learned:
        params["reducer"] = fit.reducer_weights(extra_weights)
    elif extra_weights is not None:
        model.reducer.import_weights(dict(extra_weights))  # says that it has no use for them
    fit.check()
    return Loaded(model, {"params": jax.tree.map(jnp.asarray, params)}, tuple(fit.used))
