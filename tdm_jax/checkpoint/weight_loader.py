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
    ):
        self._checkpoint, self._model, self._grid = checkpoint, model, grid
        self._reset_head, self._fresh_reducer = reset_head, fresh_reducer
        self._mappings = naming.mappings(model.depth)
        images = jax.ShapeDtypeStruct((1, *model.image_size, model.in_channels), jnp.float32)
        shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
        self._expected = traverse_util.flatten_dict(shapes, sep="/")
        self._missing: list[str] = []
        self._misshapen: list[str] = []
        self.used: list[ParamMapping] = []

    def parameters(self) -> dict[str, Any]:
        """Everything but a reducer's weights."""
        params: dict[str, Any] = {}
        for i, (path, expected) in enumerate(self._expected.items()):
            if path.startswith(REDUCER):
                continue
            if self._reset_head and path.startswith(_HEADS):
                params[path] = self._fresh(path, expected.shape, i)
                continue
            value = self._take(self._mappings[path], expected.shape)
            if value is not None:
                params[path] = value
        return traverse_util.unflatten_dict(params, sep="/")

    def reducer_weights(self, extra: Mapping[str, np.ndarray] | None) -> dict[str, Any]:
        """Given ones, the checkpoint's, or, where that was asked for, fresh ones."""
        reducer, arrays = self._model.reducer, self._checkpoint.arrays
        stored = {
            path.removeprefix(REDUCER): array
            for path, array in arrays.items()
            if path.startswith(REDUCER)
        }
        if extra is not None:
            weights = reducer.import_weights(dict(extra))
        elif stored or not self._fresh_reducer:
            weights = traverse_util.unflatten_dict(stored, sep="/")
        else:
            return reducer.init(jax.random.key(0), self._model.shape)
        got = traverse_util.flatten_dict(weights, sep="/")
        want = {
            path.removeprefix(REDUCER): expected.shape
            for path, expected in self._expected.items()
            if path.startswith(REDUCER)
        }
        self._missing += [REDUCER + path for path in want.keys() - got.keys()]
        self._misshapen += [
            f"{REDUCER}{path} {np.shape(got[path])}, expected {want.get(path, 'nothing')}"
            for path in got
            if path not in want or np.shape(got[path]) != want[path]
        ]
        return weights

    def _take(self, mapping: ParamMapping, shape: tuple[int, ...]) -> np.ndarray | Array | None:
        self.used.append(mapping)
        arrays = self._checkpoint.arrays
        absent = [name for name in mapping.sources if name not in arrays]
        self._missing += absent
        if absent:
            return None
        if mapping.path == "pos_embed":
            shape = self._checkpoint_positions(shape)
        wrong = [
            f"{name} {arrays[name].dtype}{list(arrays[name].shape)}, expected {list(expected)}"
            for name, expected in zip(mapping.sources, mapping.shapes(shape), strict=True)
            if arrays[name].shape != expected or not _is_float(arrays[name])
        ]
        self._misshapen += wrong
        if wrong:
            return None
        value = mapping.to_flax([arrays[name].astype(np.float32) for name in mapping.sources])
        model_grid = self._model.shape.grid
        if mapping.path == "pos_embed" and self._grid != model_grid:
            prefix = shape[1] - math.prod(self._grid)
            return resize_positions(value, prefix, self._grid, model_grid)
        return value

    def _checkpoint_positions(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        # The model's prefix with the checkpoint's grid: another resolution is no misfit.
        prefix = shape[1] - self._model.shape.patches
        return (1, prefix + math.prod(self._grid), shape[2])

    def _fresh(self, path: str, shape: tuple[int, ...], i: int) -> Array:
        if path.endswith("bias"):
            return jnp.zeros(shape)
        initializer = jax.nn.initializers.truncated_normal(0.02)
        return initializer(jax.random.fold_in(jax.random.key(0), i), shape, jnp.float32)

    def check(self) -> None:
        """Raises InputError with all that did not fit."""
        used = {name for mapping in self.used for name in mapping.sources}
        if self._reset_head:
            used |= self._heads()
        left_over = [
            name
            for name in self._checkpoint.arrays
            if name not in used
            and not name.startswith(REDUCER)
            and not any(part in name for part in UNUSED)
        ]
        if not (self._missing or left_over or self._misshapen):
            return
        parts = {"missing": self._missing, "left over": left_over}
        listed = [f"{what}: {ranges(names)}" for what, names in parts.items() if names]
        if self._misshapen:
            listed.append(f"misshapen: {ranges(self._misshapen)}")
        hints = {why for key, why in FOREIGN.items() if any(key in name for name in left_over)}
        listed += [f"this model has no {why}" for why in sorted(hints)]
        unfit = {*self._missing, *left_over, *(text.split(" ")[0] for text in self._misshapen)}
        if any(name.startswith(REDUCER) for name in self._missing):
            kind = type(self._model.reducer).__name__
            listed.append(
                f"{kind} is learned: expected its weights as extra_weights, or fresh_reducer to "
                "train them"
            )
        if unfit <= self._heads():
            listed.append("reset_head starts with a fresh head")
        raise InputError(f"{self._checkpoint.path} does not fit the model; {'; '.join(listed)}")

    def _heads(self) -> set[str]:
        heads = [self._mappings[path] for path in self._mappings if path.startswith(_HEADS)]
        return {name for mapping in heads for name in mapping.sources}


def _is_float(array: np.ndarray) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)
