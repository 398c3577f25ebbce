"""A model as a StableHLO program by `jax.export`, for several platforms and any batch.

JAX promises that a program is read by its releases of the next six months, and of the three weeks
before (docs.jax.dev, "Exporting and serializing", compatibility guarantees).
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import export
from jaxtyping import Array, PyTree
from safetensors.numpy import save_file

from tdm_jax.errors import InputError, unknown
from tdm_jax.exporting.preparation import prepare
from tdm_jax.files import replacing
from tdm_jax.models.casting import cast_weights
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.ops.platform import portable

FORMATS = ("stablehlo", "onnx")
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
WEIGHTS = ("inside", "beside")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
ANY, WEIGHTS_FILE = "model.stablehlo", "weights.safetensors"


@dataclasses.dataclass(frozen=True)
class Options:
    """What an export is to be.

    Attributes:
      formats: of its programs, of `FORMATS`.
      platforms: that one StableHLO program serves, of `PLATFORMS`.
      batch_sizes: further StableHLO programs for batches of one size each, which compile to
        faster code on some platforms and cannot be compiled by surprise.
      preprocessing: whether the program takes decoded images, uint8 of any size, instead of
        normalised ones of the model's.
      weights: "inside" the program, or "beside" it, as a file and a StableHLO program's first
        argument.
      dtype: of the computation, and of the weights that take part in products.
    """

    formats: tuple[str, ...] = ("stablehlo",)
    platforms: tuple[str, ...] = ("cpu", "cuda", "tpu")
    batch_sizes: tuple[int, ...] = ()
    preprocessing: bool = False
    weights: str = "inside"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not self.formats:
            raise InputError(f"expected formats of {', '.join(FORMATS)}; got none")
        for name in self.formats:
            if name not in FORMATS:
                raise unknown("format", name, FORMATS)
        if not self.platforms:
            raise InputError(f"expected platforms of {', '.join(PLATFORMS)}; got none")
        for name in self.platforms:
            if name not in PLATFORMS:
                raise unknown("platform", name, PLATFORMS)
        for size in self.batch_sizes:
            if size < 1:
                raise InputError(f"expected positive batch sizes; got {size}")
        if self.weights not in WEIGHTS:
            raise unknown("place of weights", self.weights, WEIGHTS)
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if "onnx" in self.formats and self.dtype != "float32":
            raise InputError(
                f"ONNX Runtime multiplies float32 on CPUs: expected it for ONNX; got {self.dtype}"
            )
        if self.batch_sizes and "stablehlo" not in self.formats:
            raise InputError(
                "ONNX Runtime compiles nothing: expected batch sizes for StableHLO alone"
            )

    def check(self, model: VisionTransformer) -> None:
        """Raises InputError if a model cannot be exported like this."""
        if self.preprocessing and model.preprocessing is None:
            raise InputError(
                "the model does not say how its images are prepared: expected a checkpoint that "
                "does, or an export without preprocessing"
            )


class Program:
    """The function that is exported, and its weights."""

    def __init__(self, model: VisionTransformer, variables: PyTree, options: Options) -> None:
        """Takes a model and its variables, which are rounded where the options say so."""
        options.check(model)
        self.options = options
        self._model = model.clone(dtype=DTYPES[options.dtype])
        stored = cast_weights(variables, self._model.dtype)
        self.weights = traverse_util.flatten_dict(stored, sep="/")

    def __call__(self, weights: dict[str, Array], images: Array) -> Array:
        """The model's answers."""
        model, settings = self._model, self._model.preprocessing
        if self.options.preprocessing and settings is not None:
            images = prepare(images, model.image_size, settings)
        return model.apply(traverse_util.unflatten_dict(weights, sep="/"), images)  # type: ignore[return-value]

    def images(self, batch: int | None = None) -> jax.ShapeDtypeStruct:
        """What it takes; without a size, of any batch."""
        side = "h, w" if self.options.preprocessing else "{}, {}".format(*self._model.image_size)
        shape = f"{'b' if batch is None else batch}, {side}, {self._model.in_channels}"
        dtype = jnp.uint8 if self.options.preprocessing else jnp.float32
        return jax.ShapeDtypeStruct(export.symbolic_shape(shape), dtype)

    def exported(self, batch: int | None = None) -> export.Exported:
        """The program for batches of one size, or of any."""
        inside = self.options.weights == "inside"
        arguments = [self.images(batch)] if inside else [self.weights, self.images(batch)]
        function = (lambda images: self(self.weights, images)) if inside else self
        # A layout that the TPU compiler is asked for decides no number.
        allowed = [export.DisabledSafetyCheck.custom_call("LayoutConstraint")]
        with portable():
            return export.export(
                jax.jit(function), platforms=self.options.platforms, disabled_checks=allowed
            )(*arguments)

    def answers(self) -> jax.ShapeDtypeStruct:
        """What it gives."""
        return jax.eval_shape(self, self.weights, self.images())

    def write(self, folder: Path) -> dict[str, int | None]:
        """Writes the StableHLO programs, and the weights where they stand beside, into a folder.

        Returns:
          Each program's batch size by its file, None for any.
        """
        programs = {ANY: None} | {f"model_batch{n}.stablehlo": n for n in self.options.batch_sizes}
        for name, batch in programs.items():
            (folder / name).write_bytes(self.exported(batch).serialize())
        if self.options.weights == "beside":
            with replacing(folder / WEIGHTS_FILE) as beside:
                save_file({k: np.asarray(x) for k, x in self.weights.items()}, beside)
        return programs
