"""The folder that an export is: programs, perhaps weights, and a manifest that says what they are.

It is checked on images before it gets its name, and its files by their checksums before they are
run. What is read is StableHLO, ONNX and safetensors; nothing is unpickled.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import export
from jaxtyping import Array, Float, Num, PyTree
from safetensors.numpy import load_file

from tdm_jax.analysis import costs
from tdm_jax.checkpoint import describe
from tdm_jax.errors import InputError, unknown
from tdm_jax.exporting import onnx
from tdm_jax.exporting.stablehlo import WEIGHTS_FILE, Options, Program
from tdm_jax.files import read_json, replacing_folder
from tdm_jax.models.folding import fold
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.version import __version__

FORMAT = "tdm_jax.export"
MANIFEST = "manifest.json"
# Of the largest answer: a program differs from the model by the order of its sums at the most, and
# in another runtime by its exponentials.
TOLERANCE = {"stablehlo": 1e-5, "onnx": 1e-4}


@dataclasses.dataclass(frozen=True)
class ExportedModel:
    """An export, ready to run.

    Attributes:
      manifest: what it says of itself.
      programs: of one format, each a `jax.export.Exported` or an `onnx.Session`, by the batch they
        take; None for any.
      weights: that come first among their arguments; None where they are inside.
    """

    manifest: dict[str, Any]
    programs: dict[int | None, Any]
    weights: dict[str, Array] | None

    def __call__(self, images: Num[np.ndarray, "b h w c"] | Num[Array, "b h w c"]) -> Array:
        """The model's answers to a batch, by the program of its size or the one for all.

        Args:
          images: as `manifest["input"]` says.

        Returns:
          Logits [b, classes] in float32, or features of a model without a head.

        Raises:
          InputError: the images are of another type or shape.
        """
        expected = self.manifest["input"]
        fits = len(images.shape) == len(expected["shape"]) and all(
            not side.isdigit() or int(side) == got
            for got, side in zip(images.shape, expected["shape"], strict=True)
        )
        if str(images.dtype) != expected["dtype"] or not fits:
            raise InputError(
                f"expected images {expected['dtype']}[{', '.join(expected['shape'])}]; "
                f"got {images.dtype}{list(images.shape)}"
            )
        program = self.programs.get(images.shape[0], self.programs[None])
        return program.call(*([] if self.weights is None else [self.weights]), images)


def export_model(
    path: str | PathLike[str],
    model: VisionTransformer,
    variables: PyTree,
    options: Options | None = None,
    *,
    labels: list[str] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes a model as a folder of programs that run without this library.

    Args:
      path: of the folder.
      model: with its reducer, which must keep static shapes, as all methods do.
      variables: what `model.init` returned.
      options: by default one float32 StableHLO program for CPUs, NVIDIA's GPUs and TPUs, weights
        inside.
      labels: names of the classes, for the manifest.
      overwrite: replace an export that exists, once the new one is complete.

    Returns:
      The manifest.

    Raises:
      InputError: the folder exists, the options do not fit the model, or it cannot be said in a
        format.
    """
    options = options or Options()
    options.check(model)
    versions = {"jax": jax.__version__, "tdm_jax": __version__}
    if "onnx" in options.formats:
        onnx.require(*onnx.PACKAGES)
        versions |= onnx.versions()
    if labels is not None and len(labels) != model.num_classes:
        raise InputError(f"expected {model.num_classes} labels; got {len(labels)}")
    cost = costs.count(model)
    program = Program(*fold(model, variables), options)
    takes, gives = program.images(), program.answers()
    # Before anything is written: not every model can be said in ONNX.
    converted = onnx.convert(program) if "onnx" in options.formats else None
    programs: dict[str, dict[str, int | None]] = {}
    with replacing_folder(Path(path), overwrite=overwrite, ours=is_export) as folder:
        if "stablehlo" in options.formats:
            programs["stablehlo"] = program.write(folder)
        if converted is not None:
            onnx.write(converted, folder / onnx.PROGRAM, options.weights)
            programs["onnx"] = {onnx.PROGRAM: None}
        manifest = {
            "format": FORMAT,
            "model": describe(model),
            "tokens": [model.shape.patches, *cost.tokens],
            "multiply_adds": cost.macs,
            "parameters": cost.parameters,
            "labels": labels,
            **dataclasses.asdict(options),
            "programs": programs,
            "input": {"shape": [str(side) for side in takes.shape], "dtype": str(takes.dtype)},
            "output": {"shape": ["b", *gives.shape[1:]], "dtype": str(gives.dtype)},
            **({} if converted is None else {"opset": onnx.OPSET}),
            "versions": versions,
            "sha256": {file.name: _checksum(file) for file in sorted(folder.iterdir())},
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2))
        for name in options.formats:
            _check(load_exported(folder, name), program, TOLERANCE[name])
    return manifest


def is_export(path: Path) -> bool:
    """Whether this is a folder that `export_model` wrote, with nothing else in it."""
    try:
        manifest = read_json(epath.Path(path / MANIFEST))
        names = {file.name for file in path.iterdir()}
    except (InputError, OSError):
        return False
    return manifest.get("format") == FORMAT and names <= {MANIFEST, *manifest.get("sha256", {})}


def load_exported(path: str | PathLike[str], format: str | None = None) -> ExportedModel:
    """Reads what `export_model`, or `python -m tdm_jax.export`, wrote.

    Args:
      path: of the folder.
      format: of the programs, of `stablehlo.FORMATS`; by default the first that it has.

    Raises:
      InputError: it is no export, has no such programs, a file of it is missing or not the one that
        was written, or this JAX, or ONNX Runtime, does not read it.
    """
    folder = Path(path)
    manifest = read_json(epath.Path(folder / MANIFEST))
    if manifest.get("format") != FORMAT:
        raise InputError(f"{folder}: expected format {FORMAT}; got {manifest.get('format')!r}")
    needed = {"sha256", "formats", "programs", "weights", "input", "output"}
    if missing := needed - manifest.keys():
        raise InputError(f"{folder / MANIFEST}: expected {', '.join(sorted(missing))} in it")
    readers: dict[str, Callable[[Path], Any]]
    readers = {"stablehlo": _read_stablehlo, "onnx": onnx.Session}
    known = readers.keys() & manifest["programs"].keys()
    if (format := format or manifest["formats"][0]) not in known:
        raise unknown("format", format, known)
    for name, expected in manifest["sha256"].items():
        if not (folder / name).is_file() or _checksum(folder / name) != expected:
            raise InputError(f"{folder / name}: missing, or not the file that was exported")
    programs = {
        batch: readers[format](folder / name)
        for name, batch in manifest["programs"][format].items()
    }
    weights = None
    if manifest["weights"] == "beside" and format == "stablehlo":
        weights = {name: jnp.asarray(x) for name, x in load_file(folder / WEIGHTS_FILE).items()}
    return ExportedModel(manifest, programs, weights)


def _read_stablehlo(path: Path) -> export.Exported:
    try:
        return export.deserialize(bytearray(path.read_bytes()))
    except ValueError as error:
        raise InputError(f"{path}: JAX {jax.__version__}: {error}") from error


def _check(exported: ExportedModel, program: Program, tolerance: float) -> None:
    """Raises RuntimeError unless every program answers as the model does."""
    for batch in exported.programs:
        images = _images(program, batch or 2)
        expected: Any = jax.jit(program)(program.weights, images)
        off = float(jnp.abs(exported(images) - expected).max())
        if not off <= tolerance * max(1.0, float(jnp.abs(expected).max())):
            raise RuntimeError(f"the program for batch {batch} is off by {off}: nothing is written")


def _images(program: Program, batch: int) -> Float[np.ndarray, "b h w c"] | Any:
    """Noise that a program takes."""
    wanted = program.images()
    shape = [side if isinstance(side, int) else 70 for side in wanted.shape[1:]]
    draw = np.random.default_rng(0)
    if wanted.dtype == jnp.uint8:
        return draw.integers(0, 256, (batch, *shape), np.uint8)
    return draw.standard_normal((batch, *shape), np.float32)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
