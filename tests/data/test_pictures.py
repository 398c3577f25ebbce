"""Images to look at: files of any kind, and some of a data set."""

import numpy as np
import pytest
from PIL import Image

from tdm_jax.data import make_config
from tdm_jax.data.pictures import read_examples, read_images
from tdm_jax.errors import InputError

CONFIG = make_config(name="folder", data_dir="x", image_size=(16, 24), crop_pct=1.0)


def picture(width, height, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 4), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def test_any_kind_of_image_is_read(tmp_path):
    folder = tmp_path / "kinds"
    (folder / "deeper").mkdir(parents=True)
    for mode, suffix in (("L", "png"), ("P", "gif"), ("RGBA", "png"), ("CMYK", "jpg")):
        picture(30, 30, mode).save(folder / f"{mode}.{suffix}")
    frames = [picture(30, 30), picture(30, 30)]
    frames[0].save(folder / "deeper" / "moves.webp", save_all=True, append_images=frames[1:])
    Image.fromarray(np.full((30, 30), 40000, np.uint16)).save(folder / "deep.png")
    (folder / "notes.txt").write_text("no image")
    pictures = read_images(folder, CONFIG)
    assert [p.name for p in pictures] == ["CMYK", "L", "P", "RGBA", "deep", "deeper_moves"]
    for one in pictures:
        assert one.pixels.shape == (16, 24, 3)
        assert one.pixels.dtype == np.uint8
    assert (pictures[4].pixels == 156).all()


def test_one_image_is_enough_and_equal_names_stay_apart(tmp_path):
    picture(30, 30).save(tmp_path / "a.png")
    picture(30, 30).save(tmp_path / "A.jpg")
    assert [p.name for p in read_images(tmp_path / "a.png", CONFIG)] == ["a"]
    both = read_images(tmp_path, CONFIG)
    assert len({p.name.lower() for p in both}) == 2


def test_examples_are_the_first_or_spread_over_the_split():
    digits = make_config(name="digits")
    first = read_examples(digits, 3)
    assert [p.name for p in first] == ["digits_0000", "digits_0001", "digits_0002"]
    assert all(p.pixels.shape == (28, 28, 1) and 0 <= p.label < 10 for p in first)
    spread = read_examples(digits, 3, spread=True)
    assert [p.name for p in spread] == ["digits_0000", "digits_0179", "digits_0359"]


def test_examples_that_cannot_be_read_are_left_out(tmp_path):
    folder = tmp_path / "val" / "a"
    folder.mkdir(parents=True)
    (tmp_path / "train" / "a").mkdir(parents=True)
    for place in (tmp_path / "train" / "a", folder):
        (place / "0.png").write_bytes(b"nothing")
    picture(9, 9).save(folder / "1.png")
    config = make_config(name="folder", data_dir=str(tmp_path), image_size=8)
    assert [p.name for p in read_examples(config, 5)] == ["folder_0001"]
    with pytest.raises(InputError, match="no image of folder could be read"):
        read_examples(config, 1)
