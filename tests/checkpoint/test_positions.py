"""Position embeddings resampled as PyTorch does it."""

import numpy as np
import pytest

from tdm_jax.checkpoint.positions import resample_positions
from tdm_jax.models.vit import INTERPOLATIONS

TABLE = np.array([[3, -1, 4, 1], [-5, 9, 2, -6], [5, 3, -5, 8]], np.float32)
# TABLE at 2 x 6, fewer rows and more columns, by torch 2.13's interpolate in float64.
EXPECTED = {
    "bicubic_antialias": [[-0.3941032, 1.1336984, 3.0761102, 3.8374799, 0.6699084, -2.3791501],
                          [0.8954972, 3.6915305, 4.708965, -1.9174544, -0.2233028, 3.178846]],
    "bicubic": [[0.7803277, 0.9390869, 1.9491871, 3.8944815, 1.574585, -1.500963],
                [2.2571343, 4.3503418, 3.5907073, -2.9692066, -0.2194824, 5.2822401]],
    "bicubic_offset": [[1.2201837, 0.8901778, 1.4333201, 3.7480717, 2.0788703, -0.998769],
                       [0.6972167, 4.0565544, 4.9544484, -1.6426872, -1.1316659, 3.1523267]],
    "bilinear_antialias": [[0.0, 1.375, 2.8333333, 3.1666667, 0.8125, -1.625],
                           [1.25, 3.25, 3.9791667, -1.1041667, 0.1875, 2.75]],
    "bilinear": [[1.0, 1.25, 1.8333333, 3.1666667, 1.375, -0.75],
                 [2.5, 3.5, 3.2083333, -1.9583333, 0.625, 4.5]],
}  # fmt: skip


def _positions(prefix):
    """TABLE and its negative as two channels, behind prefix tokens 7, 8, ..."""
    tokens = np.concatenate([np.arange(7, 7 + prefix, dtype=np.float32), TABLE.reshape(-1)])
    return np.stack([tokens, -tokens], axis=-1)[None]


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("interpolation", EXPECTED)
def test_as_torch(interpolation, prefix):
    got = resample_positions(_positions(prefix), prefix, (3, 4), (2, 6), interpolation)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got[0, :prefix, 0], np.arange(7, 7 + prefix))
    expected = np.reshape(EXPECTED[interpolation], -1)
    np.testing.assert_allclose(got[0, prefix:], np.stack([expected, -expected], -1), atol=1e-6)


@pytest.mark.parametrize("interpolation", EXPECTED)
def test_the_same_grid_changes_nothing_and_a_constant_stays(interpolation):
    positions = _positions(1)
    got = resample_positions(positions, 1, (3, 4), (3, 4), interpolation)
    np.testing.assert_array_equal(got, positions)
    got = resample_positions(np.ones((1, 1, 2), np.float32), 0, (1, 1), (5, 3), interpolation)
    np.testing.assert_allclose(got, np.ones((1, 15, 2)), atol=1e-6)


def test_every_interpolation_of_the_models():
    assert set(EXPECTED) == set(INTERPOLATIONS)
