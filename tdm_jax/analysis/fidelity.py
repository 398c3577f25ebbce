"""How true a reduced model stays to the unreduced one: on any images, without labels.

Of each image: whether both give the same answer; cosine and relative error of what the head reads,
the class token, the mean of the patches or what a pooling head made of them; and the means over
patches of the cosine and the relative error of their features, by `Info.patches`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, UInt8

from tdm_jax.analysis import statistics
from tdm_jax.analysis.answers import Answers, Forward
from tdm_jax.analysis.candidate import Candidate
from tdm_jax.data import DataConfig
from tdm_jax.models.info import unmerge
from tdm_jax.models.vit import VisionTransformer

# What is remembered of the unreduced model's patches, in bytes; beyond it they are computed again.
_REMEMBERED = 2**30


class Fidelity(NamedTuple):
    """Of each image.

    `agreement` is 1 where both give the same answer; None for a model without a head to answer.
    """

    agreement: Float[np.ndarray, " n"] | None
    cosine: Float[np.ndarray, " n"]
    error: Float[np.ndarray, " n"]
    dense_cosine: Float[np.ndarray, " n"]
    dense_error: Float[np.ndarray, " n"]

    def loss(self, dense_weight: float) -> float:
        """What is lost: one less the cosine, and the dense one's by its weight; means."""
        lost = (1 - self.cosine) + dense_weight * (1 - self.dense_cosine)
        return float(lost.mean())

    def columns(self) -> dict[str, Any]:
        """For a `Result`: means with their 95% intervals over images."""
        found: dict[str, Any] = {}
        if self.agreement is not None:
            found["agreement_percent"] = 100 * float(self.agreement.mean())
            found["agreement_percent_interval"] = statistics.of_share(self.agreement)
        for name in ("cosine", "error", "dense_cosine", "dense_error"):
            found[name] = float(getattr(self, name).mean())
            found[f"{name}_interval"] = statistics.half_width(getattr(self, name))
        return found


class Kept(NamedTuple):
    """What there is to compare with, of a batch. Half precision is exact enough for a cosine."""

    answer: Array
    pooled: Float[Array, "b d"]
    patches: Float[Array, "b p d"]


class Reference:
    """What the unreduced model says to batches, remembered as far as there is room."""

    def __init__(self, forward: Forward, model: VisionTransformer, variables: PyTree) -> None:
        """Of a model.

        Args:
          forward: runs it.
          model: with a head, or without one.
          variables: as `forward.place` gave them.
        """
        self.model, self.variables = model, variables
        self._forward = forward
        self._kept: dict[int, Kept] = {}
        self._room = _REMEMBERED

    def __call__(
        self,
        index: int,
        images: UInt8[np.ndarray, "b h w c"] | UInt8[Array, "b h w c"],
        answers: Answers | None = None,
    ) -> Kept:
        """Of the batch of that index.

        Args:
          index: of the batch.
          images: of the batch, as `Forward` takes them.
          answers: of the unreduced model to them, where they are known.
        """
        if index in self._kept:
            return self._kept[index]
        answers = answers or self._forward(self.model, self.variables, images)
        kept = _keep(answers)
        size = sum(leaf.nbytes for leaf in kept)
        if size <= self._room:
            self._room -= size
            self._kept[index] = jax.device_get(kept)
        return kept

    def compare(
        self,
        index: int,
        images: UInt8[np.ndarray, "b h w c"] | UInt8[Array, "b h w c"],
        answers: Answers,
    ) -> Any:
        """The fidelity of some model's answers to a batch, still on the devices."""
        found = _compare(answers, self(index, images))
        return found if self.model.num_classes else found._replace(agreement=None)


@jax.jit
def _keep(answers: Answers) -> Kept:
    answer = answers.logits.argmax(axis=-1)
    return Kept(answer, answers.pooled, answers.patches.astype(jnp.float16))


@jax.jit
def _compare(answers: Answers, kept: Kept) -> Any:
    agreement = (answers.logits.argmax(axis=-1) == kept.answer).astype(jnp.float32)
    dense = (_alike(answers.patches, kept.patches), _error(answers.patches, kept.patches))
    cosine, error = _alike(answers.pooled, kept.pooled), _error(answers.pooled, kept.pooled)
    of_patches = (each.mean(axis=-1) for each in dense)
    return Fidelity(agreement, cosine, error, *of_patches)  # type: ignore[arg-type]


def _alike(x: Float[Array, "*b d"], y: Float[Array, "*b d"]) -> Float[Array, "*b"]:
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return (x * y).sum(axis=-1) / jnp.maximum(norms, 1e-30)


def mean_cosine(x: Float[np.ndarray, "p d"], y: Float[np.ndarray, "p d"]) -> float:
    """The mean over patches of the cosine of two features."""
    return float(_alike(jnp.asarray(x), jnp.asarray(y)).mean())


def _error(x: Float[Array, "*b d"], y: Float[Array, "*b d"]) -> Float[Array, "*b"]:
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    norm = jnp.linalg.norm(y, axis=-1)
    return jnp.linalg.norm(x - y, axis=-1) / jnp.maximum(norm, 1e-30)


def block_fidelity(
    pair: tuple[VisionTransformer, VisionTransformer],
    variables: tuple[PyTree, PyTree],
    images: Float[Array, "b h w c"],
) -> tuple[Float[Array, "b depth"], Float[Array, "b depth"]]:
    """How true a model stays to another behind each block.

    Args:
      pair: the model with its method, and the unreduced one.
      variables: of each.
      images: normalised.

    Returns:
      The cosine of the first prefix token, the class token where there is one (1 where there is no
      prefix), and the mean over patches of the cosine of their tokens.
    """
    sequences = []
    for model, own in zip(pair, variables, strict=True):
        output: Any = model.apply(
            own, images, return_info=True, intermediates=tuple(range(model.depth))
        )
        info = output[1]
        patches = jnp.stack([unmerge(info, block) for block in info.intermediates], axis=1)
        prefix = jnp.stack([block.features[:, :1] for block in info.intermediates], axis=1)
        sequences.append((prefix if info.prefix else jnp.ones_like(prefix), patches))
    first, dense = (_alike(x, y).mean(axis=-1) for x, y in zip(*sequences, strict=True))
    return first, dense


class Photographs:
    """Images in memory, on which candidates of one transformer are compared with it unreduced."""

    def __init__(
        self,
        candidate: Candidate,
        pixels: UInt8[np.ndarray, "n h w c"],
        config: DataConfig,
        batch_size: int = 32,
    ) -> None:
        """Of images as the model takes them, before normalisation.

        Args:
          candidate: whose model, with weights; its method does not matter.
          pixels: of the images.
          config: says how they are normalised.
          batch_size: images per call.
        """
        self._pixels = pixels
        self._forward = Forward(config, min(batch_size, len(pixels)))
        plain = candidate.unreduced()
        self._reference = Reference(
            self._forward, plain.model, self._forward.place(plain.variables)
        )

    def __len__(self) -> int:
        return len(self._pixels)

    def __call__(self, candidate: Candidate, count: int | None = None) -> Fidelity:
        """The fidelity of a candidate on the first `count` images; None for all."""
        count = len(self) if count is None else min(count, len(self))
        size, parts = self._forward.batch_size, []
        variables = self._forward.place(candidate.variables)
        for index, start in enumerate(range(0, count, size)):
            images = self._pixels[start : start + size]
            answers = self._forward(candidate.model, variables, images)
            found = jax.device_get(self._reference.compare(index, images, answers))
            real = min(len(images), count - start)
            parts.append(jax.tree.map(lambda array, real=real: array[:real], found))
        return join(parts)


def join(parts: Sequence[Fidelity]) -> Fidelity:
    """One after the other."""
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
