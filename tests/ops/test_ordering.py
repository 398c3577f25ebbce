"""The order of scores."""

import jax.numpy as jnp
import numpy as np

from tdm_jax.ops.ordering import argtopk, by_radix_sort, by_stable_sort


def test_the_highest_come_first_and_ties_go_to_the_lower_index():
    score = jnp.array([[1.0, 2.0, 1.0, 2.0, 1.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    np.testing.assert_array_equal(argtopk(score, 4), [[1, 3, 0, 2], [0, 1, 2, 3]])


def test_a_radix_sort_orders_special_numbers_as_a_stable_sort_does():
    # Ties, zeros of both signs, numbers below the normal ones, infinities and what is no number.
    draw = np.random.default_rng(0)
    score = draw.standard_normal((5, 400)).astype(np.float32)
    score[:, 1::5] = score[:, ::5]
    special = (0.0, -0.0, 1e-40, -1e-40, np.inf, -np.inf, np.nan, -np.nan)
    score[:, 100:300] = draw.choice(np.array(special, np.float32), (5, 200))
    for x in (score, np.sort(score), score[:, :1], score.astype(jnp.bfloat16)):
        x = jnp.array(x)
        np.testing.assert_array_equal(by_radix_sort(x), by_stable_sort(x))
