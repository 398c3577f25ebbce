import base64
import io
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from tdm_jax.errors import InputError
from tdm_jax.plotting import figure as figures
from tdm_jax.plotting.figure import Panel, figure, save, to_image, to_svg
from tdm_jax.plotting.patch_maps import MASK, SourceMap
from tdm_jax.reduction.token_state import TokenKind

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def panels():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    source = SourceMap(
        (4, 4),
        np.array([0, 1, 1, 2, 3, -1, 2, 2, 3, 3, 0, 0, -1, -1, -1, -1]),
        np.array([TokenKind.KEPT, TokenKind.MATCHED, TokenKind.CLUSTER, TokenKind.CLUSTER]),
    )
    return [[Panel(image), Panel(image, source, caption="4 of 16 tokens")]] * 2


def test_the_original_stands_in_its_cell_pixel_by_pixel(panels):
    laid_out = figure(panels, cell=96)
    picture = np.asarray(to_image(laid_out))
    assert picture.shape == (laid_out.height, laid_out.width, 3)
    x, y, drawing = laid_out.drawings[0]
    assert drawing.scale == 3
    np.testing.assert_array_equal(
        picture[y : y + 96, x : x + 96], panels[0][0].image.repeat(3, 0).repeat(3, 1)
    )


def test_a_smaller_picture_is_enlarged_to_the_first_ones_size(panels):
    small = np.random.default_rng(1).integers(0, 256, (4, 4, 3), np.uint8)
    laid_out = figure([[panels[0][0], Panel(small)]], cell=96)
    x, y, drawing = laid_out.drawings[1]
    np.testing.assert_array_equal(
        np.asarray(to_image(laid_out))[y : y + 96, x : x + 96], small.repeat(24, 0).repeat(24, 1)
    )
    # In the SVG it stays small.
    assert drawing.pixels.shape == (4, 4, 3)


def test_cells_and_texts_do_not_overlap_and_stay_inside(panels):
    laid_out = figure(panels, columns=["original", "TDM"], rows=["block 4", "block 7"], title="t")
    taken = np.zeros((laid_out.height, laid_out.width), int)
    for x, y, drawing in laid_out.drawings:
        height, width = (side * drawing.scale for side in drawing.pixels.shape[:2])
        assert x >= 0 and x + width <= laid_out.width and y + height <= laid_out.height
        taken[y : y + height, x : x + width] += 1
    blank = figure([[panel._replace(caption="") for panel in row] for row in panels])
    assert blank.height < laid_out.height
    for text in laid_out.texts:
        width = figures._width(text.text, text.size)
        left = text.x - width // 2 if text.anchor == "middle" else text.x
        assert left >= 0 and left + width <= laid_out.width
        taken[text.y - text.size // 2 : text.y + text.size // 2, left : left + width] += 1
    assert taken.max() == 1


def test_the_legend_names_what_is_there_and_nothing_else(panels):
    words = [text.text for text in figure(panels).texts]
    assert sum(word in figures.LEGEND.values() for word in words) == 4
    alone = figure([[panels[0][0]]])
    assert not alone.texts


def test_svg_and_png_agree(panels):
    laid_out = figure(panels, columns=["original", "TDM"])
    root = ElementTree.fromstring(to_svg(laid_out))
    picture = np.asarray(to_image(laid_out))
    assert root.get("viewBox") == f"0 0 {laid_out.width} {laid_out.height}"
    # Paints the document's own rectangles again and compares.
    again = np.full_like(picture, 255).astype(np.float32)
    for group in root.iter(f"{SVG}g"):
        x, y = (int(v) for v in group.get("transform")[len("translate(") : -1].split())
        image = group.find(f"{SVG}image")
        data = base64.b64decode(image.get("href").partition(",")[2])
        size = int(image.get("width")), int(image.get("height"))
        pixels = np.asarray(Image.open(io.BytesIO(data)).resize(size, Image.Resampling.NEAREST))
        area = again[y : y + size[1], x : x + size[0]]
        area[:] = pixels
        for path in group.iter(f"{SVG}path"):
            rgb = np.array([int(path.get("fill")[i : i + 2], 16) for i in (1, 3, 5)])
            for rect in path.get("d").strip("Mz").split("zM"):
                at, w, h = rect.partition("h")[0], *rect.split("h")[1].split("v")
                left, top = (int(v) for v in at.split())
                part = area[top : top + int(h), left : left + int(w)]
                part += float(path.get("fill-opacity", 1)) * (rgb - part)
    for x, y, drawing in laid_out.drawings:
        height, width = (side * drawing.scale for side in drawing.pixels.shape[:2])
        window = slice(y, y + height), slice(x, x + width)
        np.testing.assert_allclose(again[window], picture[window], atol=1)


def test_svg_escapes_every_label(panels):
    evil = '<script>alert("x")</script>&'
    text = to_svg(figure([[panels[0][1]._replace(caption=evil)]], [evil], [evil], evil, cell=900))
    assert "<script>" not in text
    root = ElementTree.fromstring(text)
    assert sum(node.text == evil for node in root.iter(f"{SVG}text")) == 4
    assert root.get("aria-label") == evil


def test_photographs_go_into_the_svg_as_jpeg():
    photo = Panel(np.full((128, 128, 3), 90, np.uint8))
    assert "data:image/jpeg" in to_svg(figure([[photo]]))


def test_any_label_can_be_painted(panels):
    laid_out = figure(panels, columns=["żółw 中文", "x" * 200], cell=64)
    picture = np.asarray(to_image(laid_out))
    for text in [text for text in laid_out.texts if text.y < laid_out.drawings[0].y]:
        half = text.size // 2
        area = picture[text.y - half : text.y + half, text.x - 2 * half : text.x + 2 * half]
        assert (area < 128).any()


def test_long_labels_are_cut(panels):
    label = next(
        t for t in figure(panels, columns=["w" * 100, "b"]).texts if t.text.startswith("w")
    )
    assert label.text.endswith("...")


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_save(tmp_path, panels, suffix):
    path = tmp_path / "new" / f"figure{suffix}"
    save(figure(panels), path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    if suffix == ".png":
        with Image.open(path) as image:
            assert image.getpixel((0, 0)) == (255, 255, 255)


def test_what_cannot_be_saved_is_one_line_and_loses_nothing(tmp_path, panels):
    kept = tmp_path / "figure.gif"
    kept.write_text("mine")
    with pytest.raises(InputError, match=r"ends in .png or .svg"):
        save(figure(panels), kept)
    assert kept.read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda panels: figure([]), "rows of equal length"),
        (lambda panels: figure([panels[0], panels[1][:1]]), r"got \[2, 1\] panels"),
        (lambda panels: figure(panels, columns=["one"]), "expected 2 column labels; got 1"),
        (lambda panels: figure(panels, rows=["one"]), "expected 2 row labels; got 1"),
        (
            lambda panels: figure([[panels[0][0], Panel(np.zeros((12, 12, 1), np.uint8))]]),
            "images of one size",
        ),
        (
            lambda panels: figure([[panels[0][0], Panel(np.zeros((16, 8, 1), np.uint8))]]),
            "images of one size",
        ),
        (
            lambda panels: figure([[panels[0][0], Panel(np.zeros((64, 64, 1), np.uint8))]]),
            "images of one size",
        ),
    ],
)
def test_bad_figures_are_one_line(panels, change, message):
    with pytest.raises(InputError, match=message):
        change(panels)


def test_masked_patches_reach_the_file(tmp_path, panels):
    laid_out = figure(panels, cell=32)
    save(laid_out, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        picture = np.asarray(image.convert("RGB")).astype(int)
    x, y, _ = laid_out.drawings[1]
    assert np.abs(picture[y + 24 : y + 32, x : x + 32] - MASK).max() < 35
