import io
import warnings

import numpy as np
import pytest
from PIL import Image

from tdm_jax.data import images
from tests.data.files import encode


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixel(data, channels=3):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = images.load(images.open_image(data), channels)
    assert image.mode == ("RGB" if channels == 3 else "L")
    return image.getpixel((1, 1))


def close(got, expected, tolerance=3):
    np.testing.assert_allclose(got, expected, atol=tolerance)


def test_plain_modes_become_rgb():
    assert pixel(saved(Image.new("L", (8, 8), 77), "PNG")) == (77, 77, 77)
    assert pixel(saved(Image.new("1", (8, 8), 1), "PNG")) == (255, 255, 255)
    assert pixel(saved(Image.new("RGB", (8, 8), (1, 2, 3)), "PNG")) == (1, 2, 3)
    palette = Image.new("RGB", (8, 8), (250, 100, 50)).convert("P", palette=Image.Palette.ADAPTIVE)
    close(pixel(saved(palette, "PNG")), (250, 100, 50))


def test_print_colours_become_rgb():
    data = saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
    red = pixel(data)
    assert red[0] > 180
    assert red[1] < 60
    assert red[2] < 60


def test_transparency_shows_white():
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    close(pixel(saved(half, "PNG")), (127, 127, 127))
    clear = Image.new("LA", (8, 8), (10, 0))
    assert pixel(saved(clear, "PNG")) == (255, 255, 255)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    # One entry of the palette transparent, and transparency spelt out for every entry.
    assert pixel(saved(palette, "PNG", transparency=1)) == (255, 255, 255)
    assert pixel(saved(palette, "PNG", transparency=bytes([255, 0]))) == (255, 255, 255)
    assert pixel(saved(palette, "PNG", transparency=bytes([0, 255]))) == (200, 0, 0)


def test_deep_images_keep_their_brightness():
    deep = np.full((8, 8), 0x8000, np.uint16)
    close(pixel(encode(deep)), (128, 128, 128), 1)
    dim = np.full((8, 8), 0x0080, np.uint16)
    close(pixel(encode(dim)), (0, 0, 0), 1)
    close(pixel(encode(np.full((8, 8), 0.5, np.float32), "TIFF")), (128, 128, 128), 1)
    close(pixel(encode(np.full((8, 8), 90.0, np.float32), "TIFF")), (90, 90, 90), 1)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixel(data) == (255, 0, 0)


def test_grey_on_request():
    assert pixel(saved(Image.new("RGB", (8, 8), (255, 255, 255)), "PNG"), 1) == 255
    assert pixel(saved(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "PNG"), 1) == 255


def test_arrays_pass_undecoded():
    assert pixel(np.full((4, 4, 3), 9, np.uint8)) == (9, 9, 9)
    assert pixel(np.full((4, 4, 1), 9, np.uint8), 1) == 9
    assert pixel(np.full((4, 4), 9, np.uint8)) == (9, 9, 9)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_truncated_files_are_corrupt(kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encode(noise, kind)
    with pytest.raises(images.CorruptImage):
        images.load(images.open_image(data[: len(data) // 2]), 3)


@pytest.mark.parametrize("data", [b"", b"not a picture", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n"])
def test_other_bytes_are_corrupt(data):
    with pytest.raises(images.CorruptImage):
        images.load(images.open_image(data), 3)


def test_a_flipped_byte_in_a_png_is_corrupt():
    data = bytearray(encode(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(images.CorruptImage):
        images.load(images.open_image(bytes(data)), 3)


def test_decompression_bombs_are_corrupt(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(images.CorruptImage):
        images.open_image(encode(np.zeros((16, 16, 3), np.uint8)))
