"""Position embeddings for another grid of patches, as each family's own program resamples them.

All are what PyTorch's `interpolate` does with `align_corners=False`: a sample stands in the middle
of its pixel. Without antialiasing the kernel keeps its width and a tap outside the grid reads the
border; with it the kernel widens as the grid shrinks and the taps outside are left out.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float


def _linear(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0)


def _cubic(a: float) -> Callable[[np.ndarray], np.ndarray]:
    """Keys, "Cubic convolution interpolation for digital image processing", 1981; his a is -0.5."""

    def kernel(x: np.ndarray) -> np.ndarray:
        x = np.abs(x)
        near = ((a + 2) * x - (a + 3)) * x**2 + 1
        far = (((x - 5) * x + 8) * x - 4) * a
        return np.where(x <= 1, near, np.where(x < 2, far, 0))

    return kernel


class _Rule(NamedTuple):
    kernel: Callable[[np.ndarray], np.ndarray]
    antialias: bool = False
    offset: float = 0.0  # added to the new side when the scale is computed


_RULES = {
    "bicubic_antialias": _Rule(_cubic(-0.5), antialias=True),
    "bicubic": _Rule(_cubic(-0.75)),
    "bicubic_offset": _Rule(_cubic(-0.75), offset=0.1),
    "bilinear_antialias": _Rule(_linear, antialias=True),
    "bilinear": _Rule(_linear),
}
_SUPPORT = 2  # no kernel reaches further than this many pixels


def resample_positions(
    positions: Float[np.ndarray, "1 n d"],
    prefix: int,
    old: tuple[int, int],
    new: tuple[int, int],
    interpolation: str,
) -> Float[np.ndarray, "1 m d"]:
    """Resamples a position embedding to another grid of patches, in float64.

    Args:
      positions: of the prefix tokens, then of the patches row by row.
      prefix: tokens at the front, which keep theirs.
      old: rows and columns of the grid that the embedding is for.
      new: rows and columns wanted; where they are the old ones nothing changes.
      interpolation: "bicubic_antialias" (timm), "bicubic" (Hugging Face), "bicubic_offset"
        (DINOv2's own program: the scale is that of a side 0.1 longer), "bilinear_antialias"
        (SigLIP 2 of any resolution) or "bilinear" (an .npz in timm).
    """
    if old == new:
        return positions
    rule, width = _RULES[interpolation], positions.shape[-1]
    rows, columns = (_weights(*sides, rule) for sides in zip(old, new, strict=True))
    grid = positions[0, prefix:].reshape(*old, width)
    grid = np.einsum("yi,xj,ijd->yxd", rows, columns, grid, optimize=True)
    kept = positions[:, :prefix]
    return np.concatenate([kept, grid.reshape(1, -1, width)], axis=1).astype(np.float32)


def _weights(old: int, new: int, rule: _Rule) -> Float[np.ndarray, "new old"]:
    """How much each of the new samples takes from each of the old ones, along one side."""
    scale = old / (new + rule.offset)
    outside = 0 if rule.antialias else _SUPPORT
    taps = np.arange(-outside, old + outside)
    distances = taps + 0.5 - scale * (np.arange(new)[:, None] + 0.5)
    weights = rule.kernel(distances / max(scale, 1.0) if rule.antialias else distances)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights @ (np.clip(taps, 0, old - 1)[:, None] == np.arange(old))
