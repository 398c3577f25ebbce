"""Colours that people with any colour vision can tell apart, and how groups share them out.

The seven hues are Okabe and Ito's ("Color Universal Design", 2008); a light and a dark shade of
each serve when there are more groups than hues.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

RGB = tuple[int, int, int]


class Shade(NamedTuple):
    """A colour, and which of the seven hues it is a shade of."""

    hue: int
    rgb: RGB


BLUE: RGB = (0, 114, 178)
VERMILLION: RGB = (213, 94, 0)
GREEN: RGB = (0, 158, 115)
ORANGE: RGB = (230, 159, 0)
PURPLE: RGB = (204, 121, 167)
SKY: RGB = (86, 180, 233)
YELLOW: RGB = (240, 228, 66)
HUES: tuple[RGB, ...] = (ORANGE, SKY, GREEN, PURPLE, BLUE, VERMILLION, YELLOW)

INK: RGB = (33, 33, 36)
PAPER: RGB = (255, 255, 255)


def mix(a: RGB, b: RGB, share: float) -> RGB:
    """`share` of b in a."""
    red, green, blue = (round((1 - share) * x + share * y) for x, y in zip(a, b, strict=True))
    return red, green, blue


def luma(rgb: RGB) -> float:
    """How light a colour is, 0 to 255 (Rec. 601)."""
    red, green, blue = rgb
    return 0.299 * red + 0.587 * green + 0.114 * blue


def hex_code(rgb: RGB) -> str:
    """As CSS, SVG and matplotlib write it."""
    return "#{:02x}{:02x}{:02x}".format(*rgb)


SHADES: tuple[Shade, ...] = tuple(
    Shade(hue, mix(rgb, other, share))
    for other, share in ((PAPER, 0.0), (PAPER, 0.45), (INK, 0.4))
    for hue, rgb in enumerate(HUES)
)


def neighbours(labels: Int[np.ndarray, "rows cols"], count: int) -> Bool[np.ndarray, "g g"]:
    """Which of `count` groups touch on a grid of labels, corners included; -1 is no group."""
    touch = np.zeros((count, count), bool)
    rows, cols = labels.shape
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        here = labels[: rows - down, max(0, -right) : cols - max(0, right)]
        there = labels[down:, max(0, right) : cols + min(0, right)]
        pairs = (here != there) & (here >= 0) & (there >= 0)
        touch[here[pairs], there[pairs]] = True
    return touch | touch.T


def share_out(touch: Bool[np.ndarray, "g g"]) -> list[Shade]:
    """A shade for each group, so that those that touch differ.

    Greedy (DSATUR): the group whose neighbours show most shades chooses next. It takes a hue that
    no neighbour has, if there is one, and among those the shade that was used least, so that groups
    far apart differ too while shades last.
    """
    count = len(touch)
    chosen = np.full(count, -1)
    used = np.zeros(len(SHADES), int)
    hues = np.array([shade.hue for shade in SHADES])
    degree = touch.sum(axis=1)
    around = np.zeros((count, len(SHADES)), int)  # how many neighbours have each shade
    for _ in range(count):
        seen = (around > 0).sum(axis=1)
        group = max(np.flatnonzero(chosen < 0), key=lambda g: (seen[g], degree[g], -g))
        same_hue = np.array([around[group, hues == hue].sum() for hue in hues])
        # Last to first: same shade, same hue, how often it was used, its place in the table.
        shade = np.lexsort((np.arange(len(SHADES)), used, same_hue, around[group]))[0]
        chosen[group] = shade
        used[shade] += 1
        around[touch[group], shade] += 1
    return [SHADES[shade] for shade in chosen]
