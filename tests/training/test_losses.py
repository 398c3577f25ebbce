import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax.errors import InputError
from tdm_jax.training import losses


@pytest.fixture
def logits():
    return jax.random.normal(jax.random.key(0), (4, 5)) * 3


@pytest.fixture
def teacher():
    return jax.random.normal(jax.random.key(1), (4, 5)) * 3


def test_cross_entropy_of_a_one_hot_target_is_the_log_probability(logits):
    labels = jnp.array([0, 3, 2, 4])
    expected = -np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))[np.arange(4), labels]
    np.testing.assert_allclose(
        losses.cross_entropy(logits, jax.nn.one_hot(labels, 5)), expected, rtol=1e-5
    )


def test_cross_entropy_is_linear_in_the_target(logits):
    first, second = jax.nn.one_hot(jnp.array([[0] * 4, [1] * 4]), 5)
    mixed = losses.cross_entropy(logits, 0.3 * first + 0.7 * second)
    parts = 0.3 * losses.cross_entropy(logits, first) + 0.7 * losses.cross_entropy(logits, second)
    np.testing.assert_allclose(mixed, parts, rtol=1e-5)


def test_hard_distillation_only_sees_the_teachers_decision(logits, teacher):
    sharper = losses.hard_distillation(logits, teacher * 10)
    np.testing.assert_array_equal(losses.hard_distillation(logits, teacher), sharper)
    decision = jax.nn.one_hot(jnp.argmax(teacher, -1), 5)
    np.testing.assert_allclose(sharper, losses.cross_entropy(logits, decision), rtol=1e-6)


def test_soft_distillation_is_the_scaled_divergence(logits, teacher):
    t = 2.0
    p = np.exp(teacher / t) / np.exp(teacher / t).sum(-1, keepdims=True)
    q = np.exp(logits / t) / np.exp(logits / t).sum(-1, keepdims=True)
    expected = t**2 * (p * (np.log(p) - np.log(q))).sum(-1)
    np.testing.assert_allclose(losses.soft_distillation(logits, teacher, t), expected, rtol=1e-4)
    np.testing.assert_allclose(losses.soft_distillation(logits, logits, t), 0.0, atol=1e-6)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_teacher_receives_no_gradient(kind, logits, teacher):
    config = losses.DistillConfig(kind=kind, teacher="t")
    grads = jax.grad(lambda s, t: losses.distillation(s, t, config).sum(), (0, 1))(logits, teacher)
    assert np.any(grads[0])
    assert not np.any(grads[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "sotf", "teacher": "t"}, "did you mean 'soft'"),
        ({"kind": "soft"}, "kind and a teacher together"),
        ({"teacher": "t"}, "kind and a teacher together"),
        ({"kind": "soft", "teacher": "t", "weight": 1.5}, r"\[0, 1\], got 1.5"),
        ({"kind": "soft", "teacher": "t", "temperature": 0.0}, "positive, got 0.0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        losses.DistillConfig(**settings)
