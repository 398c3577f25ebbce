"""Distances and similarities of tokens, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax.ops.distances import cosine_similarity, nearest, pairwise_distance, unit


@pytest.fixture
def draw():
    return np.random.default_rng(0)


def test_distances_far_from_the_origin(draw):
    x, y = 300.0 + draw.standard_normal((2, 2, 5, 7))
    expected = np.linalg.norm(x[:, :, None] - y[:, None], axis=-1)
    distance = pairwise_distance(jnp.array(x, jnp.float32), jnp.array(y, jnp.float32))
    np.testing.assert_allclose(distance, expected, rtol=1e-4)
    assert pairwise_distance(jnp.array(x, jnp.bfloat16)).dtype == jnp.float32


def test_distances_have_a_gradient_where_a_token_meets_itself(draw):
    x = jnp.array(draw.standard_normal((1, 4, 3)), jnp.float32)
    gradient = jax.grad(lambda x: pairwise_distance(x).sum())(x)
    assert np.isfinite(gradient).all()


def test_cosine(draw):
    x, y = draw.standard_normal((2, 1, 4, 3))
    expected = (x @ y.swapaxes(1, 2)) / (
        np.linalg.norm(x, axis=-1)[..., None] * np.linalg.norm(y, axis=-1)[:, None]
    )
    np.testing.assert_allclose(cosine_similarity(jnp.array(x), jnp.array(y)), expected, rtol=1e-5)
    assert np.isfinite(cosine_similarity(jnp.zeros((1, 2, 3)), jnp.array(x))).all()
    np.testing.assert_allclose(np.linalg.norm(unit(jnp.array(x)), axis=-1), 1.0, rtol=1e-5)


def test_nearest_centre_and_no_empty_cluster():
    distance = pairwise_distance(jnp.array([[[0.0], [1.0], [5.0], [6.0], [6.0]]]))
    np.testing.assert_array_equal(nearest(distance, jnp.array([[2, 1]])), [[1, 1, 0, 0, 0]])
    # Two centres of the same value: each stays with itself.
    np.testing.assert_array_equal(nearest(distance, jnp.array([[3, 4]])), [[0, 0, 0, 0, 1]])
