"""How the images of a model are prepared: what a model carries, and nothing of how it is done."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tdm_jax.errors import InputError, unknown

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """From a photograph to a model's input: resize, crop the centre, normalise. DeiT's by default.

    The size in pixels is the model's own.

    Attributes:
      mean: per channel, of images scaled to [0, 1].
      std: per channel, of images scaled to [0, 1].
      crop_pct: images are resized to the model's size over this share, then the centre is cut out.
      interpolation: of the resize, one of `INTERPOLATIONS`; always antialiased.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop_pct: float = 0.875
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        if len(self.mean) != len(self.std) or not self.mean or min(self.std) <= 0:
            raise InputError(
                "preprocessing: expected a mean and a positive std for each channel; got "
                f"mean={self.mean}, std={self.std}"
            )
        if not 0 < self.crop_pct <= 1:
            raise InputError(f"preprocessing: crop_pct must be in (0, 1]; got {self.crop_pct}")
        if self.interpolation not in INTERPOLATIONS:
            raise unknown("interpolation", self.interpolation, INTERPOLATIONS)

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> "Preprocessing":
        """From what `describe` says, or as much of it as is known.

        Raises:
          InputError: a name is unknown, or a value of another type or out of range.
        """
        try:
            lists = {
                k: tuple(map(float, v)) for k, v in description.items() if k in ("mean", "std")
            }
            return cls(**{**description, **lists})
        except InputError:
            raise
        except (TypeError, ValueError) as error:
            raise InputError(f"preprocessing: got {dict(description)}: {error}") from error

    def describe(self) -> dict[str, Any]:
        """The same as JSON can hold it: `Preprocessing(**description)` builds it again."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }
