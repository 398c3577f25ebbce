"""Intervals: against numbers in the literature, and how often they hold the truth."""

import numpy as np
import pytest

from tdm_jax.analysis import statistics


def hits(right, n):
    return np.repeat([1.0, 0.0], [right, n - right])


def test_of_a_share_as_newcombe_tabulates_it():
    # Newcombe (Statistics in Medicine 1998), table I, method 3.
    for right, n, low, high in ((81, 263, 25.53, 36.62), (15, 148, 6.24, 16.05), (0, 20, 0, 16.11)):
        assert statistics.of_share(hits(right, n)) == pytest.approx((low, high), abs=0.01)
    assert statistics.of_share(hits(20, 20))[1] == 100


def paired(both, one, other, none):
    first = np.repeat([1.0, 1.0, 0.0, 0.0], [both, one, other, none])
    second = np.repeat([1.0, 0.0, 1.0, 0.0], [both, one, other, none])
    return first, second


def test_of_a_difference_turns_on_the_images_that_differ():
    first, second = paired(794, 150, 86, 570)
    low, high = statistics.of_difference(first, second)
    # Agresti's survey: 0.04, standard error 0.0095.
    assert (low + high) / 2 == pytest.approx(4.0, abs=0.01)
    assert (high - low) / 2 == pytest.approx(1.96 * 0.95, abs=0.03)
    # Nothing differs: no difference is seen, and some is still possible.
    low, high = statistics.of_difference(*paired(30, 0, 0, 10))
    assert low < 0 < high and high - low < 15


def test_it_holds_the_truth_about_nineteen_times_in_twenty():
    rng, held, n = np.random.default_rng(0), 0, 100
    for _ in range(2000):
        draw = rng.choice(3, size=n, p=(0.12, 0.04, 0.84))
        first, second = (draw == 0).astype(float), (draw == 1).astype(float)
        low, high = statistics.of_difference(first, second)
        held += low <= 8 <= high
    assert 0.93 <= held / 2000 <= 0.98


def test_half_width_of_a_mean():
    values = np.random.default_rng(1).standard_normal(4000)
    assert statistics.half_width(values) == pytest.approx(1.96 / 4000**0.5, rel=0.1)
    assert statistics.half_width(values[:1]) is None
