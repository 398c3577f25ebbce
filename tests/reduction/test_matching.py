"""Bipartite matching: whom a prefix pairs, what the best are, and half of the tokens at most."""

import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax.errors import InputError
from tdm_jax.reduction.matching import at_most_half, by_similarity, halves, split_best


def test_the_prefix_counts_in_who_is_even():
    assert halves(0) == (0, 1)
    assert halves(1) == (1, 0)
    assert halves(4) == (0, 1)


def test_the_best_go_and_both_are_in_order():
    left, gone = split_best(jnp.array([[0.1, 0.9, 0.5, 0.7]]), 2)
    np.testing.assert_array_equal(left, [[0, 2]])
    np.testing.assert_array_equal(gone, [[1, 3]])


def test_the_most_alike_merge():
    angle = jnp.array([[0.0, 1.0, 2.0, 0.1, 3.0, 1.9]])
    metric = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    # Patches 0, 2 and 4 are A; 0 is nearest to 3, and 2 to 5.
    merge = by_similarity(metric, 0, 2)
    np.testing.assert_array_equal(merge.route(6), [[2, 1, 3, 2, 0, 3]])


def test_at_most_half_merges():
    assert at_most_half("Name", 3, 9, by_number=True) == 5
    assert at_most_half("Name", 7, 9, by_number=False) == 7
    with pytest.raises(InputError, match="Name: .* expected a count of at least 5; got 3"):
        at_most_half("Name", 3, 9, by_number=False)
