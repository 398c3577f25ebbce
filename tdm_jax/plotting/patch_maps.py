"""Pictures of what became of an image's patches, drawn from the source map alone.

The source map (`Info.stages`) says for each patch which token stands for it, and for each token
what it is made of. That is all a picture needs, so every method has pictures and none is known
here:

    kept      the patch as it is
    matched   a group of attentive patches: each as it is, outlined in the group's colour
    cluster   a group of inattentive patches: in grey, under the group's colour
    dropped   masked

This file turns one image and its map into a list of marks; `figure.py` lays panels out and paints
them.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Num, UInt8

from tdm_jax.errors import InputError, unknown
from tdm_jax.models.info import Info, Stage
from tdm_jax.plotting import colors
from tdm_jax.plotting.colors import RGB, Shade
from tdm_jax.reduction.token_state import TokenKind

MASK: RGB = (226, 226, 230)
MASK_ALPHA = 0.88

DROPPED = -1

# What each view does with a patch, by the kind of its token.
FILL, OUTLINE, HIDE, SHOW = "fill", "outline", "hide", "show"
_KINDS = (TokenKind.KEPT, TokenKind.MATCHED, TokenKind.CLUSTER, TokenKind.FUSED, DROPPED)
VIEWS: dict[str, dict[int, str]] = {
    "tokens": dict(zip(_KINDS, (SHOW, OUTLINE, FILL, FILL, HIDE), strict=True)),
    "importance": dict(zip(_KINDS, (SHOW, SHOW, HIDE, HIDE, HIDE), strict=True)),
    "diversity": dict(zip(_KINDS, (SHOW, FILL, FILL, FILL, HIDE), strict=True)),
}


@dataclasses.dataclass(frozen=True)
class SourceMap:
    """What became of one image's patches.

    Attributes:
      grid: rows and columns of patches.
      assign: for each patch, row by row, the token that stands for it; -1 if it was dropped.
      kind: what each token is made of, a `TokenKind`.
    """

    grid: tuple[int, int]
    assign: Int[np.ndarray, "p"]
    kind: Int[np.ndarray, "n"]

    def __post_init__(self) -> None:
        rows, cols = self.grid
        if self.assign.size != rows * cols:
            raise InputError(
                f"source map: expected {rows} x {cols} = {rows * cols} patches; "
                f"got {self.assign.size}"
            )
        if self.assign.size and not -1 <= self.assign.min() <= self.assign.max() < self.kind.size:
            raise InputError(
                f"source map: expected tokens -1..{self.kind.size - 1}; "
                f"got {self.assign.min()}..{self.assign.max()}"
            )

    @classmethod
    def of(cls, stage: Stage | Info, index: int, grid: tuple[int, int]) -> "SourceMap":
        """The map of one image of a batch after a stage."""
        return cls(grid, np.asarray(stage.assign[index]), np.asarray(stage.kind[index]))

    @property
    def tokens(self) -> int:
        """How many tokens there are, those that own no patch included."""
        return self.kind.size

    @property
    def patch_kind(self) -> Int[np.ndarray, "p"]:
        """The kind of each patch's token, or DROPPED."""
        return np.where(self.assign >= 0, self.kind[self.assign], DROPPED)


class Rect(NamedTuple):
    """A rectangle in pixels."""

    x: int
    y: int
    width: int
    height: int


class Mark(NamedTuple):
    """Rectangles of one colour. `title` names them for readers of the SVG."""

    rects: tuple[Rect, ...]
    rgb: RGB
    alpha: float = 1.0
    title: str = ""


class Drawing(NamedTuple):
    """One picture.

    Attributes:
      pixels: the image, what is inattentive in grey.
      scale: at how many pixels of the drawing each of them stands.
      marks: what is painted over them, in this order.
      actions: what was done with patches: any of SHOW, OUTLINE, FILL, HIDE.
    """

    pixels: UInt8[np.ndarray, "h w 3"]
    scale: int
    marks: tuple[Mark, ...]
    actions: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Patch:
    """The size of a patch in pixels, and how sets of patches are painted at that size."""

    width: int
    height: int

    @property
    def _side(self) -> int:
        return min(self.width, self.height)

    def fill(self, group: Bool[np.ndarray, "r c"], rgb: RGB, alpha: float, title: str) -> Mark:
        """The whole area of a set of patches."""
        rects = []
        for row, cells in enumerate(group):
            # Each run of patches in a row is one rectangle.
            ends = np.flatnonzero(np.diff(np.pad(cells, 1).astype(int)))
            for start, stop in ends.reshape(-1, 2).tolist():
                rects.append(self._at((row, start), 0, 0, (stop - start) * self.width, self.height))
        return Mark(tuple(rects), rgb, alpha, title)

    def border(self, group: Bool[np.ndarray, "r c"], rgb: RGB, inset: int, width: int) -> Mark:
        """A line of `width` pixels that runs `inset` pixels inside the edge of a set of patches."""
        rects: list[Rect] = []
        padded = np.pad(group, 1)
        for row, col in np.argwhere(group).tolist():
            near = padded[row : row + 3, col : col + 3]
            rects += self._edges(near, (row, col), inset, width)
        return Mark(tuple(rects), rgb)

    def _edges(
        self, near: Bool[np.ndarray, "3 3"], place: tuple[int, int], inset: int, width: int
    ) -> Iterator[Rect]:
        """The line's pieces in one patch, given which of its neighbours belong to the set."""
        reach = inset + width
        # Where a neighbour belongs to the set, the line runs on into it.
        left, right = (0 if near[1, side] else inset for side in (0, 2))
        up, down = (0 if near[side, 1] else inset for side in (0, 2))
        across, along = self.width - left - right, self.height - up - down
        if not near[0, 1]:
            yield self._at(place, left, inset, across, width)
        if not near[2, 1]:
            yield self._at(place, left, self.height - reach, across, width)
        if not near[1, 0]:
            yield self._at(place, inset, up, width, along)
        if not near[1, 2]:
            yield self._at(place, self.width - reach, up, width, along)
        # Around a corner that points into this patch, the line turns.
        for i, j in itertools.product((0, 2), (0, 2)):
            if near[i, 1] and near[1, j] and not near[i, j]:
                for x, y, w, h in ((0, inset, reach, width), (inset, 0, width, inset)):
                    x = x if j == 0 else self.width - x - w
                    y = y if i == 0 else self.height - y - h
                    yield self._at(place, x, y, w, h)

    def _at(self, place: tuple[int, int], x: int, y: int, width: int, height: int) -> Rect:
        row, col = place
        return Rect(col * self.width + x, row * self.height + y, width, height)

    def cluster(self, group: Bool[np.ndarray, "r c"], rgb: RGB) -> list[Mark]:
        """A group of inattentive patches."""
        line = min(max(1, round(self._side * 0.06)), self._side // 3)
        return [
            self.fill(group, rgb, 0.6, f"cluster of {group.sum()} patches"),
            self.border(group, rgb, 0, line),
        ]

    def outline(self, group: Bool[np.ndarray, "r c"], rgb: RGB) -> list[Mark]:
        """A group of attentive patches: a line in its colour, and one to set it off."""
        line = min(max(2, round(self._side * 0.16)), self._side // 3)
        edge = min(max(1, round(self._side * 0.04)), self._side // 6)
        contrast = colors.INK if colors.luma(rgb) > 80 else colors.PAPER
        return [
            self.border(group, contrast, line, edge),
            self.border(group, rgb, 0, line)._replace(title=f"{group.sum()} matched patches"),
        ]


def as_rgb(image: Num[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w 3"]:
    """Grey images get three channels; anything but uint8 with 1 or 3 channels is refused."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
        raise InputError(
            f"picture: expected uint8 [height, width, 1 or 3]; got {image.dtype} "
            f"{list(image.shape)}"
        )
    return np.broadcast_to(image, (*image.shape[:2], 3))


def draw(
    image: Num[np.ndarray, "h w c"],
    source: SourceMap | None,
    view: str = "tokens",
    scale: int = 1,
) -> Drawing:
    """Draws one image and what became of its patches.

    Args:
      image: uint8, as the model saw it before normalisation; 1 or 3 channels.
      source: of this image; None for the image alone.
      view: "tokens" shows all, as described above; "importance" masks all that is inattentive or
        dropped; "diversity" colours all groups.
      scale: pixels of the drawing per pixel of the image.

    Raises:
      InputError: the image has another type, its patches do not divide it, or the view is unknown.
    """
    image = as_rgb(image)
    if source is None:
        return Drawing(image, scale, (), frozenset())
    if view not in VIEWS:
        raise unknown("view", view, VIEWS)
    rows, cols = source.grid
    height, width = image.shape[0] // rows, image.shape[1] // cols
    if 0 in (height, width) or (height * rows, width * cols) != image.shape[:2]:
        raise InputError(
            f"picture: {rows} x {cols} patches do not divide an image of "
            f"{image.shape[0]} x {image.shape[1]} pixels"
        )
    kinds = source.patch_kind.reshape(source.grid)
    action = np.vectorize(VIEWS[view].__getitem__)(kinds)
    hidden, filled = action == HIDE, action == FILL
    patch = Patch(width * scale, height * scale)
    marks = [patch.fill(hidden, MASK, MASK_ALPHA, f"{hidden.sum()} patches dropped")]
    labels, shades = shade_groups(source, np.isin(action, (FILL, OUTLINE)))
    for number, shade in enumerate(shades):
        group = labels == number
        paint = patch.cluster if filled[group].all() else patch.outline
        marks += paint(group, shade.rgb)
    grey = (hidden | filled).repeat(height, axis=0).repeat(width, axis=1)
    pixels = np.where(grey[..., None], _grey(image), image)
    marks = tuple(mark for mark in marks if mark.rects)
    return Drawing(pixels, scale, marks, frozenset(action.flat))


def _grey(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Rec. 601 luma, of low contrast, so that a colour over it stays one colour."""
    luma = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return np.broadcast_to(np.round(70 + 0.6 * luma).astype(np.uint8)[..., None], image.shape)


def shade_groups(
    source: SourceMap, colored: Bool[np.ndarray, "r c"]
) -> tuple[Int[np.ndarray, "r c"], list[Shade]]:
    """Which group each colored patch is in, -1 for the others, and a color for each group.

    Groups that touch have different ones.
    """
    tokens, places = np.unique(source.assign.reshape(source.grid)[colored], return_inverse=True)
    labels = np.full(source.grid, -1)
    labels[colored] = places
    return labels, colors.share_out(colors.neighbours(labels, len(tokens)))
