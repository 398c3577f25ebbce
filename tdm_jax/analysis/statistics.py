"""How sure a mean over images is: 95% intervals, which is what noise can do to it."""

import math

import numpy as np
from jaxtyping import Float

_Z = 1.959964  # of the normal distribution, for 95%
Interval = tuple[float, float]


def of_share(hits: Float[np.ndarray, " n"]) -> Interval:
    """Of a share, in percent, by Wilson's score (JASA 1927); it is right near 0 and 100%, too.

    Args:
      hits: 1 or 0 for each image, or the mean of several tries.
    """
    n, share = len(hits), float(hits.mean())
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * math.sqrt(share * (1 - share) / n + (_Z / (2 * n)) ** 2) / (1 + _Z**2 / n)
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def of_difference(hits: Float[np.ndarray, " n"], others: Float[np.ndarray, " n"]) -> Interval:
    """Of the difference of two shares on the same images, in percentage points.

    The adjusted Wald interval of Agresti and Min (Statistics in Medicine 2005): it turns on the
    images that only one of the two has right, as McNemar's test does, and adds half an image to
    each cell of their table.

    Args:
      hits: see `of_share`.
      others: of the same images.
    """
    difference = hits - others
    n = len(difference) + 2
    mean = float(difference.sum()) / n
    half = _Z * math.sqrt(max(0.0, (float((difference**2).sum()) + 1) / n - mean**2) / n)
    return 100 * max(-1.0, mean - half), 100 * min(1.0, mean + half)


def half_width(values: Float[np.ndarray, " n"]) -> float | None:
    """Half the width of a mean's interval, by the normal approximation; None of one image."""
    if len(values) < 2:
        return None
    return float(_Z * values.std(ddof=1) / np.sqrt(len(values)))
