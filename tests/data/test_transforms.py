import numpy as np
import pytest
from PIL import Image, ImageEnhance

from tdm_jax import data
from tdm_jax.data import images, transforms
from tests.data.files import encode

BICUBIC = Image.Resampling.BICUBIC
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def smooth(height, width):
    """A picture whose red is the column and green the row, each from 0 to 255."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return pixels


def folder_config(**values):
    values = {"image_size": 64, "rand_augment": "", "color_jitter": 0.0, "flip": 0.0, **values}
    return data.make_config(name="folder", data_dir="unused", **values)


class TestCropBox:
    def boxes(self, size, count=4000, **options):
        rng = np.random.default_rng(0)
        options = {"scale": SCALE, "ratio": RATIO, **options}
        return np.array([transforms.random_crop_box(size, rng, **options) for _ in range(count)])

    def test_lies_inside(self):
        boxes = self.boxes((500, 375))
        assert boxes.min() >= 0
        assert boxes[:, 2].max() <= 500
        assert boxes[:, 3].max() <= 375
        # The borders themselves are reached.
        assert (boxes[:, 0] == 0).any()
        assert (boxes[:, 3] == 375).any()

    def test_area_is_uniform_and_aspect_log_uniform(self):
        # Small crops of a large image always fit, so nothing is rejected.
        boxes = self.boxes((4000, 4000), scale=(0.08, 0.5))
        width, height = (boxes[:, 2] - boxes[:, 0]), (boxes[:, 3] - boxes[:, 1])
        area = np.sort(width * height / 4000**2)
        np.testing.assert_allclose(area, np.linspace(0.08, 0.5, len(area)), atol=0.02)
        aspect = np.sort(np.log(width / height))
        np.testing.assert_allclose(aspect, np.linspace(*np.log(RATIO), len(aspect)), atol=0.03)

    def test_places_are_uniform(self):
        boxes = self.boxes((100, 100), scale=(0.25, 0.25), ratio=(1.0, 1.0))
        assert set(boxes[:, 2] - boxes[:, 0]) == {50}
        counts = np.bincount(boxes[:, 0], minlength=51)
        assert len(counts) == 51
        assert counts.min() > 40

    def test_falls_back_to_the_centre(self):
        # No crop of these ratios with at least half the area fits into a strip.
        assert set(map(tuple, self.boxes((400, 20), 20, scale=(0.5, 1.0)))) == {(186, 0, 213, 20)}
        assert set(map(tuple, self.boxes((1, 1), 20))) == {(0, 0, 1, 1)}


class TestCropAndResize:
    def test_is_crop_then_resize(self):
        pixels = smooth(200, 300)
        box = (30, 20, 230, 170)
        got = transforms.crop_and_resize(
            images.open_image(encode(pixels)), box, (48, 64), 3, BICUBIC
        )
        expected = Image.fromarray(pixels).crop(box).resize((64, 48), BICUBIC)
        difference = np.abs(np.asarray(got, int) - np.asarray(expected, int))
        assert difference.max() <= 2
        assert got.size == (64, 48)

    def test_is_antialiased(self):
        stripes = np.zeros((256, 256, 3), np.uint8)
        stripes[:, ::2] = 255
        got = transforms.crop_and_resize(
            images.open_image(encode(stripes)), (0, 0, 256, 256), (32, 32), 3, BICUBIC
        )
        inner = np.asarray(got)[4:-4, 4:-4]
        assert inner.min() > 120
        assert inner.max() < 135

    def test_large_jpegs_are_decoded_at_a_lower_resolution(self):
        pixels = smooth(1200, 1600)
        box = (200, 100, 1400, 1000)
        image = images.open_image(encode(pixels, "JPEG", quality=95))
        got = transforms.crop_and_resize(image, box, (90, 120), 3, BICUBIC)
        assert image.size == (400, 300)
        expected = Image.fromarray(pixels).crop(box).resize((120, 90), BICUBIC)
        difference = np.abs(np.asarray(got, int) - np.asarray(expected, int))
        assert difference.max() <= 4

    def test_a_jpeg_of_the_usual_size_is_decoded_in_full(self):
        image = images.open_image(encode(smooth(375, 500), "JPEG"))
        transforms.crop_and_resize(image, (0, 0, 500, 375), (224, 224), 3, BICUBIC)
        assert image.size == (500, 375)


class TestColorJitter:
    def test_factors_and_orders(self, monkeypatch):
        seen = []

        def enhancer(name):
            def make(image):
                class Recorder:
                    def enhance(self, factor):
                        seen.append((name, factor))
                        return image

                return Recorder()

            return make

        for name in ("Brightness", "Contrast", "Color"):
            monkeypatch.setattr(ImageEnhance, name, enhancer(name))
        rng = np.random.default_rng(0)
        for _ in range(600):
            transforms.color_jitter(Image.new("RGB", (4, 4)), rng, 0.3)
        factors = np.array([factor for _, factor in seen])
        assert factors.min() == pytest.approx(0.7, abs=0.01)
        assert factors.max() == pytest.approx(1.3, abs=0.01)
        assert factors.mean() == pytest.approx(1.0, abs=0.02)
        orders = {tuple(name for name, _ in seen[i : i + 3]) for i in range(0, len(seen), 3)}
        assert len(orders) == 6

    def test_zero_changes_nothing(self):
        image = Image.fromarray(smooth(20, 20))
        got = transforms.color_jitter(image, np.random.default_rng(0), 0.0)
        assert np.abs(np.asarray(got, int) - np.asarray(image, int)).max() <= 1


class Fixed(np.random.Generator):
    """A generator that gives these uniform draws in turn."""

    def __init__(self, *draws):
        super().__init__(np.random.PCG64(0))
        self.draws = list(draws)

    def uniform(self, low, high):
        value = self.draws.pop(0)
        assert low <= value <= high
        return value


class TestAffine:
    limits = {"shift": 0.25, "scale": 0.5, "degrees": 90.0, "resample": BICUBIC}  # noqa: RUF012

    def image(self):
        pixels = np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8)
        return Image.fromarray(pixels)

    def run(self, degrees, factor, dx, dy):
        rng = Fixed(degrees, factor, dx, dy)
        return np.asarray(transforms.random_affine(self.image(), rng, **self.limits))

    def test_identity(self):
        np.testing.assert_array_equal(self.run(0.0, 1.0, 0.0, 0.0), np.asarray(self.image()))

    def test_shift(self):
        got, pixels = self.run(0.0, 1.0, 0.25, -0.125), np.asarray(self.image())
        np.testing.assert_array_equal(got[:-2, 4:], pixels[2:, :-4])
        assert got[:, :4].max() == 0
        assert got[-2:].max() == 0

    def test_quarter_turn_is_about_the_centre(self):
        got = self.run(90.0, 1.0, 0.0, 0.0).astype(int)
        np.testing.assert_allclose(got, np.rot90(np.asarray(self.image()), -1), atol=1)

    def test_scale_is_about_the_centre(self):
        dot = np.zeros((16, 16), np.uint8)
        dot[4:12, 4:12] = 255
        rng = Fixed(0.0, 0.5, 0.0, 0.0)
        got = np.asarray(transforms.random_affine(Image.fromarray(dot), rng, **self.limits))
        assert got[6:10, 6:10].min() > 200
        assert got[:5].max() < 30
        assert got[11:].max() < 30

    def test_draws_stay_within_their_limits(self):
        seen = []

        class Recorder(np.random.Generator):
            def uniform(self, low, high):
                seen.append((low, high))
                return super().uniform(low, high)

        rng = Recorder(np.random.PCG64(0))
        transforms.random_affine(
            self.image(), rng, shift=0.08, scale=0.1, degrees=10.0, resample=BICUBIC
        )
        assert seen == [(-10.0, 10.0), (0.9, 1.1), (-0.08, 0.08), (-0.08, 0.08)]


class TestEvaluation:
    # Sizes as torchvision's Resize(256) and CenterCrop(224) compute them.
    @pytest.mark.parametrize(
        ("size", "resized", "corner"),
        [
            ((500, 375), (341, 256), (58, 16)),
            ((375, 500), (256, 341), (16, 58)),
            ((256, 256), (256, 256), (16, 16)),
            ((333, 1001), (256, 769), (16, 272)),
            ((100, 80), (320, 256), (48, 16)),
        ],
    )
    def test_resize_and_crop_are_torchvisions(self, size, resized, corner):
        image = Image.fromarray(smooth(*size[::-1]))
        got = transforms.resize_and_center_crop(image, (224, 224), 0.875, BICUBIC)
        left, top = corner
        expected = image.resize(resized, BICUBIC).crop((left, top, left + 224, top + 224))
        np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))

    def test_whole_image_without_a_margin(self):
        image = Image.fromarray(smooth(384, 384))
        got = transforms.resize_and_center_crop(image, (384, 384), 1.0, BICUBIC)
        np.testing.assert_array_equal(np.asarray(got), np.asarray(image))

    def test_other_shapes_are_covered(self):
        for size in ((100, 300), (300, 100), (97, 131)):
            image = Image.fromarray(smooth(*size))
            got = transforms.resize_and_center_crop(image, (64, 32), 0.9, BICUBIC)
            assert got.size == (32, 64)
            # No black border: blue is 0, but red and green rise to the middle.
            centre = np.asarray(got, int)[32, 16]
            assert centre[0] == pytest.approx(128, abs=6)
            assert centre[1] == pytest.approx(128, abs=6)

    def test_digits_are_enlarged(self):
        config = data.make_config(name="digits")
        pixels = np.zeros((8, 8, 1), np.uint8)
        pixels[2:6, 2:6] = 255
        got = transforms.EvalTransform(config)(images.open_image(pixels))
        assert (got.shape, got.dtype) == ((28, 28, 1), np.uint8)
        assert got[14, 14, 0] > 240
        assert got[1, 1, 0] == 0


class TestTraining:
    def run(self, config, pixels=None, seed=0):
        image = images.open_image(encode(smooth(100, 120) if pixels is None else pixels))
        return transforms.TrainTransform(config)(image, np.random.default_rng(seed))

    def test_flips_as_often_as_told(self):
        config = folder_config(flip=0.25, crop_scale=(1.0, 1.0), crop_ratio=(1.2, 1.2))
        falling = [bool(np.diff(self.run(config, seed=s)[32, :, 0].astype(int)).mean() < 0)
                   for s in range(300)]  # fmt: skip
        assert np.mean(falling) == pytest.approx(0.25, abs=0.08)

    def test_full_crop_without_draws_is_a_resize(self):
        config = folder_config(crop_scale=(1.0, 1.0), crop_ratio=(1.2, 1.2))
        expected = Image.fromarray(smooth(100, 120)).resize((64, 64), BICUBIC)
        np.testing.assert_array_equal(self.run(config), np.asarray(expected))

    def test_color_jitter_only_without_rand_augment(self, monkeypatch):
        calls = []
        monkeypatch.setattr(
            transforms, "color_jitter", lambda image, rng, amount: calls.append(amount) or image
        )
        self.run(folder_config(color_jitter=0.3, rand_augment="rand-m9"))
        assert calls == []
        self.run(folder_config(color_jitter=0.3))
        assert calls == [0.3]
        self.run(folder_config())
        assert calls == [0.3]

    def test_rand_augment_fills_with_the_mean(self):
        # Rotations of a white image: what is neither white nor mixed with white is the mean.
        config = folder_config(rand_augment="rand-m10-n8-p1", interpolation="lanczos")
        white = np.full((100, 100, 3), 255, np.uint8)
        seen = {tuple(self.run(config, white, seed)[0, 0]) for seed in range(60)}
        assert (124, 116, 104) in seen

    def test_none_is_the_evaluation(self):
        config = folder_config(augmentation="none")
        expected = transforms.EvalTransform(config)(images.open_image(encode(smooth(100, 120))))
        np.testing.assert_array_equal(self.run(config), expected)

    @pytest.mark.parametrize("augmentation", ["crop", "affine", "none"])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_shapes(self, augmentation, channels):
        config = folder_config(
            augmentation=augmentation, channels=channels, mean=(0.5,) * channels,
            std=(0.5,) * channels, image_size=(32, 48), rand_augment="rand-m9", flip=0.5,
        )  # fmt: skip
        got = self.run(config)
        assert (got.shape, got.dtype) == ((32, 48, channels), np.uint8)

    def test_one_generator_one_picture(self):
        config = folder_config(rand_augment="rand-m9-mstd0.5-inc1", flip=0.5)
        np.testing.assert_array_equal(self.run(config, seed=5), self.run(config, seed=5))
        assert (self.run(config, seed=5) != self.run(config, seed=6)).any()
