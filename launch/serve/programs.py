"""Several exports of one model at different keep rates, compiled for every size of a batch.

What is compiled ahead cannot be compiled by surprise: a program called with another shape raises.
"""

import dataclasses
import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from launch.serve.images import transform_of
from tdm_jax.data.device_transforms import normalise
from tdm_jax.errors import InputError
from tdm_jax.exporting.artifact import ExportedModel, load_exported
from tdm_jax.exporting.stablehlo import WEIGHTS_FILE
from tdm_jax.reduction import make_reducer

DEFAULT_SIZES = (1, 2, 4, 8)
# What exports of one model at several keep rates share.
_SHARED = ("labels", "input", "output")


@dataclasses.dataclass(frozen=True)
class Program:
    """One keep rate, compiled and warm.

    Attributes:
      keep_rate: that it is asked for by.
      manifest: of its export.
      compiled: executables of its weights and uint8 [size, h, w, c], by size.
      weights: that come first; None where they are inside.
      seconds: that a batch took, by size, the fastest of three.
    """

    keep_rate: float
    manifest: dict[str, Any]
    compiled: Mapping[int, Any]
    weights: Any
    seconds: Mapping[int, float]

    def __call__(self, images: UInt8[np.ndarray, "b h w c"]) -> Float[np.ndarray, "b n"]:
        """Logits, or features of a model without a head, for a batch of a compiled size."""
        return np.asarray(self.compiled[len(images)](self.weights, images))


def read(exports: Sequence[str]) -> list[tuple[float, ExportedModel]]:
    """One model's exports.

    Args:
      exports: folders, each perhaps with the keep rate that it is to have: "0.5=folder". Without,
        it is the one that its method was given; 1 for a model without a method.

    Returns:
      From the highest keep rate to the lowest, with it.

    Raises:
      InputError: an export cannot be read or served, or they are not of one model.
    """
    if not exports:
        raise InputError("expected at least one export; got none")
    found: dict[float, tuple[str, ExportedModel]] = {}
    weights: dict[str, Any] = {}
    for text in exports:
        told, _, folder = text.rpartition("=")
        exported = load_exported(folder, "stablehlo")
        transform_of(exported.manifest)
        rate = _rate(told, folder, exported.manifest)
        if rate in found:
            raise InputError(f"expected one export of keep rate {rate:g}; got two: {folder} too")
        if exported.weights is not None:  # the same file is held once
            checksum = exported.manifest["sha256"][WEIGHTS_FILE]
            shared = weights.setdefault(checksum, exported.weights)
            exported = dataclasses.replace(exported, weights=shared)
        found[rate] = (folder, exported)
    rates = sorted(found, reverse=True)
    _check([found[rate] for rate in rates])
    return [(rate, found[rate][1]) for rate in rates]


def load(exports: Sequence[str], batch_sizes: Sequence[int] | None = None) -> list[Program]:
    """Reads, compiles and warms.

    Args:
      exports: see `read`.
      batch_sizes: of the programs; by default those that the first export has programs for, or
        `DEFAULT_SIZES`.

    Raises:
      InputError: see `read`.
    """
    found = read(exports)
    own = [batch for batch in found[0][1].programs if batch is not None]
    sizes = sorted(set(batch_sizes or own or DEFAULT_SIZES))
    if sizes[0] < 1:
        raise InputError(f"expected positive batch sizes; got {sizes}")
    return [_compiled(rate, exported, sizes) for rate, exported in found]


def _rate(told: str, folder: str, manifest: dict[str, Any]) -> float:
    """The keep rate that an export is served as."""
    if told:
        try:
            rate = float(told)
        except ValueError:
            rate = 0.0
        if not 0 < rate <= 1:
            raise InputError(f"{told}={folder}: expected a keep rate in (0, 1]; got {told}")
        return rate
    described = manifest["model"].get("reducer")
    if described is None:
        return 1.0
    schedule = getattr(make_reducer(**described), "schedule", None)
    if schedule is None or not schedule.by_rate or not isinstance(schedule.keep_rate, float | int):
        raise InputError(
            f"{folder}: its method {described} goes by no keep rate; expected <rate>={folder}"
        )
    return float(schedule.keep_rate)


def _check(exports: list[tuple[str, ExportedModel]]) -> None:
    """Raises InputError unless all are of one model, and less is computed at lower keep rates."""
    folder, first = exports[0]
    rank = len(first.manifest["output"]["shape"])
    if rank != 2:
        raise InputError(f"{folder}: expected a row of answers for an image; got rank {rank}")
    for before, (other, exported) in itertools.pairwise(exports):
        one, two = (
            {**{key: m.get(key) for key in _SHARED}, **m["model"], "reducer": None}
            for m in (first.manifest, exported.manifest)
        )
        differing = [key for key in sorted(one | two) if one.get(key) != two.get(key)]
        if differing:
            raise InputError(
                f"{folder} and {other} differ in {', '.join(differing)}; expected one model"
            )
        more, less = before[1].manifest["multiply_adds"], exported.manifest["multiply_adds"]
        if more <= less:
            raise InputError(
                f"{other}: expected fewer multiply-adds than {before[0]} at the higher keep rate; "
                f"got {less} and {more}"
            )


def _compiled(rate: float, exported: ExportedModel, sizes: Sequence[int]) -> Program:
    transform, settings = transform_of(exported.manifest)
    config = transform.config
    inside = exported.manifest["preprocessing"]
    weights = jax.device_put(exported.weights)
    compiled, seconds = {}, {}
    for size in sizes:
        program = exported.programs.get(size, exported.programs[None])

        def run(weights: Any, images: Any, program: Any = program) -> Any:
            if not inside:
                images = normalise(images, settings.mean, settings.std)
            arguments = [images] if weights is None else [weights, images]
            return program.call(*arguments).astype(jnp.float32)

        images = np.zeros((size, *config.image_size, config.channels), np.uint8)
        compiled[size] = jax.jit(run).lower(weights, images).compile()
        times = []
        for _ in range(3):
            began = time.perf_counter()
            np.asarray(compiled[size](weights, images))
            times.append(time.perf_counter() - began)
        seconds[size] = min(times)
    return Program(rate, exported.manifest, compiled, weights, seconds)
