"""Fidelity: what it is of the unreduced model itself, of dropped and of merged patches.

Covers tdm_jax.analysis.answers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import make_reducer
from tdm_jax.analysis.candidate import Candidate
from tdm_jax.analysis.fidelity import Fidelity, Photographs
from tdm_jax.data import make_config

N = 11


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (N, 16, 16, 3), np.uint8)


@pytest.fixture
def candidate(tiny_model):
    model, variables = tiny_model()
    return Candidate("tiny", "none", None, model, variables)


CONFIG = make_config(name="folder", data_dir="photos", image_size=16, mean=(0.5,), std=(0.25,))


@pytest.fixture
def photographs(candidate, images):
    return Photographs(candidate, images, CONFIG, batch_size=4)


def test_the_unreduced_model_is_true_to_itself(candidate, photographs):
    found = photographs(candidate)
    assert found.agreement.all() and len(found.cosine) == N
    np.testing.assert_allclose(found.cosine, 1, atol=1e-6)
    np.testing.assert_allclose(found.dense_cosine, 1, atol=1e-3)
    assert found.loss(0.25) < 1e-3
    np.testing.assert_allclose(found.error, 0, atol=1e-3)
    assert len(photographs(candidate, 5).cosine) == 5


def test_answers_features_and_patches_are_compared(candidate, photographs, images):
    reduced = candidate.with_reducer(make_reducer("tome", r=4, layers=(1,)))
    found = photographs(reduced)
    normalised = np.float32((images / 255 - 0.5) / 0.25)

    def answers(one):
        apply = jax.jit(lambda v, x: one.model.apply(v, x, return_info=True))
        out, info = apply(one.variables, normalised)
        return [np.asarray(x, np.float64) for x in (out, info.features[:, 0], info.patches)]

    own, other = answers(candidate), answers(reduced)
    np.testing.assert_array_equal(found.agreement, own[0].argmax(1) == other[0].argmax(1))

    def cosine(x, y):
        norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
        return (x * y).sum(-1) / norms

    def error(x, y):
        return np.linalg.norm(y - x, axis=-1) / np.linalg.norm(x, axis=-1)

    np.testing.assert_allclose(found.error, error(own[1], other[1]), rtol=1e-3)
    np.testing.assert_allclose(found.dense_error, error(own[2], other[2]).mean(1), atol=2e-3)
    np.testing.assert_allclose(found.cosine, cosine(own[1], other[1]), atol=1e-5)
    np.testing.assert_allclose(found.dense_cosine, cosine(own[2], other[2]).mean(1), atol=1e-3)
    assert found.cosine.mean() < 0.99999


def test_a_model_without_classes_has_no_answers_to_compare(tiny_model, images):
    model, variables = tiny_model(num_classes=0)
    candidate = Candidate("tiny", "none", None, model, variables)
    columns = Photographs(candidate, images, CONFIG)(candidate).columns()
    assert "agreement_percent" not in columns
    assert columns["cosine"] == pytest.approx(1)


def test_columns_are_means_with_intervals():
    half = np.array([0.5, 0.5])
    found = Fidelity(np.array([1.0, 0.0]), np.array([1.0, 0.5]), half, half, half)
    assert found.loss(0.5) == pytest.approx(0.25 + 0.25)
    assert found.columns()["agreement_percent"] == 50
    assert found.columns()["cosine_interval"] == pytest.approx(1.96 * 0.125**0.5 / 2**0.5, rel=1e-4)


def test_patches_get_back_what_merging_took(tiny_model, images):
    # Behind the last block's stage nothing but the MLP follows: without it each patch is itself.
    model, variables = tiny_model("tome", r=8, layers=(2,))
    plain, _ = tiny_model()
    params = jax.tree.map(jnp.asarray, variables["params"])
    params["blocks_2"]["mlp"] = jax.tree.map(jnp.zeros_like, params["blocks_2"]["mlp"])

    def patches(model):
        apply = jax.jit(lambda v, x: model.apply(v, x, return_info=True))
        return apply({"params": params}, images / np.float32(255))[1].patches

    np.testing.assert_allclose(patches(model), patches(plain), atol=1e-5)
