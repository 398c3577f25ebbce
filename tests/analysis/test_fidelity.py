"""Fidelity: what it is of the unreduced model itself, of dropped and of merged patches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import make_reducer
from tdm_jax.analysis.candidate import Candidate
from tdm_jax.analysis.fidelity import Fidelity, Reference, interval

N = 11


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).standard_normal((N, 16, 16, 3)).astype(np.float32)


@pytest.fixture
def candidate(tiny_model):
    model, variables = tiny_model()
    return Candidate("tiny", "none", None, model, variables)


@pytest.fixture
def reference(candidate, images):
    return Reference(candidate, images, batch_size=4)


def test_the_unreduced_model_is_true_to_itself(candidate, reference):
    found = reference(candidate)
    assert found.agreement.all() and len(found.cosine) == N
    np.testing.assert_allclose(found.cosine, 1, atol=1e-6)
    np.testing.assert_allclose(found.dense_cosine, 1, atol=1e-3)
    assert found.loss(0.25) < 1e-3
    assert len(reference(candidate, 5).cosine) == 5


def test_answers_features_and_patches_are_compared(candidate, reference, images):
    reduced = candidate.with_reducer(make_reducer("tome", r=4, layers=(1,)))
    found = reference(reduced)

    def answers(one):
        apply = jax.jit(lambda v, x: one.model.apply(v, x, return_info=True))
        out, info = apply(one.variables, images)
        return [np.asarray(x, np.float64) for x in (out, info.features[:, 0], info.patches)]

    own, other = answers(candidate), answers(reduced)
    np.testing.assert_array_equal(found.agreement, own[0].argmax(1) == other[0].argmax(1))

    def cosine(x, y):
        norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
        return (x * y).sum(-1) / norms

    np.testing.assert_allclose(found.cosine, cosine(own[1], other[1]), atol=1e-5)
    np.testing.assert_allclose(found.dense_cosine, cosine(own[2], other[2]).mean(1), atol=1e-3)
    assert found.cosine.mean() < 0.99999


def test_a_model_without_classes_has_no_answers_to_compare(tiny_model, images):
    model, variables = tiny_model(num_classes=0)
    candidate = Candidate("tiny", "none", None, model, variables)
    columns = Reference(candidate, images)(candidate).columns()
    assert "agreement_percent" not in columns
    assert columns["cosine"] == pytest.approx(1)


def test_intervals_are_of_means():
    values = np.random.default_rng(1).standard_normal(4000)
    assert interval(values) == pytest.approx(1.96 / 4000**0.5, rel=0.1)
    assert interval(values[:1]) is None
    found = Fidelity(np.array([True, False]), np.array([1.0, 0.5]), np.array([0.5, 0.5]))
    assert found.loss(0.5) == pytest.approx(0.25 + 0.25)
    assert found.columns()["agreement_percent"] == 50
    assert found.columns()["cosine_interval"] == pytest.approx(1.96 * 0.125**0.5 / 2**0.5)


def test_patches_get_back_what_merging_took(tiny_model, images):
    # Behind the last block's stage nothing but the MLP follows: without it each patch is itself.
    model, variables = tiny_model("tome", r=8, layers=(2,))
    plain, _ = tiny_model()
    params = jax.tree.map(jnp.asarray, variables["params"])
    params["blocks_2"]["mlp"] = jax.tree.map(jnp.zeros_like, params["blocks_2"]["mlp"])

    def patches(model):
        apply = jax.jit(lambda v, x: model.apply(v, x, return_info=True))
        return apply({"params": params}, images)[1].patches

    np.testing.assert_allclose(patches(model), patches(plain), atol=1e-5)
