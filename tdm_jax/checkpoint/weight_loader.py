"""Matches a checkpoint's arrays with the parameters of a model, and lists what does not fit."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float

from tdm_jax.checkpoint.names import FOREIGN, REDUCER, UNUSED, Naming, ParamMapping, ranges
from tdm_jax.checkpoint.raw_checkpoint import RawCheckpoint
from tdm_jax.errors import InputError
from tdm_jax.models.vit import VisionTransformer

_HEADS = ("head/", "head_dist/")


def resize_positions(
    positions: Float[np.ndarray, "1 n d"], prefix: int, old: tuple[int, int], new: tuple[int, int]
) -> Float[Array, "1 m d"]:
    """Resizes a position embedding to another grid of patches: bicubic, antialiased.

    Args:
      positions: of the prefix tokens, then of the patches row by row.
      prefix: tokens at the front, which keep theirs.
      old: rows and columns of the grid that the embedding is for.
      new: rows and columns wanted.
    """
    positions = jnp.asarray(positions, jnp.float32)
    width = positions.shape[-1]
    grid = positions[0, prefix:].reshape(*old, width)
    grid = jax.image.resize(grid, (*new, width), "cubic", antialias=True)
    return jnp.concatenate([positions[:, :prefix], grid.reshape(1, -1, width)], axis=1)


class WeightLoader:
    """Matches a checkpoint with a model, and remembers what did not fit."""

    def __init__(
        self,
        checkpoint: RawCheckpoint,
        naming: Naming,
        model: VisionTransformer,
        grid: tuple[int, int],
        reset_head: bool,
        fresh_reducer: bool,
        extra_weights: Mapping[str, np.ndarray] | None,
    ):
        """Takes what `load_pretrained` was asked for; `grid` is the checkpoint's."""
        self._path, self._model, self._grid = checkpoint.path, model, grid
        self._arrays = dict(checkpoint.arrays)
        if extra_weights is not None:
            weights = {"reducer": model.reducer.import_weights(dict(extra_weights))}
            stored = {name for name in self._arrays if name.startswith(REDUCER)}
            self._arrays = {name: self._arrays[name] for name in self._arrays.keys() - stored}
            self._arrays |= traverse_util.flatten_dict(weights, sep="/")
        self._mappings = naming.mappings(model.depth)
        self._fresh: tuple[str, ...] = _HEADS if reset_head else ()
        if fresh_reducer and not any(name.startswith(REDUCER) for name in self._arrays):
            self._fresh += (REDUCER,)
        self._missing: list[str] = []
        self._misshapen: list[str] = []

    def params(self) -> dict[str, Any]:
        """The model's parameters, in float32.

        Raises:
          InputError: some are missing, left over or of the wrong shape, all of them listed.
        """
        model, params = self._model, {}
        images = jax.ShapeDtypeStruct((1, *model.image_size, model.in_channels), jnp.float32)
        shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
        for i, (path, leaf) in enumerate(traverse_util.flatten_dict(shapes, sep="/").items()):
            # A reducer's weights have one name everywhere.
            mapping = self._mappings.setdefault(path, ParamMapping(path, (path,), None))
            if not path.startswith(self._fresh):
                params[path] = self._take(mapping, leaf.shape)
            elif path.startswith(_HEADS):
                params[path] = _fresh_head(path, leaf.shape, i)
        self._check({name for path in params for name in self._mappings[path].sources})
        tree = traverse_util.unflatten_dict(params, sep="/")
        if REDUCER in self._fresh and model.reducer.learned:
            tree["reducer"] = model.reducer.init(jax.random.key(0), model.shape)
        return tree

    def _take(self, mapping: ParamMapping, shape: tuple[int, ...]) -> np.ndarray | Array | None:
        arrays, model_shape = self._arrays, self._model.shape
        missing = [name for name in mapping.sources if name not in arrays]
        self._missing += missing
        if missing:
            return None
        prefix = shape[1] - model_shape.patches if mapping.path == "pos_embed" else 0
        if mapping.path == "pos_embed":
            # The model's prefix with the checkpoint's grid: another resolution is no misfit.
            shape = (1, prefix + math.prod(self._grid), shape[2])
        wrong = [
            f"{name} {arrays[name].dtype}{list(arrays[name].shape)}, expected {list(expected)}"
            for name, expected in zip(mapping.sources, mapping.shapes(shape), strict=True)
            if arrays[name].shape != expected
            or not jnp.issubdtype(arrays[name].dtype, jnp.floating)
        ]
        self._misshapen += wrong
        if wrong:
            return None
        value = mapping.to_flax([arrays[name].astype(np.float32) for name in mapping.sources])
        if mapping.path == "pos_embed" and self._grid != model_shape.grid:
            return resize_positions(value, prefix, self._grid, model_shape.grid)
        return value

    def _check(self, used: set[str]) -> None:
        heads = [self._mappings[path] for path in self._mappings if path.startswith(_HEADS)]
        of_heads = {name for mapping in heads for name in mapping.sources}
        if _HEADS[0] in self._fresh:
            used = used | of_heads
        unused = UNUSED if self._model.reducer.learned else (*UNUSED, REDUCER)
        left_over = [
            name
            for name in self._arrays
            if name not in used and not any(part in name for part in unused)
        ]
        if not (self._missing or left_over or self._misshapen):
            return
        parts = {"missing": self._missing, "left over": left_over, "misshapen": self._misshapen}
        listed = [f"{what}: {ranges(names)}" for what, names in parts.items() if names]
        hints = {why for key, why in FOREIGN.items() if any(key in name for name in left_over)}
        listed += [f"this model has no {why}" for why in sorted(hints)]
        if any(name.startswith(REDUCER) for name in self._missing):
            listed.append(
                f"{type(self._model.reducer).__name__} is learned: expected its weights as "
                "extra_weights, or fresh_reducer to train them"
            )
        misshapen = {text.split(" ")[0] for text in self._misshapen}
        if {*self._missing, *left_over} | misshapen <= of_heads:
            listed.append("reset_head starts with a fresh head")
        raise InputError(f"{self._path} does not fit the model; {'; '.join(listed)}")


def _fresh_head(path: str, shape: tuple[int, ...], i: int) -> Array:
    if path.endswith("bias"):
        return jnp.zeros(shape)
    initializer = jax.nn.initializers.truncated_normal(0.02)
    return initializer(jax.random.fold_in(jax.random.key(0), i), shape, jnp.float32)
