"""Rotary positions against complex numbers in NumPy, and the token's place that they follow."""

import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax.errors import InputError
from tdm_jax.models.rotary import Rotary

GRID, PREFIX, CHANNELS = (3, 5), 2, 16
PLACES = np.indices(GRID).reshape(2, -1).T.astype(np.float32)
KINDS = [Rotary(), Rotary(1e4, interleaved=True, reference_grid=16)]


def by_complex_numbers(rotary, places, x):
    """The definition: each pair of channels is a complex number, which is turned by an angle."""
    pairs = x.shape[-1] // 2
    if rotary.reference_grid is None:
        at = 2 * np.pi * (2 * (places + 0.5) / GRID - 1)
    else:
        at = places * rotary.reference_grid / np.asarray(GRID)
    angles = np.zeros((x.shape[1], pairs))
    for i in range(pairs // 2):
        frequency = rotary.temperature ** (-2 * i / pairs)
        angles[PREFIX:, i] = at[:, 0] * frequency
        angles[PREFIX:, pairs // 2 + i] = at[:, 1] * frequency
    real, imaginary = (x[..., ::2], x[..., 1::2]) if rotary.interleaved else np.split(x, 2, -1)
    turned = (real + 1j * imaginary) * np.exp(1j * angles)[None, :, None]
    if rotary.interleaved:
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
    return np.concatenate([turned.real, turned.imag], axis=-1)


@pytest.mark.parametrize("rotary", KINDS)
def test_pairs_of_channels_turn_by_their_place(rotary):
    x = np.random.default_rng(0).normal(size=(2, PREFIX + len(PLACES), 3, CHANNELS))
    x = x.astype(np.float32)
    y = rotary.rotation(jnp.asarray(PLACES[None]), GRID, PREFIX, CHANNELS)(jnp.asarray(x))
    np.testing.assert_allclose(y, by_complex_numbers(rotary, PLACES, x), atol=2e-5)
    np.testing.assert_array_equal(y[:, :PREFIX], x[:, :PREFIX])  # what is no patch has no place


@pytest.mark.parametrize("rotary", KINDS)
def test_a_place_between_two_patches_turns_by_the_angle_between(rotary):
    between = PLACES[None, :1] * 0.25 + PLACES[None, 7:8] * 0.75
    x = np.ones((1, PREFIX + 1, 1, CHANNELS), np.float32)
    y = rotary.rotation(jnp.asarray(between), GRID, PREFIX, CHANNELS)(jnp.asarray(x))
    np.testing.assert_allclose(y, by_complex_numbers(rotary, between[0], x), atol=1e-5)


@pytest.mark.parametrize("rotary", KINDS)
def test_a_description_builds_it_again(rotary):
    assert Rotary.from_description(rotary.describe()) == rotary


def test_an_unknown_setting_is_refused():
    with pytest.raises(InputError, match="rotary: got .*theta"):
        Rotary.from_description({"theta": 100})
