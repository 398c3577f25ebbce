import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tdm_jax import data
from tdm_jax.data import device_transforms
from tdm_jax.errors import InputError

COLLECTIVES = r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"


def config(**values):
    return data.make_config(name="folder", data_dir="unused", **values)


def uint8_images(count, size=24, channels=3, seed=0):
    shape = (count, size, size, channels)
    return jnp.asarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def keys(count):
    return jax.random.split(jax.random.key(0), count)


class TestNormalise:
    def test_values(self):
        images = jnp.asarray([[[[0, 255, 51]]]], jnp.uint8)
        got = device_transforms.normalise(images, (0.5, 0.25, 0.2), (0.5, 0.25, 0.1))
        np.testing.assert_allclose(got, [[[[-1.0, 3.0, 0.0]]]], atol=1e-6)

    def test_computes_in_float32_whatever_the_dtype(self):
        images = uint8_images(2)
        full = device_transforms.normalise(images, (0.485,) * 3, (0.229,) * 3)
        half = device_transforms.normalise(images, (0.485,) * 3, (0.229,) * 3, jnp.bfloat16)
        assert half.dtype == jnp.bfloat16
        np.testing.assert_array_equal(half, full.astype(jnp.bfloat16))


class TestTargets:
    def test_smoothing_is_spread_over_all_classes(self):
        got = device_transforms.smooth_targets(jnp.asarray([2, 0]), 5, 0.1)
        np.testing.assert_allclose(got[0], [0.02, 0.02, 0.92, 0.02, 0.02], atol=1e-6)
        np.testing.assert_allclose(got[1].argmax(), 0)

    def test_without_smoothing_they_are_one_hot(self):
        np.testing.assert_array_equal(
            device_transforms.smooth_targets(jnp.asarray([1]), 3), [[0, 1, 0]]
        )


class TestErasing:
    @staticmethod
    @functools.cache
    def erased(prob=1.0):
        """Which pixels of zero images changed, and what came there."""
        images = jnp.zeros((1000, 32, 32, 3))
        got = jax.jit(device_transforms.random_erasing, static_argnums=2)(
            jax.random.key(1), images, prob
        )
        got = np.asarray(got)
        return (got != 0).any(-1), got

    def test_probability(self):
        changed, _ = self.erased(prob=0.25)
        assert changed.any((1, 2)).mean() == pytest.approx(0.25, abs=0.045)

    def test_the_box_is_one_filled_rectangle(self):
        changed, _ = self.erased()
        for mask in changed[:200]:
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            inside = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert inside.all()
            assert inside.sum() == mask.sum()

    def test_area_and_aspect(self):
        changed, _ = self.erased()
        area = changed.mean((1, 2))
        assert area.min() > 0.015
        assert area.max() < 1 / 3 + 0.02
        # Large, very oblong boxes do not fit and are drawn again: a little less than the mean.
        assert area.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.012)
        aspect = np.log(changed.any(2).sum(1) / changed.any(1).sum(1))
        assert np.abs(aspect).max() < np.log(1 / 0.3) + 0.15
        assert aspect.mean() == pytest.approx(0.0, abs=0.05)
        assert aspect.std() > 0.55

    def test_every_place_is_reached_alike(self):
        changed, _ = self.erased()
        share = changed.mean(0)
        assert share[16, 16] == share.max() or share[16, 16] > 0.9 * share.max()
        np.testing.assert_allclose(share, share[::-1, ::-1], atol=0.08)
        assert changed[:, 0].any()
        assert changed[:, -1].any()
        assert changed[:, :, 0].any()
        assert changed[:, :, -1].any()

    def test_noise_is_standard_normal_for_each_channel(self):
        changed, got = self.erased()
        noise = got[:400][changed[:400]]
        assert noise.mean() == pytest.approx(0.0, abs=0.01)
        assert noise.std() == pytest.approx(1.0, abs=0.01)
        assert abs(np.corrcoef(noise[:, 0], noise[:, 1])[0, 1]) < 0.02

    def test_the_rest_stays(self):
        images = device_transforms.normalise(uint8_images(50), (0.5,) * 3, (0.25,) * 3)
        got = np.asarray(device_transforms.random_erasing(jax.random.key(0), images, 1.0))
        same = (got == np.asarray(images)).all(-1)
        assert 0.6 < same.mean() < 0.98

    def test_none(self):
        images = jnp.ones((4, 8, 8, 3))
        np.testing.assert_array_equal(
            device_transforms.random_erasing(keys(1)[0], images, 0.0), images
        )


class TestMixing:
    """Rows 2i are white with class 0, rows 2i + 1 black with class 1."""

    @staticmethod
    @functools.cache
    def all(**settings):
        """Many draws: images [draws, 4, h, w] and targets [draws, 4, 2]."""
        settings = {"mixup": 0.8, "cutmix": 1.0, **settings}
        rows = jnp.asarray([1.0, 0.0] * 2)
        images = jnp.broadcast_to(rows[:, None, None, None], (4, 24, 24, 1))
        targets = jnp.stack([rows, 1 - rows], 1)
        mix = jax.jit(
            jax.vmap(lambda key: device_transforms.mix_pairs(key, images, targets, **settings))
        )
        images, targets = mix(keys(2000))
        return np.asarray(images)[..., 0], np.asarray(targets)

    def test_targets_are_the_share_of_pixels(self):
        images, targets = self.all()
        np.testing.assert_allclose(targets[..., 0], images.mean((2, 3)), atol=1e-5)
        np.testing.assert_allclose(targets.sum(-1), 1.0, atol=1e-6)

    def test_both_of_a_pair_get_the_same_share_of_themselves(self):
        images, _ = self.all()
        np.testing.assert_allclose(images[:, 0], 1 - images[:, 1], atol=1e-6)
        np.testing.assert_array_equal(images[:, :2], images[:, 2:])

    def test_mixup_share_is_beta(self):
        images, targets = self.all(cutmix=0.0)
        share = targets[:, 0, 0]
        np.testing.assert_allclose(images.std((2, 3)), 0, atol=1e-6)
        assert share.mean() == pytest.approx(0.5, abs=0.03)
        # The variance of Beta(a, a) is 1 / (4 (2a + 1)).
        assert share.var() == pytest.approx(1 / (4 * 2.6), abs=0.01)

    @pytest.mark.parametrize("alpha", [0.2, 0.5, 0.8, 1.0, 4.0])
    def test_two_uniform_draws_make_one_of_beta(self, alpha):
        # Midpoints of a grid: quadrature instead of chance.
        u, v = (jnp.arange(2000) + 0.5) / 2000, (jnp.arange(512) + 0.5) / 512
        draws = np.asarray(device_transforms.symmetric_beta(u[:, None], v, alpha))
        assert (draws >= 0).all()
        assert (draws <= 1).all()
        assert draws.mean() == pytest.approx(0.5, abs=1e-3)
        for at in (0.02, 0.1, 0.3, 0.6, 0.95):
            expected = jax.scipy.special.betainc(alpha, alpha, at)
            assert (draws < at).mean() == pytest.approx(float(expected), abs=3e-3)

    def test_the_corners_of_the_uniform_square_are_numbers(self):
        corners = jnp.asarray([0.0, 0.25, 0.5, 0.75, np.nextafter(np.float32(1), np.float32(0))])
        for alpha in (0.05, 0.8, 1.0):
            draws = device_transforms.symmetric_beta(corners[:, None], corners, alpha)
            assert np.isfinite(draws).all()

    def test_cutmix_share_and_box(self):
        images, targets = self.all(mixup=0.0)
        assert set(np.unique(images[:, 0])) == {0.0, 1.0}
        # λ is uniform and the box's centre anywhere: clipping it favours the image itself.
        half = np.floor(24 * np.sqrt(1 - np.linspace(0, 1, 400))) // 2
        centre = np.arange(24)[:, None]
        length = np.minimum(centre + half, 24) - np.maximum(centre - half, 0)
        expected = 1 - ((length.mean(0) / 24) ** 2).mean()
        assert targets[:, 0, 0].mean() == pytest.approx(expected, abs=0.02)
        for image in images[:100, 0]:
            hole = image == 0
            rows, columns = np.flatnonzero(hole.any(1)), np.flatnonzero(hole.any(0))
            if rows.size:
                assert hole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        # Boxes are cut off at all four borders.
        holes = images[:, 0] == 0
        assert holes[:, 0].any()
        assert holes[:, -1].any()
        assert holes[:, :, 0].any()
        assert holes[:, :, -1].any()

    def test_switch_decides_between_them(self):
        for switch in (0.0, 0.3, 1.0):
            images, _ = self.all(switch=switch)
            binary = np.isin(images[:, 0], (0.0, 1.0)).all((1, 2))
            assert binary.mean() == pytest.approx(switch, abs=0.05)

    def test_only_some_batches(self):
        images, targets = self.all(prob=0.25)
        untouched = (images[:, 0] == 1).all((1, 2))
        assert untouched.mean() == pytest.approx(0.75, abs=0.06)
        np.testing.assert_array_equal(targets[untouched][:, :, 0], [[1, 0, 1, 0]] * untouched.sum())

    def test_an_odd_batch_is_refused(self):
        with pytest.raises(InputError, match="need an even batch, got 3 images"):
            device_transforms.mix_pairs(
                keys(1)[0], jnp.zeros((3, 8, 8, 3)), jnp.zeros((3, 2)), mixup=0.8, cutmix=1.0
            )


class TestBatch:
    def run(self, key=None, count=16, num_classes=10, dtype=jnp.float32, **values):
        key = jax.random.key(3) if key is None else key
        labels = jnp.arange(count, dtype=jnp.int32) % num_classes
        images = uint8_images(count)
        return device_transforms.augment_batch(
            key, images, labels, config(**values), num_classes, dtype
        )

    def test_all_off_is_normalising(self):
        off = {"erasing": 0.0, "mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0}
        images, targets = self.run(**off)
        expected = device_transforms.normalise(uint8_images(16), config().mean, config().std)
        np.testing.assert_array_equal(images, expected)
        np.testing.assert_array_equal(targets, jax.nn.one_hot(jnp.arange(16) % 10, 10))
        images, _ = self.run(count=3, **off)
        assert images.shape[0] == 3

    def test_each_switch_alone(self):
        plain = device_transforms.normalise(uint8_images(16), config().mean, config().std)
        off = {"erasing": 0.0, "mixup": 0.0, "cutmix": 0.0}
        images, _ = self.run(**{**off, "erasing": 1.0})
        assert 0.05 < float((images != plain).any(-1).mean()) < 0.4
        for kind in ("mixup", "cutmix"):
            images, targets = self.run(**{**off, kind: 1.0})
            assert (images != plain).any()
            assert int((targets > 0.011).sum(-1).max()) == 2

    def test_targets_add_up_to_one(self):
        _, targets = self.run()
        np.testing.assert_allclose(targets.sum(-1), 1, atol=1e-6)
        assert float(targets.min()) == pytest.approx(0.01)

    def test_dtype(self):
        images, targets = self.run(dtype=jnp.bfloat16)
        assert images.dtype == jnp.bfloat16
        assert targets.dtype == jnp.float32

    def test_key_decides(self):
        first, again, other = (self.run(jax.random.key(s))[0] for s in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()

    def test_grey_images(self):
        grey = config(channels=1, mean=(0.5,), std=(0.5,))
        images = uint8_images(4, channels=1)
        got, _ = device_transforms.augment_batch(
            jax.random.key(0), images, jnp.zeros(4, jnp.int32), grey, 2
        )
        assert got.shape == images.shape


class TestSharded:
    def compiled(self, devices, images, labels):
        mesh = jax.make_mesh(
            (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
        )
        rows = NamedSharding(mesh, PartitionSpec("data"))
        step = jax.jit(
            lambda key, images, labels: device_transforms.augment_batch(
                key, images, labels, config(), 10
            ),
            in_shardings=(NamedSharding(mesh, PartitionSpec()), rows, rows),
            out_shardings=(rows, rows),
        )
        return step.lower(jax.random.key(5), images, labels).compile()

    @pytest.mark.parametrize("rows_each", [2, 6])
    def test_no_communication(self, rows_each):
        count = 8 * rows_each
        program = self.compiled(8, uint8_images(count), jnp.zeros(count, jnp.int32)).as_text()
        assert not re.search(COLLECTIVES, program)
        # Nor does every device work on the whole batch: not even its noise.
        assert f"f32[{rows_each},24,24,3]" in program
        assert f"f32[{count},24,24,3]" not in program

    def test_one_row_a_device_would_communicate(self):
        # What the pairing needs, so that the test above is known to be able to fail.
        program = self.compiled(8, uint8_images(8), jnp.zeros(8, jnp.int32)).as_text()
        assert re.search(COLLECTIVES, program)

    @pytest.mark.parametrize("devices", [2, 4, 8])
    def test_the_same_on_any_number_of_devices(self, devices):
        images, labels = uint8_images(16), jnp.arange(16, dtype=jnp.int32) % 10
        key = jax.random.key(5)
        expected = self.compiled(1, images, labels)(key, images, labels)
        got = self.compiled(devices, images, labels)(key, images, labels)
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)
