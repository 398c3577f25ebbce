"""Features of patches as colours: three principal components as red, green and blue.

Directions and scale are those of the unreduced model's features of an image, so one colour means
the same feature in all pictures of that image, whichever method they are of.

Of a reduced model these are the features that dense use reads, `Info.patches`: each patch its
token's value with the details that merging took from it, a dropped one what it was when it was
dropped. (`unmerge` without the details paints every group in one colour. That shows which patches
went together, as pictures of tokens do, and is further from the unreduced model: of five photos in
DINOv2-S at 448 pixels, `tdm/preset=frozen` at keep rate 0.5, a mean cosine of 0.963 and not 0.974.)
"""

import dataclasses

import numpy as np
from jaxtyping import Float, UInt8

from tdm_jax.errors import InputError

# A hundredth of the patches may lie beyond either end of the scale: an outlier spoils no picture.
_PERCENTILES = (1, 99)
_DARKEST = 30  # black would hide what differs


@dataclasses.dataclass(frozen=True)
class PrincipalColors:
    """Colours of the patch features of one image.

    Attributes:
      grid: rows and columns of patches.
      mean: of the features.
      components: the three directions in which they differ most, unit vectors.
      low, high: projections that are darkest and brightest.
    """

    grid: tuple[int, int]
    mean: Float[np.ndarray, "d"]
    components: Float[np.ndarray, "3 d"]
    low: Float[np.ndarray, "3"]
    high: Float[np.ndarray, "3"]

    @classmethod
    def fit(cls, features: Float[np.ndarray, "p d"], grid: tuple[int, int]) -> "PrincipalColors":
        """Of the unreduced model's features, row by row.

        The sign of a component is free: what stands out in the middle of the image is bright.

        Raises:
          InputError: there is not one for each patch, there are less than three patches or
            channels, or some are not finite.
        """
        rows, cols = grid
        if len(features) != rows * cols or min(features.shape) < 3:
            raise InputError(
                f"features of {rows} x {cols} patches: expected [{rows * cols}, width], three of "
                f"each at least; got {list(features.shape)}"
            )
        if not np.isfinite(features).all():
            raise InputError("features: expected finite numbers; got some that are not")
        mean = features.mean(axis=0, dtype=np.float64)
        components = np.linalg.svd(features - mean, full_matrices=False)[2][:3]
        projected = (features - mean) @ components.T
        middle = projected.reshape(rows, cols, 3)
        middle = middle[rows // 4 : rows - rows // 4, cols // 4 : cols - cols // 4]
        sign = np.where((middle * np.abs(middle)).sum(axis=(0, 1)) < 0, -1.0, 1.0)
        low, high = np.percentile(sign * projected, _PERCENTILES, axis=0)
        return cls(grid, mean, sign[:, None] * components, low, high)

    def __call__(self, features: Float[np.ndarray, "p d"]) -> UInt8[np.ndarray, "rows cols 3"]:
        """The colours of a model's features, one pixel for a patch.

        Raises:
          InputError: they are of other patches or channels.
        """
        expected = self.grid[0] * self.grid[1], len(self.mean)
        if features.shape != expected:
            raise InputError(f"features: expected {list(expected)}; got {list(features.shape)}")
        scale = np.maximum(self.high - self.low, np.finfo(np.float32).tiny)
        share = ((features - self.mean) @ self.components.T - self.low) / scale
        colors = _DARKEST + (255 - _DARKEST) * np.clip(share, 0, 1)
        return np.round(colors).astype(np.uint8).reshape(*self.grid, 3)
