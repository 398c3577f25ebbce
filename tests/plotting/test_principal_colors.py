import numpy as np
import pytest

from tdm_jax.errors import InputError
from tdm_jax.plotting.principal_colors import PrincipalColors

GRID = (6, 8)


def features(seed=0, width=5):
    """Of very different spread in each direction."""
    drawn = np.random.default_rng(seed).standard_normal((48, width))
    return (drawn * 3.0 ** -np.arange(width)).astype(np.float32)


def test_the_colors_are_the_leading_components_in_order():
    own = features()
    shown = PrincipalColors.fit(own, GRID)(own)
    assert (shown.shape, shown.dtype) == ((6, 8, 3), np.uint8)
    # Against the eigenvectors of the covariance.
    directions = np.linalg.eigh(np.cov(own.astype(np.float64).T))[1][:, :-4:-1]
    projected = own @ directions
    for i in range(3):
        correlation = np.corrcoef(projected[:, i], shown[..., i].ravel())[0, 1]
        assert abs(correlation) > 0.99
    # The whole scale is used, and an outlier beyond it does not move it.
    assert shown.min(axis=(0, 1)).max() == 30 and shown.max(axis=(0, 1)).min() == 255


def test_outliers_do_not_grey_the_others():
    own = np.random.default_rng(0).standard_normal((20 * 20, 4))
    spread = PrincipalColors.fit(own, (20, 20))(own).std()
    own[0] = 100
    assert PrincipalColors.fit(own, (20, 20))(own)[..., 1:].std() > 0.8 * spread


def test_what_stands_out_in_the_middle_is_bright():
    own = np.zeros((*GRID, 3))
    own[2:4, 3:5] = 1, -2, 3
    for sign in (1, -1):
        shown = PrincipalColors.fit(sign * own.reshape(-1, 3), GRID)(sign * own.reshape(-1, 3))
        assert shown[2:4, 3:5, 0].min() == 255
        assert shown[0, :, 0].max() == 30


def test_a_reduced_models_features_are_on_the_same_scale():
    own = features()
    colors = PrincipalColors.fit(own, GRID)
    shown = colors(own).reshape(-1, 3)
    order = np.random.default_rng(1).permutation(48)
    np.testing.assert_array_equal(colors(own[order]).reshape(-1, 3), shown[order])
    # What lies beyond the scale is at its end.
    far = colors(own + 1000 * colors.components[1].astype(np.float32))
    assert (far[..., 1] == 255).all()
    np.testing.assert_allclose(far[..., 0].ravel().astype(int), shown[:, 0], atol=1)


def test_alike_features_are_one_color():
    own = np.full((48, 5), 0.3, np.float32)
    shown = PrincipalColors.fit(own, GRID)(own)
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) == 1


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (np.zeros((47, 5)), r"6 x 8 patches: expected \[48, width\], .* got \[47, 5\]"),
        (np.zeros((48, 2)), r"got \[48, 2\]"),
        (np.full((48, 5), np.nan), "expected finite numbers"),
    ],
)
def test_bad_features_are_one_line(own, message):
    with pytest.raises(InputError, match=message) as caught:
        PrincipalColors.fit(own, GRID)
    assert "\n" not in str(caught.value)


def test_other_features_than_the_unreduced_ones_are_refused():
    colors = PrincipalColors.fit(features(), GRID)
    with pytest.raises(InputError, match=r"expected \[48, 5\]; got \[48, 4\]"):
        colors(features(width=4))
