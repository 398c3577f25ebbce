import dataclasses

import ml_collections
import pytest

from tdm_jax import data
from tdm_jax.errors import InputError


def test_defaults_depend_on_the_source():
    digits = data.make_config(name="digits")
    assert (digits.image_size, digits.channels, len(digits.mean)) == ((28, 28), 1, 1)
    assert (digits.augmentation, digits.mixup, digits.erasing) == ("affine", 0.0, 0.0)
    folder = data.make_config(name="folder", data_dir="images")
    assert (folder.image_size, folder.channels, folder.batch_size) == ((224, 224), 3, 1024)
    assert folder.rand_augment == "rand-m9-mstd0.5-inc1"
    assert (folder.mixup, folder.cutmix, folder.mix_switch, folder.erasing) == (0.8, 1.0, 0.5, 0.25)


def test_what_is_given_wins_over_the_default():
    config = data.make_config({"name": "digits", "image_size": 32}, mixup=1, mean=[0.5], flip=0.5)
    assert config.image_size == (32, 32)
    assert data.make_config(name="digits", image_size=(32,)).image_size == (32, 32)
    assert config.mixup == 1.0
    assert isinstance(config.mixup, float)
    assert config.mean == (0.5,)
    assert config.flip == 0.5


def test_round_trip_through_a_config_dict():
    config = data.make_config(
        name="tfds:mnist", data_dir="/data", channels=1, mean=(0.1,), std=(1,)
    )
    assert data.make_config(ml_collections.ConfigDict(dataclasses.asdict(config))) == config


@pytest.mark.parametrize(
    ("values", "mean", "std"),
    [
        ({"name": "digits", "channels": 3}, (0.309,) * 3, (0.349,) * 3),
        ({"name": "digits", "channels": 3, "mean": [0.5]}, (0.5,) * 3, (0.349,) * 3),
        ({"name": "folder", "channels": 1}, (0.449,), (0.226,)),
        ({"name": "folder", "channels": 1, "mean": (0.3,), "std": None}, (0.3,), (0.226,)),
    ],
)
def test_normalisation_follows_the_channels(values, mean, std):
    config = data.make_config(values)
    assert config.mean == pytest.approx(mean)
    assert config.std == pytest.approx(std)


def test_configs_are_hashable():
    assert hash(data.make_config(name="digits")) == hash(data.make_config(name="digits"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "name is missing"),
        ({"name": "digit"}, "did you mean 'digits'"),
        ({"name": "tfds:"}, "expected digits, cluttered_digits, folder, photos or tfds:<name>"),
        ({"name": "digits", "batchsize": 3}, "did you mean 'data.batch_size'"),
        ({"name": "digits", "batch_size": 0}, "batch_size: got 0, expected a positive integer"),
        ({"name": "digits", "batch_size": 2.5}, "batch_size: got 2.5, expected an integer"),
        ({"name": "digits", "batch_size": True}, "batch_size: got True, expected an integer"),
        ({"name": "digits", "image_size": (28, 28, 1)}, "image_size"),
        (
            {"name": "digits", "image_size": "big"},
            "image_size: got 'big', expected a pair of integers",
        ),
        ({"name": "digits", "channels": 2}, "channels: got 2, expected 1 or 3"),
        ({"name": "digits", "mean": (0.5, 0.5)}, "mean: got (0.5, 0.5), expected 1 numbers"),
        ({"name": "digits", "mean": (0.5, "x")}, "data.mean[1]: got 'x', expected a number"),
        ({"name": "digits", "std": (0.0,)}, "std"),
        ({"name": "digits", "seed": -1}, "seed"),
        ({"name": "digits", "crop_pct": 1.5}, "crop_pct"),
        ({"name": "digits", "flip": 1.5}, "flip"),
        ({"name": "digits", "holdout": 0}, "holdout"),
        ({"name": "digits", "crop_scale": (0.5, 0.1)}, "crop_scale"),
        ({"name": "digits", "label_smoothing": 1.0}, "label_smoothing"),
        ({"name": "digits", "augmentation": "crops"}, "did you mean 'crop'"),
        ({"name": "digits", "interpolation": "cubic"}, "did you mean 'bicubic'"),
        ({"name": "digits", "rand_augment": "auto"}, "expected something like rand-m9"),
    ],
)
def test_bad_values_are_refused_in_one_line(values, message):
    with pytest.raises(InputError) as caught:
        data.make_config(values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
