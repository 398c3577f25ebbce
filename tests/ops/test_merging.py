"""Weighted means of tokens, against NumPy and by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax.ops.merging import Merge, merge_groups, merge_into, weighted_mean
from tdm_jax.ops.platform import REFERENCE, pinned


@pytest.fixture
def draw():
    return np.random.default_rng(0)


@pytest.mark.parametrize("platform", [REFERENCE, "tpu"])
def test_groups_side_by_side_are_one_merge(draw, platform):
    sequence = jnp.array(draw.standard_normal((2, 11, 4)), jnp.float32)
    weight = jnp.array(draw.uniform(0.1, 1.0, (2, 9)), jnp.float32)
    order = jnp.array([draw.permutation(9) for _ in range(2)])
    groups = [
        Merge(order[:, :2], order[:, 4:6], jnp.array([[0, 1], [1, 1]])),
        Merge(order[:, 2:4], order[:, 6:7], jnp.array([[0], [1]])),
    ]
    merge = groups[0].beside(groups[1])
    route = np.full((2, 9), -1)  # two of the nine are dropped
    for image, (keep, gone, into) in enumerate(zip(*merge, strict=True)):
        route[image, keep], route[image, gone] = range(4), into
    np.testing.assert_array_equal(merge.into, [[0, 1, 2], [1, 1, 3]])
    np.testing.assert_array_equal(merge.route(9), route)
    with pinned(platform):
        merged = merge_groups(sequence, weight, groups, merge.route(9))
    expected = weighted_mean(sequence[:, 2:], jnp.array(route), weight, 4)
    np.testing.assert_allclose(merged[:, 2:], expected, atol=1e-6)
    np.testing.assert_array_equal(merged[:, :2], sequence[:, :2])
    # What stays alone comes out as it went in.
    np.testing.assert_array_equal(merged[1, 2], sequence[1, 2 + order[1, 0]])


def test_merging_into_tokens_is_their_mean_where_few_join(draw):
    tokens, weight = draw.standard_normal((2, 7, 3)), draw.uniform(size=(2, 7))
    weight[0, :3] = 0.0  # a mean of nothing but zeros is still one
    partner = jnp.array([[0, 0], [3, 1]])
    route = jnp.concatenate([jnp.broadcast_to(jnp.arange(5), (2, 5)), partner], axis=1)
    tokens, weight = jnp.array(tokens, jnp.float32), jnp.array(weight, jnp.float32)
    expected = weighted_mean(tokens, route, weight, 5)
    merged = merge_into(tokens[:, :5], weight[:, :5], tokens[:, 5:], weight[:, 5:], partner)
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(merged[:, [2, 4]], tokens[:, [2, 4]])


def test_a_mean_keeps_a_single_token_bit_for_bit(draw):
    tokens = jnp.array(draw.standard_normal((1, 4, 5)), jnp.float32)
    route, weight = jnp.array([[0, 1, 1, -1]]), jnp.array([[0.3, 0.1, 0.3, 9.0]])
    merged = weighted_mean(tokens, route, weight, 3)
    np.testing.assert_array_equal(merged[0, 0], tokens[0, 0])
    np.testing.assert_allclose(merged[0, 1], 0.25 * tokens[0, 1] + 0.75 * tokens[0, 2], atol=1e-6)
    # Nobody went there.
    np.testing.assert_array_equal(merged[0, 2], 0)


def test_a_mean_by_weights_that_underflowed(draw):
    tokens = jnp.array(draw.standard_normal((1, 2, 3)), jnp.float32)
    merged = weighted_mean(tokens, jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 2)), 1)
    np.testing.assert_allclose(merged[0, 0], tokens[0].mean(0), atol=1e-6)


def test_bfloat16_stays_bfloat16(draw):
    tokens = jnp.array(draw.standard_normal((1, 3, 4)), jnp.bfloat16)
    merged = weighted_mean(tokens, jnp.array([[0, 1, 1]]), jnp.ones((1, 3)), 2)
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged[0, 0], tokens[0, 0])
