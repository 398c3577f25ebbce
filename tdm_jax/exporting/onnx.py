"""A model as an ONNX program by jax2onnx, for ONNX Runtime and what else reads it.

It is traced in the plain form of every operation (`ops.platform.pinned`) and handed to the
converter in the operations that it knows (`plain_operations`). The extra `onnx` is imported where
it is needed and nowhere else.
"""

import contextlib
import importlib
import importlib.metadata
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, PyTree

from tdm_jax.analysis import timing
from tdm_jax.errors import InputError, summary
from tdm_jax.exporting import plain_operations
from tdm_jax.exporting.stablehlo import Options, Program
from tdm_jax.models.folding import fold
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.ops.platform import REFERENCE, pinned

OPSET = 21
PROGRAM = "model.onnx"
PACKAGES = ("jax2onnx", "onnx", "onnxruntime")
INPUT, OUTPUT = "images", "answers"
# A file of protocol buffers ends at 2 GiB; 64 MiB of them are left to the graph.
_LARGEST = (2 << 30) - (64 << 20)
# Weights below so many bytes, sizes of arrays for the most part, stay in the program.
_SMALL = 1024


def require(*packages: str) -> list[Any]:
    """The packages of the extra `onnx`.

    Raises:
      InputError: one is not installed.
    """
    try:
        with _quiet():
            return [importlib.import_module(name) for name in packages]
    except ImportError as error:
        raise InputError(
            f"ONNX needs {', '.join(packages)}: {error}; expected pip install 'tdm_jax[onnx]'"
        ) from error


def versions() -> dict[str, str]:
    """Of the packages that make an ONNX program."""
    return {name: importlib.metadata.version(name) for name in ("jax2onnx", "onnx")}


def convert(program: Program) -> Any:
    """The ONNX program for a batch of any size.

    Returns:
      An `onnx_ir.Model` of standard operators alone.

    Raises:
      InputError: the extra is not installed, or the converter cannot do what the model does.
    """
    (converter,) = require("jax2onnx")
    images = program.images()
    with pinned(REFERENCE):
        traced = jax.make_jaxpr(lambda images: program(program.weights, images))(images)
    try:
        with _quiet():
            model = converter.to_onnx(
                lambda images: plain_operations.run(traced, images)[0],
                [images],
                opset=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                return_mode="ir",
            )
    except InputError as error:
        raise InputError(f"no ONNX program of this model: {error}") from error
    except Exception as error:  # each operation fails in its own way
        raise InputError(f"no ONNX program of this model: jax2onnx: {summary(error)}") from error
    if program.options.weights == "inside" and _weight_bytes(model) > _LARGEST:
        raise InputError("an ONNX file holds 2 GiB at most: expected weights beside; got inside")
    return model


def write(model: Any, path: Path, weights: str) -> None:
    """Writes what `convert` returned, and checks that it is valid ONNX.

    Args:
      model: the program.
      path: of the file.
      weights: "inside" it, or "beside" it, in the file of the same name and `.data`.
    """
    onnx, onnx_ir = require("onnx", "onnx_ir")
    beside = {"external_data": f"{path.name}.data", "size_threshold_bytes": _SMALL}
    with _quiet():
        onnx_ir.save(model, path, **(beside if weights == "beside" else {}))
    onnx.checker.check_model(str(path), full_check=True)


class Session:
    """An ONNX program in ONNX Runtime, on the CPU."""

    def __init__(self, path: Path) -> None:
        """Reads the program.

        Raises:
          InputError: ONNX Runtime is not installed, or does not read it.
        """
        (runtime,) = require("onnxruntime")
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # errors
        try:
            self._session = runtime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its exceptions have no common type
            raise InputError(f"{path}: ONNX Runtime: {summary(error)}") from error

    def call(
        self, images: Num[np.ndarray, "b h w c"] | Num[Array, "b h w c"]
    ) -> Float[Array, "b d"]:
        """The program's answers."""
        (answers,) = self._session.run([OUTPUT], {INPUT: np.asarray(images)})
        return jnp.asarray(answers)


def compile_forward(model: VisionTransformer, variables: PyTree, batch_size: int) -> timing.Program:
    """As `timing.compile_forward`, for ONNX Runtime on the CPU, by the program for any batch.

    Raises:
      InputError: as `convert`, or the model is not float32's.
    """
    options = Options(formats=("onnx",), dtype=jnp.dtype(model.dtype).name)
    program = Program(*fold(model, variables), options)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PROGRAM
        write(convert(program), path, options.weights)
        session = Session(path)
    shape = (batch_size, *model.image_size, model.in_channels)
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    seconds = time.perf_counter() - start
    return timing.Program(lambda: session.call(images), batch_size, seconds, None)


def _weight_bytes(model: Any) -> int:
    constants = (value.const_value for value in model.graph.initializers.values())
    return sum(constant.nbytes for constant in constants if constant is not None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the converter says of its own code and of values whose type nobody needs."""
    loggers = [logging.getLogger(name) for name in ("jax2onnx", "onnx_ir")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
