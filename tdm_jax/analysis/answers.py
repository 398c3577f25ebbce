"""What models answer to batches of images: one program each, on all devices."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree, UInt8

from tdm_jax.data import DataConfig
from tdm_jax.data.device_transforms import normalise
from tdm_jax.models.info import Stage
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.ops.platform import split_over
from tdm_jax.parallel import sharding


class Answers(NamedTuple):
    """To a batch.

    Attributes:
      logits: what the model says; of one without a head the pooled feature.
      pooled: what its head reads.
      patches: each patch's feature, see `Info.patches`.
      stages: what became of the patches.
    """

    logits: Float[Array, "b k"]
    pooled: Float[Array, "b d"]
    patches: Float[Array, "b p d"]
    stages: tuple[Stage, ...]


class Forward:
    """Runs models on images that are prepared in one way."""

    def __init__(self, config: DataConfig, batch_size: int, mesh: Mesh | None = None) -> None:
        """Says how images are normalised and where they go.

        Args:
          config: how images are prepared.
          batch_size: images per call, rounded up to fill all devices.
          mesh: of the devices; None for all.
        """
        self._mesh = sharding.make_mesh(sharding.MeshConfig()) if mesh is None else mesh
        self._normalisation = config.mean, config.std
        self.batch_size = -(-batch_size // self._mesh.size) * self._mesh.size

    def place(self, variables: PyTree) -> PyTree:
        """A copy of a model's variables on every device."""
        return jax.device_put(variables, sharding.replicated(self._mesh))

    def send(self, images: UInt8[np.ndarray, "b h w c"]) -> UInt8[Array, "batch h w c"]:
        """Images before normalisation, at most a batch, filled up and under way to the devices."""
        if len(images) < self.batch_size:
            images = np.resize(images, (self.batch_size, *images.shape[1:]))
        return jax.device_put(images, sharding.batch_sharding(self._mesh))

    def __call__(
        self,
        model: VisionTransformer,
        variables: PyTree,
        images: UInt8[np.ndarray, "b h w c"] | UInt8[Array, "b h w c"],
        seed: int | None = None,
    ) -> Answers:
        """The answers, still on the devices; those beyond the images are to fill the batch.

        Args:
          model: of what `place` gave.
          variables: of the model.
          images: before normalisation, at most a batch; or what `send` gave.
          seed: of what a method draws; None for its own.
        """
        placed = images if isinstance(images, jax.Array) else self.send(images)
        key = None if seed is None or not model.reducer.draws else jax.random.key(seed)
        with split_over(self._mesh):
            return _program(model, self._normalisation)(variables, placed, key)


@functools.lru_cache(maxsize=4)  # a search or a sweep comes by hundreds of models
def _program(model: VisionTransformer, normalisation: tuple[Any, Any]) -> Any:
    def answers(variables: PyTree, images: UInt8[Array, "b h w c"], key: Any) -> Answers:
        x = normalise(images, *normalisation)
        rngs = {} if key is None else {"reducer": key}
        output: Any = model.apply(variables, x, return_info=True, rngs=rngs)
        logits, info = output
        pooled, patches = info.pooled.astype(jnp.float32), info.patches.astype(jnp.float32)
        return Answers(logits, pooled, patches, info.stages)

    return jax.jit(answers)
