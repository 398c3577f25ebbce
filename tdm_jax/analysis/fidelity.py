"""How true a reduced model stays to the unreduced one: on any images, without labels.

Of each image: whether both give the same answer; the cosine of what the head reads (`pooled`); and
the mean over patches of the cosine of their features, by `Info.patches`.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, PyTree

from tdm_jax.analysis.candidate import Candidate
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.ops.distances import unit
from tdm_jax.parallel import sharding


class Fidelity(NamedTuple):
    """Of each image."""

    agreement: Bool[np.ndarray, " n"] | None
    cosine: Float[np.ndarray, " n"]
    dense_cosine: Float[np.ndarray, " n"]

    def loss(self, dense_weight: float) -> float:
        """What is lost: one less the cosine, and the dense one's by its weight; means."""
        lost = (1 - self.cosine) + dense_weight * (1 - self.dense_cosine)
        return float(lost.mean())

    def columns(self) -> dict[str, float | None]:
        """For a `Result`: means, and half the widths of their 95% intervals over images."""
        agreed = None if self.agreement is None else 100.0 * self.agreement
        each = {
            "agreement_percent": agreed,
            "cosine": self.cosine,
            "dense_cosine": self.dense_cosine,
        }
        known = {name: value for name, value in each.items() if value is not None}
        means: dict[str, float | None] = {name: float(v.mean()) for name, v in known.items()}
        return means | {f"{name}_interval": interval(value) for name, value in known.items()}


def interval(values: Float[np.ndarray, " n"]) -> float | None:
    """Half the width of the 95% interval of a mean, by the normal approximation."""
    if len(values) < 2:
        return None
    return float(1.96 * values.std(ddof=1) / np.sqrt(len(values)))


class Reference:
    """What the unreduced model says to some images, to compare with."""

    def __init__(
        self,
        candidate: Candidate,
        images: Float[np.ndarray, "n h w c"],
        *,
        batch_size: int = 32,
        mesh: Mesh | None = None,
    ) -> None:
        """Runs the unreduced model.

        Args:
          candidate: whose model, with weights; its method does not matter.
          images: normalised.
          batch_size: images per call, rounded up to fill all devices.
          mesh: of the devices; None for all.
        """
        self._mesh = sharding.make_mesh(sharding.MeshConfig()) if mesh is None else mesh
        self._size = -(-min(batch_size, len(images)) // self._mesh.size) * self._mesh.size
        self._images = images
        plain = candidate.unreduced()
        self._answers = self._run(plain.model, plain.variables, len(images))

    def __len__(self) -> int:
        return len(self._images)

    def __call__(self, candidate: Candidate, count: int | None = None) -> Fidelity:
        """The fidelity of a model with a method, on the first `count` images (None for all)."""
        count = len(self) if count is None else min(count, len(self))
        answers = self._run(candidate.model, candidate.variables, count)
        own, pooled, dense = (np.asarray(x[:count]) for x in self._answers)
        agreement = None
        if candidate.model.num_classes:
            agreement = answers[0].argmax(axis=-1) == own.argmax(axis=-1)
        return Fidelity(agreement, cosine(answers[1], pooled), _dense(answers[2], dense))

    def _run(
        self, model: VisionTransformer, variables: PyTree, count: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        batch = sharding.batch_sharding(self._mesh)
        variables = jax.device_put(variables, sharding.state_shardings(self._mesh, variables))
        program = _program(model)
        parts: list[Sequence[np.ndarray]] = []
        for start in range(0, count, self._size):
            images = self._images[start : min(start + self._size, count)]
            filled = np.resize(images, (self._size, *images.shape[1:]))
            answers = program(variables, jax.device_put(filled, batch))
            parts.append([x[: len(images)] for x in jax.device_get(answers)])
        out, pooled, dense = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return out, pooled, dense


@functools.lru_cache(maxsize=2)  # a search comes by hundreds of models
def _program(model: VisionTransformer) -> Any:
    def answers(
        variables: PyTree, images: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b k"], Float[Array, "b d"], Float[Array, "b p d"]]:
        answer: Any = model.apply(variables, images, return_info=True)
        out, info = answer
        dense = info.patches.astype(jnp.float32)
        # Half precision is exact enough for a cosine, and these are what fills the memory.
        return out, info.pooled.astype(jnp.float32), unit(dense).astype(jnp.float16)

    return jax.jit(answers)


def cosine(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    """Of each row of x with its row of y."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    return (x * y).sum(axis=-1) / np.maximum(norms, 1e-30)


def _dense(x: Float[np.ndarray, "n p d"], y: Float[np.ndarray, "n p d"]) -> np.ndarray:
    each = [(a.astype(np.float32) * b).sum(axis=-1).mean() for a, b in zip(x, y, strict=True)]
    return np.asarray(each, np.float64)
