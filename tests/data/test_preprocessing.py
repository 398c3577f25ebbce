"""Pictures become a model's input as its evaluation prepares them, or one line says why not."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tdm_jax import Preprocessing, create_model, data, preprocess
from tdm_jax.data.device_transforms import normalise
from tdm_jax.data.preprocessing import data_config_for
from tdm_jax.data.transforms import resize_and_center_crop
from tdm_jax.errors import InputError

SIZES = {"patch_size": 4, "width": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
HALF = Preprocessing((0.5,) * 3, (0.25,) * 3, 0.8, "bilinear")


def make(preprocessing=HALF, image_size=(16, 24), **settings):
    return create_model(
        "vit", **SIZES, image_size=image_size, preprocessing=preprocessing, **settings
    )


def photo(height=50, width=70, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height // 5, width // 5, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height))


def test_resizes_crops_and_normalises():
    image = photo()
    cropped = resize_and_center_crop(image, (16, 24), 0.8, Image.Resampling.BILINEAR)
    got = preprocess(make())(image)
    assert (got.shape, got.dtype) == ((1, 16, 24, 3), jnp.float32)
    np.testing.assert_allclose(got[0], (np.asarray(cropped) / 255 - 0.5) / 0.25, atol=1e-6)


def test_images_and_arrays_of_any_number():
    prepare = preprocess(make())
    images = [photo(seed=0), photo(40, 90, seed=1)]
    expected = np.concatenate([prepare(image) for image in images])
    np.testing.assert_array_equal(prepare(images), expected)
    np.testing.assert_array_equal(prepare(tuple(np.asarray(i) for i in images)), expected)
    np.testing.assert_array_equal(prepare(np.asarray(images[0])), expected[:1])
    np.testing.assert_array_equal(prepare(np.asarray(images[0])[None]), expected[:1])
    np.testing.assert_array_equal(prepare(jnp.asarray(images[0])), expected[:1])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_images_of_any_mode(mode):
    image = photo().convert("L").convert("I;16") if mode == "I;16" else photo().convert(mode)
    assert preprocess(make())(image).shape == (1, 16, 24, 3)
    grey = make(Preprocessing((0.5,), (0.5,)), in_channels=1)
    assert preprocess(grey)(image).shape == (1, 16, 24, 1)


def test_as_evaluation_does(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(2):
            image = photo(40 + 10 * i, 60, seed=i + len(name))
            image.save(tmp_path / "val" / name / f"{i}.png")
            image.save(tmp_path / "train" / name / f"{i}.png")
    model = make()
    config = data_config_for(model, "folder", data_dir=str(tmp_path), eval_batch_size=4)
    (batch,) = data.eval_batches(config, "validation", process_index=0, process_count=1)
    files = sorted((tmp_path / "val").glob("*/*.png"))
    got = preprocess(model)([Image.open(file) for file in files])
    np.testing.assert_array_equal(
        got, normalise(jnp.asarray(batch["image"]), config.mean, config.std)
    )


def test_what_the_model_says_is_normalised_with():
    """Defect A: any folder of photos was normalised with ImageNet's numbers."""
    config = data_config_for(make(), "folder", data_dir=".", eval_batch_size=None, flip=0.25)
    assert (config.mean, config.std) == (HALF.mean, HALF.std)
    assert (config.crop_pct, config.interpolation) == (0.8, "bilinear")
    assert (config.image_size, config.channels, config.flip) == ((16, 24), 3, 0.25)
    assert data_config_for(make(), "folder", data_dir=".", mean=(0.0,) * 3).mean == (0.0,) * 3
    unsaid = data_config_for(make(None), "folder", data_dir=".")
    assert unsaid.mean == Preprocessing().mean
    with pytest.raises(InputError, match="meen"):
        data_config_for(make(), "folder", data_dir=".", meen=(0.0,) * 3)


def test_goes_into_the_model():
    model = make()
    variables = model.init(jax.random.key(0), jnp.zeros((1, 16, 24, 3)))
    logits = jax.jit(model.apply)(variables, preprocess(model)([photo(), photo()]))
    assert logits.shape == (2, 3)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "at least one image; got none"),
        (np.zeros((0, 8, 8, 3), np.uint8), "at least one image"),
        (np.zeros((8, 8, 3), np.float32), r"image 0: expected .*uint8.* got float32\[8, 8, 3\]"),
        ([photo(), np.zeros((8, 8), np.uint8)], r"image 1: .*got uint8\[8, 8\]"),
        (np.zeros((8, 8, 5), np.uint8), r"got uint8\[8, 8, 5\]"),
        ([np.zeros((2, 8, 8, 3), np.uint8)], r"got uint8\[2, 8, 8, 3\]"),
        (["cat.png"], r"image 0: expected a Pillow image"),
        ("cat.png", r"expected a Pillow image"),
        (7, "expected images.*got int"),
        (np.zeros((0, 8, 3), np.uint8), r"got uint8\[0, 8, 3\]"),
    ],
)
def test_refusals(images, message):
    with pytest.raises(InputError, match=message) as error:
        preprocess(make())(images)
    assert "\n" not in str(error.value)


def test_a_damaged_image_is_named():
    file = io.BytesIO()
    photo().save(file, "JPEG")
    damaged = Image.open(io.BytesIO(file.getvalue()[:-200]))
    with pytest.raises(InputError, match="image 1 cannot be decoded"):
        preprocess(make())([photo(), damaged])


def test_a_model_that_says_nothing_is_refused():
    with pytest.raises(InputError, match=r"expected .*preprocessing=Preprocessing\(mean"):
        preprocess(make(None))
