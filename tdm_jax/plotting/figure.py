"""Figures of several pictures with their labels, as PNG and as SVG.

A figure is laid out once, in whole pixels; Pillow paints the layout, or it is written as SVG, which
needs no font metrics of its own and escapes every label.
"""

import base64
import dataclasses
import io
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape, quoteattr

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from tdm_jax.errors import InputError
from tdm_jax.files import replacing, write_text
from tdm_jax.plotting import colors
from tdm_jax.plotting.colors import INK, PAPER, RGB
from tdm_jax.plotting.patch_maps import (
    FILL,
    HIDE,
    MASK,
    MASK_ALPHA,
    OUTLINE,
    SHOW,
    Drawing,
    Mark,
    Patch,
    SourceMap,
    as_rgb,
    draw,
)

GAP = 10
QUIET: RGB = (95, 95, 102)
_FINE = 3
_ANCHORS = {"start": "lm", "middle": "mm", "end": "rm"}
LEGEND = {
    SHOW: "kept as it is",
    OUTLINE: "matched: one outline, one token",
    FILL: "grouped: one colour, one token",
    HIDE: "not kept",
}


class Panel(NamedTuple):
    """One picture of a figure (see `patch_maps.draw`), and what stands below it."""

    image: UInt8[np.ndarray, "h w c"]
    source: SourceMap | None = None
    view: str = "tokens"
    caption: str = ""


class Text(NamedTuple):
    """One line of text: x is its left end, middle or right end as `anchor` says; y its middle."""

    x: int
    y: int
    text: str
    size: int
    anchor: str = "start"
    rgb: RGB = INK


class Placed(NamedTuple):
    """A drawing and where it stands."""

    x: int
    y: int
    drawing: Drawing


@dataclasses.dataclass(frozen=True)
class Figure:
    """A laid-out figure, in pixels."""

    width: int
    height: int
    title: str
    drawings: tuple[Placed, ...]
    texts: tuple[Text, ...]


def figure(
    panels: Sequence[Sequence[Panel]],
    columns: Sequence[str] = (),
    rows: Sequence[str] = (),
    title: str = "",
    cell: int = 224,
) -> Figure:
    """Lays out rows of panels under column labels and beside row labels, with a legend below.

    Args:
      panels: rows of equal length; all images of one size. Smaller ones that a whole factor takes
        to the first one's size are enlarged to it.
      columns: a label for each column, or none.
      rows: a label for each row, or none.
      title: for readers who cannot see the figure, and for the top of it; "" for none.
      cell: small images are enlarged, by a whole factor, up to this many pixels of width.

    Raises:
      InputError: the panels make no grid, or do not match their labels.
    """
    _check(panels, columns, rows)
    image = as_rgb(panels[0][0].image)
    scale = max(1, cell // image.shape[1])
    height, width = image.shape[0] * scale, image.shape[1] * scale
    size = min(max(12, width // 15), 28)
    small = max(11, size - 3)
    line = size + GAP

    left = GAP + max((_width(label, size) + GAP for label in rows), default=0)
    top = GAP + line * bool(title) + line * bool(columns)
    pitch = height + GAP + (small + GAP) * any(p.caption for row in panels for p in row)
    total = left + len(panels[0]) * (width + GAP)

    heading = _fit(title, total - 2 * GAP, size + 2)
    texts = [Text(GAP, GAP + line // 2, heading, size + 2)] if title else []
    for j, label in enumerate(columns):
        x = left + j * (width + GAP) + width // 2
        texts.append(Text(x, top - line // 2, _fit(label, width, size), size, "middle"))
    drawings = []
    for i, row in enumerate(panels):
        y = top + i * pitch
        if rows:
            texts.append(Text(GAP, y + height // 2, rows[i], size))
        for j, panel in enumerate(row):
            x = left + j * (width + GAP)
            pixel = width // panel.image.shape[1]
            drawings.append(Placed(x, y, draw(panel.image, panel.source, panel.view, pixel)))
            if panel.caption:
                caption = _fit(panel.caption, width, small)
                middle = y + height + (small + GAP) // 2
                texts.append(Text(x + width // 2, middle, caption, small, "middle", QUIET))
    bottom = top + len(panels) * pitch
    actions = frozenset().union(*(placed.drawing.actions for placed in drawings))
    legend, captions, bottom = _legend(actions, left, bottom, total, small, image)
    return Figure(total, bottom, title, (*drawings, *legend), (*texts, *captions))


def _check(panels: Sequence[Sequence[Panel]], columns: Sequence[str], rows: Sequence[str]) -> None:
    if not panels or not panels[0] or len({len(row) for row in panels}) > 1:
        raise InputError(
            f"figure: expected rows of equal length; got {[len(row) for row in panels]} panels"
        )
    for name, labels, count in (("column", columns, len(panels[0])), ("row", rows, len(panels))):
        if labels and len(labels) != count:
            raise InputError(f"figure: expected {count} {name} labels; got {len(labels)}")
    height, width = panels[0][0].image.shape[:2]
    sizes = {panel.image.shape[:2] for row in panels for panel in row}
    if any((h * (width // w), width // w * w) != (height, width) for h, w in sizes):
        raise InputError(
            f"figure: expected images of one size, or of one that divides it; got {sorted(sizes)}"
        )


def _legend(
    actions: frozenset[str], left: int, top: int, width: int, size: int, image: np.ndarray
) -> tuple[list[Placed], list[Text], int]:
    """Swatches with their meaning, in as many lines as they need, and where they end."""
    side = size + 4
    line = side + GAP
    swatches, texts, x = [], [], left
    for action in (action for action in LEGEND if action in actions):
        label = LEGEND[action]
        pixels, marks = _swatch(action, side, image)
        needed = pixels.shape[1] + GAP // 2 + _width(label, size) + 2 * GAP
        if x > left and x + needed > width:
            x, top = left, top + line
        swatches.append(Placed(x, top, Drawing(pixels, 1, marks, frozenset())))
        texts.append(Text(x + pixels.shape[1] + GAP // 2, top + side // 2, label, size))
        x += needed
    return swatches, texts, top + line if swatches else top


def _swatch(action: str, side: int, image: np.ndarray) -> tuple[np.ndarray, tuple[Mark, ...]]:
    """A small example of what is done with patches."""
    patch = Patch(side, side)
    one, two = np.array([[True, False]]), np.array([[False, True]])
    # The image itself, made small.
    rows, cols = (np.linspace(0, 1, side) * (n - 1) for n in image.shape[:2])
    shown = as_rgb(image)[np.round(rows).astype(int)][:, np.round(cols).astype(int)]
    blank = np.full((side, 2 * side, 3), 160, np.uint8)
    if action == SHOW:
        return shown, ()
    if action == HIDE:
        return blank[:, :side], (patch.fill(one[:, :1], MASK, MASK_ALPHA, ""),)
    if action == OUTLINE:
        pair = np.concatenate([shown, shown], axis=1)
        return pair, tuple(patch.outline(one | two, colors.SKY))
    return blank, (*patch.cluster(one, colors.ORANGE), *patch.cluster(two, colors.GREEN))


def _printable(text: str) -> str:
    """What Pillow's own font has glyphs for."""
    plain = unicodedata.normalize("NFKD", text.replace("×", "x").replace("–", "-"))
    return "".join(c if c.isascii() else "?" for c in plain if not unicodedata.combining(c))


def _width(text: str, size: int) -> int:
    return round(ImageFont.load_default(_FINE * size).getlength(_printable(text)) / _FINE)


def _fit(text: str, width: int, size: int) -> str:
    """The text, cut short where it is wider than its place."""
    if _width(text, size) <= width:
        return text
    while text and _width(text + "...", size) > width:
        text = text[:-1]
    return text.rstrip() + "..."


def to_image(figure: Figure) -> Image.Image:
    """Paints a figure."""
    canvas = np.empty((figure.height, figure.width, 3), np.uint8)
    canvas[:] = PAPER
    for x, y, drawing in figure.drawings:
        pixels = drawing.pixels.repeat(drawing.scale, axis=0).repeat(drawing.scale, axis=1)
        canvas[y : y + pixels.shape[0], x : x + pixels.shape[1]] = paint(pixels, drawing.marks)
    image = Image.fromarray(canvas)
    for rgb in {text.rgb for text in figure.texts}:
        # Drawn large and made small: at this size the font's own spacing is uneven.
        mask = Image.new("L", (_FINE * figure.width, _FINE * figure.height))
        pen = ImageDraw.Draw(mask)
        for text in (text for text in figure.texts if text.rgb == rgb):
            font = ImageFont.load_default(_FINE * text.size)
            at = (_FINE * text.x, _FINE * text.y)
            pen.text(at, _printable(text.text), 255, font=font, anchor=_ANCHORS[text.anchor])
        image.paste(rgb, mask=mask.reduce(_FINE))
    return image


def paint(pixels: UInt8[np.ndarray, "h w 3"], marks: Sequence[Mark]) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels with the marks over them."""
    painted = pixels.astype(np.float32)
    for mark in marks:
        rgb = np.array(mark.rgb, np.float32)
        for x, y, width, height in mark.rects:
            area = painted[y : y + height, x : x + width]
            area += mark.alpha * (rgb - area)
    return np.round(painted).astype(np.uint8)


def to_svg(figure: Figure) -> str:
    """Writes a figure as one SVG document with its images inside."""
    name = quoteattr(figure.title or "what became of the patches of each image")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {figure.width} {figure.height}" '
        f'width="{figure.width}" height="{figure.height}" role="img" aria-label={name} '
        'font-family="Helvetica, Arial, sans-serif">',
        f'<rect width="100%" height="100%" fill="{colors.hex_code(PAPER)}"/>',
    ]
    for x, y, drawing in figure.drawings:
        height, width = (side * drawing.scale for side in drawing.pixels.shape[:2])
        parts.append(
            f'<g transform="translate({x} {y})"><image width="{width}" height="{height}" '
            f'image-rendering="pixelated" href="{data_url(drawing.pixels)}"/>'
        )
        parts += [_path(mark) for mark in drawing.marks]
        parts.append("</g>")
    for text in figure.texts:
        parts.append(
            f'<text x="{text.x}" y="{text.y}" font-size="{text.size}" text-anchor="{text.anchor}" '
            f'dominant-baseline="central" fill="{colors.hex_code(text.rgb)}">'
            f"{escape(text.text)}</text>"
        )
    return "\n".join([*parts, "</svg>\n"])


def _path(mark: Mark) -> str:
    outline = "".join(f"M{x} {y}h{width}v{height}h-{width}z" for x, y, width, height in mark.rects)
    alpha = f' fill-opacity="{mark.alpha}"' if mark.alpha < 1 else ""
    head = f'<path fill="{colors.hex_code(mark.rgb)}"{alpha} d="{outline}"'
    return f"{head}><title>{escape(mark.title)}</title></path>" if mark.title else f"{head}/>"


def data_url(pixels: UInt8[np.ndarray, "h w 3"]) -> str:
    """An image as what HTML and SVG take for a file's address."""
    # PNG keeps the edges of small images; of photographs JPEG needs a quarter.
    kind = "png" if pixels.shape[1] <= 64 else "jpeg"
    options = {"quality": 90, "subsampling": 0} if kind == "jpeg" else {"optimize": True}
    data = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(data, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"


def save(figure: Figure, path: str | Path) -> None:
    """Writes a figure, whole or not at all.

    Raises:
      InputError: the suffix is neither .png nor .svg, or nothing can be written there.
    """
    path = Path(path)
    if path.suffix == ".svg":
        write_text(path, to_svg(figure))
    elif path.suffix == ".png":
        with replacing(path) as beside:
            to_image(figure).save(beside)
    else:
        raise InputError(f"cannot write {path}: expected a name that ends in .png or .svg")
