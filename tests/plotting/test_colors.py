import colorsys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdm_jax.plotting import colors


def test_neighbours_touch_across_sides_and_corners_only():
    labels = np.array([[0, 0, -1, 3], [1, 0, -1, -1], [1, 2, -1, 4]])
    touch = colors.neighbours(labels, 5)
    expected = np.zeros((5, 5), bool)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        expected[a, b] = expected[b, a] = True
    np.testing.assert_array_equal(touch, expected)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 30), st.integers(0, 10**6))
def test_groups_that_touch_have_different_colours(rows, cols, groups, seed):
    labels = np.random.default_rng(seed).integers(-1, groups, (rows, cols))
    touch = colors.neighbours(labels, groups)
    shades = colors.share_out(touch)
    if touch.sum(axis=1).max() < len(colors.SHADES):
        for a, b in np.argwhere(touch):
            assert shades[a] != shades[b]


def test_few_groups_all_differ_in_hue_and_more_differ_in_shade():
    apart = np.zeros((21, 21), bool)
    assert len({shade.hue for shade in colors.share_out(apart[:7, :7])}) == 7
    assert len(set(colors.share_out(apart))) == 21


def test_neighbours_differ_in_hue_while_hues_last():
    everyone = ~np.eye(7, dtype=bool)
    assert len({shade.hue for shade in colors.share_out(everyone)}) == 7


def test_no_group_no_colour():
    assert colors.share_out(np.zeros((0, 0), bool)) == []


@pytest.mark.parametrize("hue", range(len(colors.HUES)))
def test_shades_keep_their_hue(hue):
    angles = [
        colorsys.rgb_to_hsv(*(c / 255 for c in shade.rgb))[0]
        for shade in colors.SHADES
        if shade.hue == hue
    ]
    assert len(angles) == 3
    assert max(angles) - min(angles) < 0.06


def test_hex_code():
    assert colors.hex_code((0, 114, 178)) == "#0072b2"
