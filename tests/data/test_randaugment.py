import collections

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from tdm_jax.data import randaugment
from tdm_jax.data.randaugment import RandAugment
from tdm_jax.errors import InputError

GREY = (124, 116, 104)


class Coin(np.random.Generator):
    """A generator whose sign draws all fall on one side."""

    def __init__(self, sign):
        super().__init__(np.random.PCG64(0))
        self.sign = sign

    def random(self):
        return 0.75 if self.sign > 0 else 0.25


def photo(seed=0, size=(40, 48)):
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(noise).resize(size[::-1], Image.Resampling.BICUBIC)


def changed(name, magnitude, sign=1, image=None, **options):
    options = {"fill": GREY, "increasing": True, **options}
    return randaugment.apply(name, image or photo(), magnitude, Coin(sign), **options)


def same(got, expected):
    np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


def test_the_specification_of_deit():
    policy = randaugment.parse("rand-m9-mstd0.5-inc1")
    assert policy == RandAugment(
        magnitude=9, layers=2, prob=0.5, std=0.5, limit=10, increasing=True
    )


def test_other_specifications():
    policy = randaugment.parse("rand-n3-m7.5-p0.8-mstd101-mmax9-inc0")
    assert policy == RandAugment(7.5, 3, 0.8, 101, 9, False)
    assert randaugment.parse("rand") == RandAugment()


@pytest.mark.parametrize(
    "spec",
    ["", "augmix-m3", "rand-x3", "rand-m", "rand-m1.2.3", "rand-p2", "rand-mmax11", "rand-n1.5"],
)
def test_specifications_that_mean_nothing(spec):
    with pytest.raises(InputError, match="rand_augment: got"):
        randaugment.parse(spec)


def test_there_are_the_fifteen_operations():
    assert sorted(randaugment.OPERATIONS) == [
        "AutoContrast", "Brightness", "Color", "Contrast", "Equalize", "Invert", "Posterize",
        "Rotate", "Sharpness", "ShearX", "ShearY", "Solarize", "SolarizeAdd", "TranslateX",
        "TranslateY",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["Color", "Contrast", "Brightness", "Sharpness"])
def test_enhancements_move_away_from_one(name):
    enhance = getattr(ImageEnhance, name)(photo()).enhance
    same(changed(name, 10, 1), enhance(1.9))
    same(changed(name, 9, 1), enhance(1.81))
    same(changed(name, 5, -1), enhance(0.55))
    same(changed(name, 10, -1), enhance(0.1))
    same(changed(name, 0, -1), photo())
    # The plain variant runs from 0.1 to 1.9 and has no sign.
    same(changed(name, 5, -1, increasing=False), enhance(1.0))
    same(changed(name, 10, -1, increasing=False), enhance(1.9))


def test_posterize_keeps_fewer_bits_the_stronger_it_is():
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])

    def levels(magnitude, increasing=True):
        return len(np.unique(changed("Posterize", magnitude, 1, ramp, increasing=increasing)))

    assert [levels(m) for m in (0, 2.5, 5, 9, 10)] == [16, 8, 4, 2, 1]
    assert [levels(m, increasing=False) for m in (10, 9, 5)] == [16, 8, 4]
    same(changed("Posterize", 9), ImageOps.posterize(photo(), 1))
    assert np.asarray(changed("Posterize", 10)).max() == 0


def test_solarize_inverts_more_the_stronger_it_is():
    same(changed("Solarize", 9), ImageOps.solarize(photo(), 256 - 230))
    same(changed("Solarize", 0), photo())
    same(changed("Solarize", 10), ImageOps.invert(photo()))
    same(changed("Solarize", 10, increasing=False), photo())


def test_solarize_add_lightens_the_dark_half():
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    got = np.asarray(changed("SolarizeAdd", 9, 1, ramp))[0].astype(int)
    assert (got[:128] == np.arange(128) + 99).all()
    assert (got[128:] == np.arange(128, 256)).all()


@pytest.mark.parametrize("name", ["AutoContrast", "Equalize", "Invert"])
def test_operations_without_a_magnitude(name):
    function = getattr(ImageOps, name.lower())
    same(changed(name, 1), function(photo()))
    same(changed(name, 9, -1), function(photo()))


def test_rotation_angle_direction_and_fill():
    image = photo()
    bicubic = {"resample": Image.Resampling.BICUBIC, "fillcolor": GREY}
    same(changed("Rotate", 9, 1), image.rotate(27, **bicubic))
    same(changed("Rotate", 10, -1), image.rotate(-30, **bicubic))
    assert changed("Rotate", 10).getpixel((0, 0)) == GREY


@pytest.mark.parametrize(("name", "axis"), [("TranslateX", 0), ("TranslateY", 1)])
def test_translation_is_a_share_of_the_side(name, axis):
    image = photo(size=(40, 80))
    pixels = np.asarray(image)
    got = np.asarray(changed(name, 10 * 0.25 / 0.45, 1, image))
    shift = image.size[axis] // 4
    moved = np.full_like(pixels, GREY)
    if axis == 0:
        moved[:, :-shift] = pixels[:, shift:]
    else:
        moved[:-shift] = pixels[shift:]
    same(got, moved)
    back = np.asarray(changed(name, 10, -1, image))
    uncovered = (back == np.array(GREY)).all(-1).all(axis)
    assert int(uncovered.sum()) == pytest.approx(0.45 * image.size[axis], abs=1)
    assert uncovered[0]


@pytest.mark.parametrize(("name", "axis"), [("ShearX", 0), ("ShearY", 1)])
def test_shear_grows_along_the_other_axis(name, axis):
    white = Image.new("RGB", (100, 100), "white")
    uncovered = (np.asarray(changed(name, 10, 1, white)) == np.array(GREY)).all(-1)
    along = uncovered.sum(1 - axis)
    # At 0.3, the far end is uncovered by 30 of 100 pixels, the near one by none.
    assert along[0] <= 1
    assert along[-1] == pytest.approx(30, abs=1)
    assert along[50] == pytest.approx(15, abs=1)


@pytest.mark.parametrize("name", sorted(randaugment.OPERATIONS))
def test_grey_images_and_sizes_survive(name):
    for image, fill in ((photo(), GREY), (photo().convert("L"), 116)):
        got = changed(name, 9, -1, image, fill=fill)
        assert (got.mode, got.size) == (image.mode, image.size)


def draws(monkeypatch, policy, count):
    """What `policy` applies to `count` images, as (name, magnitude)."""
    seen = []

    def record(name, image, magnitude, rng, **options):
        seen.append((name, magnitude))
        return image

    monkeypatch.setattr(randaugment, "apply", record)
    rng = np.random.default_rng(0)
    for _ in range(count):
        policy(photo(), rng, fill=GREY, resample=Image.Resampling.BICUBIC)
    return seen


def test_how_often_and_how_strong(monkeypatch):
    seen = draws(monkeypatch, randaugment.parse("rand-m9-mstd0.5-inc1"), 4000)
    # Two draws of probability one half: one operation an image, each of fifteen alike.
    assert len(seen) == pytest.approx(4000, abs=4 * np.sqrt(8000 * 0.25))
    counts = collections.Counter(name for name, _ in seen)
    expected = len(seen) / 15
    assert all(abs(n - expected) < 4.5 * np.sqrt(expected) for n in counts.values())
    assert len(counts) == 15
    strength = np.array([magnitude for _, magnitude in seen])
    assert strength.max() == 10.0
    assert np.mean(strength) == pytest.approx(9.0, abs=0.03)
    assert np.std(strength) == pytest.approx(0.5, abs=0.03)


def test_constant_and_uniform_magnitudes(monkeypatch):
    assert {m for _, m in draws(monkeypatch, randaugment.parse("rand-m7"), 50)} == {7.0}
    uniform = [m for _, m in draws(monkeypatch, randaugment.parse("rand-m8-mstd101"), 2000)]
    assert min(uniform) < 0.1
    assert max(uniform) == pytest.approx(8.0, abs=0.1)


def test_the_generator_decides_everything():
    policy = randaugment.parse("rand-m9-mstd0.5-inc1-n4")

    def run(seed):
        rng = np.random.default_rng(seed)
        return np.asarray(policy(photo(), rng, fill=GREY, resample=Image.Resampling.BICUBIC))

    same(run(3), run(3))
    assert any((run(3) != run(seed)).any() for seed in range(4, 8))
