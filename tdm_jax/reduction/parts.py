"""What a method is made of: small frozen values, one for each axis of the space of methods.

`composed.Composed` puts them together, `axes` has those that there are by name.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Array, Float

from tdm_jax.reduction.contract import ViTShape, Weights, require

# One number for each patch token.
Scores = Float[Array, "b n"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A choice on one axis, with its settings."""

    # Whether it has weights that must be trained or loaded.
    learned: ClassVar[bool] = False

    def validate(self, title: str) -> None:
        """Raises InputError, in the name of a method, unless every setting is in range."""

    def check(self, title: str, stages: tuple[int, ...], shape: ViTShape) -> None:
        """Raises InputError if the part does not fit a transformer with stages at these blocks."""

    def init(self, key: Array, shape: ViTShape) -> Weights:
        """Fresh weights of one stage."""
        raise NotImplementedError

    def import_weights(self, owner: Any, arrays: dict[str, np.ndarray]) -> Weights:
        """The weights of all stages of a method from arrays with their original names."""
        raise NotImplementedError

    def demand(self, title: str, setting: str, valid: bool, expected: str) -> None:
        """Raises InputError, with what a setting must be and what it is, unless `valid`."""
        require(self, setting, valid, expected, title)


def linear(key: Array, inputs: int, outputs: int) -> Weights:
    """Fresh weights of a linear map."""
    kernel = jax.nn.initializers.lecun_normal()(key, (inputs, outputs))
    return {"kernel": kernel, "bias": jax.numpy.zeros(outputs)}
