import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdm_jax.errors import InputError
from tdm_jax.models.info import Stage
from tdm_jax.plotting import colors, patch_maps
from tdm_jax.plotting.figure import paint
from tdm_jax.plotting.patch_maps import DROPPED, MASK, Patch, SourceMap
from tdm_jax.reduction.token_state import TokenKind

SIDE = 16
# Two rows of four patches: a kept one, a matched pair, a cluster of two (apart), a dropped one, a
# fused one, and a cluster that touches the first.
ASSIGN = np.array([0, 1, 1, 2, 3, -1, 2, 4])
KIND = np.array(
    [TokenKind.KEPT, TokenKind.MATCHED, TokenKind.CLUSTER, TokenKind.CLUSTER, TokenKind.FUSED]
)
SOURCE = SourceMap((2, 4), ASSIGN, KIND)


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (2 * SIDE, 4 * SIDE, 3), np.uint8)


def painted(image, source, view="tokens", scale=1):
    drawing = patch_maps.draw(image, source, view, scale)
    pixels = drawing.pixels.repeat(scale, axis=0).repeat(scale, axis=1)
    return paint(pixels, drawing.marks)


def patch(picture, index, side=SIDE, inside=0):
    row, col = divmod(index, 4)
    area = picture[row * side : (row + 1) * side, col * side : (col + 1) * side]
    return area[inside : side - inside, inside : side - inside].astype(int)


def tint(area):
    """Direction of the mean colour away from grey."""
    colour = area.reshape(-1, 3).mean(axis=0)
    colour = colour - colour.mean()
    return colour / np.linalg.norm(colour)


def test_kept_patches_are_untouched(image):
    picture = painted(image, SOURCE)
    np.testing.assert_array_equal(patch(picture, 0), patch(image, 0))


def test_dropped_patches_are_masked(image):
    area = patch(painted(image, SOURCE), 5)
    assert np.abs(area - MASK).max() <= (1 - patch_maps.MASK_ALPHA) * 255
    assert np.ptp(area, axis=-1).max() < 10


def test_patches_of_one_cluster_share_a_hue_and_others_have_another(image):
    picture = painted(image, SOURCE)
    tints = {i: tint(patch(picture, i)) for i in (3, 6, 4, 7)}
    assert tints[3] @ tints[6] > 0.999
    for i, j in ((3, 4), (3, 7), (4, 7)):
        assert tints[i] @ tints[j] < 0.9


def test_a_matched_pair_is_outlined_once_around_both_and_clear_inside(image):
    picture = painted(image, SOURCE)
    inside = slice(5, SIDE - 5), slice(SIDE + 5, 3 * SIDE - 5)
    np.testing.assert_array_equal(picture[inside], image[inside])
    edge = picture[:SIDE, SIDE : 3 * SIDE]
    colour = edge[0, 0]
    assert tuple(colour) in colors.HUES
    for line in (edge[0], edge[-1], edge[:, 0], edge[:, -1]):
        assert (line == colour).all()


def test_groups_with_many_patches_and_holes(image):
    ring = SourceMap(
        (3, 3), np.array([0, 0, 0, 0, 1, 0, 0, 0, 0]), np.array([TokenKind.MATCHED, TokenKind.KEPT])
    )
    square = np.zeros((3 * SIDE, 3 * SIDE, 3), np.uint8)
    picture = painted(square, ring)
    np.testing.assert_array_equal(picture[SIDE : 2 * SIDE, SIDE : 2 * SIDE], 0)
    # The line runs around the hole too, corners included.
    around = picture[SIDE - 1 : 2 * SIDE + 1, SIDE - 1 : 2 * SIDE + 1]
    for line in (around[0], around[-1], around[:, 0], around[:, -1]):
        assert (line == picture[0, 0]).all()
    assert picture[0, 0].any()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16 - 1), st.integers(0, 2), st.integers(1, 3))
def test_a_border_is_the_set_less_its_eroded_self(bits, inset, width):
    group = np.array([bits >> i & 1 for i in range(16)], bool).reshape(4, 4)
    mark = Patch(12, 10).border(group, (255, 255, 255), inset, width)
    blank = np.zeros((40, 48, 3), np.uint8)
    expected = eroded(group, inset) & ~eroded(group, inset + width)
    np.testing.assert_array_equal(paint(blank, [mark])[..., 0] > 0, expected)


def eroded(group, by):
    """Pixels whose distance (largest of x and y) to the outside is more than `by`."""
    mask = np.pad(group.repeat(10, axis=0).repeat(12, axis=1), by)
    for axis in (0, 1):
        shifts = [np.roll(mask, s, axis) for s in range(-by, by + 1)]
        mask = np.logical_and.reduce(shifts)
    return mask[by : mask.shape[0] - by, by : mask.shape[1] - by]


def test_importance_masks_all_that_is_inattentive(image):
    picture = painted(image, SOURCE, "importance")
    for i in (0, 1, 2):
        np.testing.assert_array_equal(patch(picture, i), patch(image, i))
    for i in (3, 4, 5, 6, 7):
        assert np.abs(patch(picture, i) - MASK).max() < 35


def test_diversity_fills_every_group(image):
    picture = painted(image, SOURCE, "diversity")
    assert tint(patch(picture, 1)) @ tint(patch(picture, 2)) > 0.999
    assert np.abs(patch(picture, 1, inside=4) - patch(image, 1, inside=4)).mean() > 20
    np.testing.assert_array_equal(patch(picture, 0), patch(image, 0))


def test_grey_images_and_enlargement():
    digit = np.random.default_rng(1).integers(0, 256, (8, 16, 1), np.uint8)
    picture = painted(digit, SOURCE, scale=4)
    assert picture.shape == (32, 64, 3)
    np.testing.assert_array_equal(
        patch(picture, 0)[..., 0], digit[:4, :4, 0].repeat(4, 0).repeat(4, 1)
    )


def test_no_map_is_the_image_alone(image):
    drawing = patch_maps.draw(image, None)
    np.testing.assert_array_equal(drawing.pixels, image)
    assert drawing.marks == ()


def test_the_map_of_a_stage_picks_one_image():
    assign = jnp.stack([jnp.zeros(8, int), ASSIGN])
    kind = jnp.stack([jnp.full(5, TokenKind.KEPT), KIND])
    source = SourceMap.of(Stage(3, assign, jnp.ones((2, 5)), kind), 1, (2, 4))
    assert source.tokens == 5
    assert source.patch_kind.tolist() == [0, 1, 1, 2, 2, DROPPED, 2, 3]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SourceMap((2, 3), ASSIGN, KIND), "expected 2 x 3 = 6 patches; got 8"),
        (lambda: SourceMap((2, 4), ASSIGN + 1, KIND), r"expected tokens -1\.\.4; got 0\.\.5"),
        (lambda: patch_maps.draw(np.zeros((32, 30, 3), np.uint8), SOURCE), "32 x 30 pixels"),
        (lambda: patch_maps.draw(np.zeros((1, 1, 3), np.uint8), SOURCE), "1 x 1 pixels"),
        (lambda: patch_maps.draw(np.zeros((32, 64, 4), np.uint8), SOURCE), "1 or 3"),
        (lambda: patch_maps.draw(np.zeros((32, 64, 3), np.float32), SOURCE), "uint8"),
        (lambda: patch_maps.draw(np.zeros((32, 64, 3), np.uint8), SOURCE, "tokns"), "'tokens'"),
    ],
)
def test_bad_input_is_one_line(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
