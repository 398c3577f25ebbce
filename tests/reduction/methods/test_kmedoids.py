"""K-Medoids: equal to its original, and to a slow reference. With `tdm_jax.reduction.medoids`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import make_reducer
from tdm_jax.errors import InputError
from tdm_jax.reduction import ViTShape
from tdm_jax.reduction.medoids import medoids


@pytest.mark.golden
@pytest.mark.parametrize("keep_rate", [0.7, 0.5])
def test_equals_the_original(answer, golden, keep_rate):
    expected = golden(f"kmedoids_keep{keep_rate}")
    logits, info = answer(make_reducer("kmedoids", keep_rate=keep_rate))
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    assert [n + 1 for n in info.token_counts] == expected["tokens"].tolist()
    assert info.carry == {}


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_against_the_reference(iterations):
    draw = np.random.default_rng(iterations)
    tokens, weight = draw.standard_normal((13, 5)), draw.random(13)
    distance = np.linalg.norm(tokens[:, None] - tokens, axis=-1)
    centres = np.argsort(-weight)[:4]
    for _ in range(iterations):
        joins = distance[:, centres].argmin(1)
        cost = weight * distance.sum(1)
        centres = [min(np.flatnonzero(joins == c), key=lambda i: cost[i]) for c in range(4)]
    run = jax.jit(medoids, static_argnums=(2, 3))
    merge = run(jnp.array(tokens)[None], jnp.array(weight)[None], 4, iterations)
    np.testing.assert_array_equal(merge.keep[0], centres)
    np.testing.assert_array_equal(merge.route(13)[0], distance[:, centres].argmin(1))


def test_equal_tokens_are_centres_of_their_own():
    tokens = jnp.array([[[0.0], [0.0], [0.0], [5.0], [0.0]]])
    for iterations in (0, 1, 3):
        merge = medoids(tokens, jnp.array([[0.1, 0.4, 0.2, 0.25, 0.05]]), 3, iterations)
        assert sorted(merge.keep[0].tolist() + merge.gone[0].tolist()) == list(range(5))
        sizes = np.bincount(np.asarray(merge.route(5)[0]), minlength=3)
        assert sorted(sizes.tolist()) == [1, 1, 3]


def test_bad_settings():
    with pytest.raises(InputError, match="in the block before .* layers from 1; got 0, 3"):
        make_reducer("kmedoids", layers=(0, 3)).check(ViTShape((2, 3), 4, 8, 2))
    with pytest.raises(InputError, match="iterations must be at least 0; got -1"):
        make_reducer("kmedoids", iterations=-1)
