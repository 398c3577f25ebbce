"""Cluttered digits: the same for the same index, of one split's digits alone, mostly no digit."""

import pickle

import numpy as np
import pytest

from tdm_jax import data
from tdm_jax.data import cluttered_digits
from tdm_jax.data.cluttered_digits import DIGIT, SIDE, STEP, ClutteredDigits
from tdm_jax.data.source import SPLITS

CONFIG = data.make_config(name="cluttered_digits")


class Plain:
    """Two digits of one grey each."""

    num_classes, class_names = 10, tuple("0123456789")

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {"image": np.full((8, 8, 1), (40, 200)[index], np.uint8), "label": 3 + index}

    def describe(self, index):
        return f"plain[{index}]"


@pytest.fixture(scope="module")
def splits():
    return [data.open_source(CONFIG, split) for split in SPLITS]


def images(source, indices=range(60)):
    return np.stack([source[i]["image"] for i in indices])


def test_index_and_seed_alone_decide(splits):
    train, _ = splits
    again = pickle.loads(pickle.dumps(train))
    np.testing.assert_array_equal(images(again, [7, 3, 39_999]), images(train, [7, 3, 39_999]))
    assert len({image.tobytes() for image in images(train, [5, 5 + 1437, 5 + 2 * 1437])}) == 3
    one, other = (images(ClutteredDigits(Plain(), 60, seed)) for seed in (0, 1))
    assert (one != other).any(axis=(1, 2, 3)).all()


def test_shapes_and_labels(splits):
    train, test = splits
    assert (len(train), len(test)) == (40_000, 4_000)
    assert train.num_classes == 10 and train.class_names == tuple("0123456789")
    shown = images(test)
    assert (shown.shape, shown.dtype, shown.max()) == ((60, 32, 32, 1), np.uint8, 255)
    small = data.open_source(data.make_config(name="digits"), "validation")
    labels = [test[i]["label"] for i in (*range(20), *range(360, 380))]
    assert labels == [small[i]["label"] for i in range(20)] * 2
    for index in (-1, 4_000):
        with pytest.raises(IndexError):
            test[index]


def test_train_and_test_share_no_digit(splits):
    small = [data.open_source(data.make_config(name="digits"), split) for split in SPLITS]
    for source, digits in zip(splits, small, strict=True):
        for i in (0, len(digits) - 1, len(digits) + 5):
            name = f"cluttered_digits[{i}], of {digits.describe(i % len(digits))}"
            assert source.describe(i) == name
    # Fragments are cut from the digits that were given, too.
    assert set(np.unique(images(ClutteredDigits(Plain(), 60, 0)))) == {0, 40, 200}


def test_most_of_an_image_is_not_its_digit(splits, monkeypatch):
    cluttered = images(splits[1], range(500))[..., 0]
    monkeypatch.setattr(cluttered_digits, "MAX_FRAGMENTS", 0)
    alone = images(splits[1], range(500))[..., 0]
    # Without fragments the digits fill squares at the corners of patches, at every place.
    squares = np.lib.stride_tricks.sliding_window_view(alone, (DIGIT, DIGIT), axis=(1, 2))
    inside = squares[:, ::STEP, ::STEP].astype(int).sum(axis=(3, 4))
    held = inside == alone.astype(int).sum(axis=(1, 2))[:, None, None]
    assert held.any(axis=(1, 2)).all() and held.any(axis=0).all()
    assert (alone > 0).mean() < DIGIT**2 / SIDE**2 < 0.15
    # The fragments lie under the digits, and hold about as much light.
    assert (cluttered[alone > 0] == alone[alone > 0]).all()
    assert 0.5 < (cluttered.astype(int) - alone).sum() / alone.sum() < 2
