"""Matches a checkpoint's arrays with the parameters of a model, and lists what does not fit."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array

from tdm_jax.checkpoint.foreign import foreign_parts, ignored
from tdm_jax.checkpoint.names import REDUCER, Naming, ParamMapping, ranges
from tdm_jax.checkpoint.positions import resample_positions
from tdm_jax.checkpoint.raw_checkpoint import RawCheckpoint
from tdm_jax.errors import InputError
from tdm_jax.models.vit import VisionTransformer

_HEADS = ("head/", "head_dist/")


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
        self._arrays: Mapping[str, np.ndarray] = checkpoint.arrays
        if extra_weights is not None:
            weights = {"reducer": model.reducer.import_weights(dict(extra_weights))}
            self._arrays = _Replaced(traverse_util.flatten_dict(weights, sep="/"), self._arrays)
        self._mappings = naming.mappings(model.depth)
        self._fresh: tuple[str, ...] = _HEADS if reset_head else ()
        if fresh_reducer and not any(name.startswith(REDUCER) for name in self._arrays):
            self._fresh += (REDUCER,)
        self._misfits: dict[str, list[str]] = {}

    def params(self) -> dict[str, Any]:
        """The model's parameters, in float32, read one by one.

        Raises:
          InputError: some are missing, left over, of the wrong shape or not finite, all listed.
        """
        model, params = self._model, {}
        images = jax.ShapeDtypeStruct((1, *model.image_size, model.in_channels), jnp.float32)
        shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
        flat = traverse_util.flatten_dict(shapes, sep="/")
        # A reducer's weights have one name everywhere.
        self._mappings |= {p: ParamMapping.same(p) for p in flat if p not in self._mappings}
        read = [path for path in flat if not path.startswith(self._fresh)]
        for path in read:
            self._compare(self._mappings[path], flat[path].shape)
        self._left_over(read)
        self._check()
        for i, (path, leaf) in enumerate(flat.items()):
            if not path.startswith(self._fresh):
                params[path] = self._read(self._mappings[path], leaf.shape)
            elif path.startswith(_HEADS):
                params[path] = _fresh_head(path, leaf.shape, i)
        self._check()
        tree = traverse_util.unflatten_dict(params, sep="/")
        if REDUCER in self._fresh and model.reducer.learned:
            tree["reducer"] = model.reducer.init(jax.random.key(0), model.shape)
        return tree

    def _compare(self, mapping: ParamMapping, shape: tuple[int, ...]) -> None:
        """Before anything is read: is it there, and of the right shape?"""
        if mapping.path == "pos_embed":
            # The model's prefix with the checkpoint's grid: another resolution is no misfit.
            prefix = shape[1] - self._model.shape.patches
            shape = (1, prefix + math.prod(self._grid), shape[2])
        for name, expected in zip(mapping.sources, mapping.shapes(shape), strict=True):
            if name not in self._arrays:
                self._note("missing", name)
                continue
            array = self._arrays[name]
            if array.shape != expected or not jnp.issubdtype(array.dtype, jnp.floating):
                self._note(
                    "misshapen",
                    f"{name} {array.dtype}{list(array.shape)}, expected {list(expected)}",
                )

    def _read(self, mapping: ParamMapping, shape: tuple[int, ...]) -> Array:
        value = mapping.read(self._arrays)
        # One sum tells: a NaN or an infinity stays in it.
        if not np.isfinite(value.sum(dtype=np.float64)):
            for name in mapping.sources:
                self._note("NaN or infinite", name)
        if mapping.path == "pos_embed":
            prefix = shape[1] - self._model.shape.patches
            rule = self._model.interpolation
            value = resample_positions(value, prefix, self._grid, self._model.shape.grid, rule)
        return jax.device_put(value)

    def _note(self, misfit: str, name: str) -> None:
        names = self._misfits.setdefault(misfit, [])
        if name not in names:
            names.append(name)

    def _left_over(self, read: list[str]) -> None:
        used = {name for path in read for name in self._mappings[path].sources}
        # What a caller has decided to do without.
        spared = _HEADS if _HEADS[0] in self._fresh or not self._model.num_classes else ()
        spared += () if self._model.pool == "map" else ("attn_pool/",)
        for path in self._mappings:
            if path.startswith(spared):
                used |= set(self._mappings[path].sources)
        for name, array in self._arrays.items():
            reducers = name.startswith(REDUCER) and not self._model.reducer.learned
            # No register tokens are an empty array in DINOv3's files.
            if name not in used and not ignored(name) and not reducers and array.size:
                self._note("left over", name)

    def _check(self) -> None:
        if not self._misfits:
            return
        found = self._misfits
        listed = [f"{misfit}: {ranges(names)}" for misfit, names in found.items()]
        reasons = foreign_parts(found.get("left over", ()))
        listed += [f"this model has no {why}" for why in reasons]
        if any(name.startswith(REDUCER) for name in found.get("missing", ())):
            listed.append(
                f"{self._model.reducer.title} is learned: expected its weights as "
                "extra_weights, or fresh_reducer to train them"
            )
        heads = [self._mappings[path] for path in self._mappings if path.startswith(_HEADS)]
        of_heads = {name for mapping in heads for name in mapping.sources}
        if {text.split(" ")[0] for names in found.values() for text in names} <= of_heads:
            listed.append("reset_head starts with a fresh head")
        raise InputError(f"{self._path} does not fit the model; {'; '.join(listed)}")


class _Replaced(Mapping[str, Any]):
    """A checkpoint with other weights for the reducer."""

    def __init__(self, reducer: Mapping[str, Any], arrays: Mapping[str, np.ndarray]):
        self._reducer, self._arrays = reducer, arrays
        kept = [name for name in arrays if not name.startswith(REDUCER)]
        self._names = dict.fromkeys([*reducer, *kept])

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return self._reducer[name] if name in self._reducer else self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _fresh_head(path: str, shape: tuple[int, ...], i: int) -> Array:
    if path.endswith("bias"):
        return jnp.zeros(shape)
    initializer = jax.nn.initializers.truncated_normal(0.02)
    return initializer(jax.random.fold_in(jax.random.key(0), i), shape, jnp.float32)
