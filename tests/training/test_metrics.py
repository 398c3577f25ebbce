import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax.training import metrics


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_is_membership_among_the_largest(k):
    logits = jax.random.normal(jax.random.key(0), (64, 7))
    labels = jax.random.randint(jax.random.key(1), (64,), 0, 7)
    largest = np.argsort(-logits, axis=-1)[:, :k]
    expected = (largest == np.asarray(labels)[:, None]).any(-1)
    np.testing.assert_array_equal(metrics.top_k(logits, labels, k), expected)


def test_equal_logits_are_one_guess_not_all_of_them():
    labels = jnp.arange(10)
    assert metrics.top_k(jnp.zeros((10, 10)), labels, 1).sum() == 1


def test_nan_is_wrong():
    logits = jnp.full((2, 3), jnp.nan).at[1].set(jnp.array([0.0, 1.0, jnp.nan]))
    assert not metrics.top_k(logits, jnp.array([0, 1]), 3).any()


def test_padding_does_not_count_even_if_it_is_not_finite():
    logits = jnp.array([[5.0, 0.0], [jnp.nan, jnp.nan], [0.0, 5.0]])
    sums = metrics.sums(logits, jnp.array([0, 0, 0]), jnp.array([True, False, True]))
    result = metrics.summarise([sums])
    assert result["count"] == 2
    assert result["top1"] == 50.0
    assert result["top5"] == 100.0
    assert result["loss"] == pytest.approx((np.log1p(np.exp(-5)) * 2 + 5) / 2, rel=1e-5)


def test_batches_add_up_whatever_their_size():
    logits = jax.random.normal(jax.random.key(0), (30, 6))
    labels = jax.random.randint(jax.random.key(1), (30,), 0, 6)
    mask = jnp.ones(30, bool)
    whole = metrics.summarise([metrics.sums(logits, labels, mask)])
    parts = [
        metrics.sums(logits[i : i + n], labels[i : i + n], mask[i : i + n])
        for i, n in ((0, 7), (7, 20), (27, 3))
    ]
    assert metrics.summarise(parts) == pytest.approx(whole, rel=1e-6)
