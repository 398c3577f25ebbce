"""Mosaics: whole photographs behind crosses of whole patches, the same for the same seed."""

import numpy as np
import pytest
from PIL import Image

from tdm_jax.data import make_config
from tdm_jax.data.mosaics import make_mosaics
from tdm_jax.errors import InputError


@pytest.fixture
def folder(tmp_path):
    """Two classes, each of one grey."""
    for split in ("train", "val"):
        for label, grey in (("dark", 40), ("light", 200)):
            (tmp_path / split / label).mkdir(parents=True)
            for number in range(3):
                path = tmp_path / split / label / f"{number}.png"
                Image.new("L", (30, 40), grey).save(path)
    return tmp_path


@pytest.fixture
def config(folder):
    return make_config(name="folder", data_dir=str(folder), image_size=(32, 24), channels=1)


def test_each_patch_has_the_class_of_what_it_shows(config):
    pixels, labels = make_mosaics(config, "train", 12, 4)
    assert pixels.shape == (12, 32, 24, 1) and labels.shape == (12, 8 * 6)
    shown = np.where(pixels[..., 0] < 100, 0, 1).reshape(12, 8, 4, 6, 4)
    assert (shown.min(axis=(2, 4)) == shown.max(axis=(2, 4))).all()
    np.testing.assert_array_equal(shown[:, :, 0, :, 0].reshape(12, -1), labels)
    assert 0.2 < labels.mean() < 0.8
    again = make_mosaics(config, "train", 12, 4)
    np.testing.assert_array_equal(again.pixels, pixels)
    assert (make_mosaics(config, "train", 12, 4, seed=1).labels != labels).any()


def test_unreadable_photographs_are_drawn_again(config, folder):
    (folder / "train" / "dark" / "0.png").write_bytes(b"cut")
    assert make_mosaics(config, "train", 6, 4).pixels.min() > 0
    for path in (folder / "train").rglob("*.png"):
        path.write_bytes(b"cut")
    with pytest.raises(InputError, match="more than 100 unreadable images of folder in a row"):
        make_mosaics(config, "train", 1, 4)


def test_bad_input(config, folder):
    with pytest.raises(InputError, match=r"four patches a side or more; the image has \(4, 3\)"):
        make_mosaics(config, "train", 1, 8)
    photos = make_config(name="photos", data_dir=str(folder), image_size=32)
    with pytest.raises(InputError, match="photos have no classes"):
        make_mosaics(photos, "validation", 1, 4)
