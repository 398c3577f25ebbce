"""Rotary position embeddings: queries and keys turned by where their token stands.

Su et al., "RoFormer" (arXiv 2104.09864), for two axes as DINOv3 (arXiv 2508.10104) and EVA-02
(arXiv 2303.11331) have them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from tdm_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Rotary:
    """How a place in the image becomes angles. DINOv3's by default.

    A place (y, x) turns pair i of a head's k / 2 pairs by `y / temperature^(4 i / k)` for the first
    half of them and by x for the second.

    Attributes:
      temperature: of the slowest frequency.
      interleaved: whether neighbouring channels make a pair, or channel i and i + k / 2.
      reference_grid: places are counted in patches, as if each side had this many (EVA-02); None
        for a side from -1 to 1, times 2 pi, at the centres of the patches (DINOv3).
    """

    temperature: float = 100.0
    interleaved: bool = False
    reference_grid: int | None = None

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> "Rotary":
        """From what `describe` says.

        Raises:
          InputError: a name is unknown.
        """
        try:
            return cls(**description)
        except TypeError as error:
            raise InputError(f"rotary: got {dict(description)}: {error}") from error

    def describe(self) -> dict[str, Any]:
        """The same as JSON can hold it."""
        return dataclasses.asdict(self)

    def rotation(
        self, positions: Float[Array, "#b n 2"], grid: tuple[int, int], prefix: int, channels: int
    ) -> "Rotation":
        """The rotation of a sequence.

        Args:
          positions: row and column of each patch token, in patches, from 0.
          grid: rows and columns of the image.
          prefix: tokens at the front, which are not turned.
          channels: of a head; a multiple of 4.
        """
        sides = jnp.asarray(grid, jnp.float32)
        if self.reference_grid is None:
            place = 2 * jnp.pi * (2 * (positions + 0.5) / sides - 1)
        else:
            place = positions * (self.reference_grid / sides)
        frequency = self.temperature ** (-jnp.arange(channels // 4) / (channels / 4))
        angle = (place[..., None] * frequency).reshape(*positions.shape[:2], channels // 2)
        angle = jnp.pad(angle, ((0, 0), (prefix, 0), (0, 0)))
        twice = jnp.repeat(angle, 2, axis=-1) if self.interleaved else jnp.tile(angle, 2)
        return Rotation(jnp.cos(twice), jnp.sin(twice), self.interleaved)


@dataclasses.dataclass(frozen=True)
class Rotation:
    """Turns the channels of every head of a sequence, pair by pair.

    Attributes:
      cos: of the angle of each channel.
      sin: of the same.
      interleaved: see `Rotary`.
    """

    cos: Float[Array, "#b t k"]
    sin: Float[Array, "#b t k"]
    interleaved: bool

    def __call__(self, x: Float[Array, "b t h k"]) -> Float[Array, "b t h k"]:
        """The turned channels, computed in float32."""
        y = x.astype(jnp.float32)
        if self.interleaved:
            pairs = y.reshape(*y.shape[:-1], -1, 2)
            across = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(y.shape)
        else:
            first, second = jnp.split(y, 2, axis=-1)
            across = jnp.concatenate([-second, first], axis=-1)
        return (y * self.cos[:, :, None] + across * self.sin[:, :, None]).astype(x.dtype)
