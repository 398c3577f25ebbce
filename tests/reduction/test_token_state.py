"""The operations on token sets, against NumPy and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax.ops import gathering, merging, ordering
from tdm_jax.ops.distances import cosine_similarity, nearest, pairwise_distance
from tdm_jax.ops.gathering import gather_tokens, inverse_index, one_hot
from tdm_jax.ops.merging import Merge, merge_into, weighted_mean
from tdm_jax.ops.ordering import argtopk
from tdm_jax.reduction.token_state import TokenKind, TokenState


@pytest.fixture
def draw():
    return np.random.default_rng(0)


def start(tokens):
    tokens = jnp.asarray(tokens, jnp.float32)
    prefix = jnp.ones((tokens.shape[0], 2, tokens.shape[2]))
    return TokenState.start(prefix, tokens, keep_dropped=True)


def test_top_is_sorted_with_ties_to_the_lower_index():
    score = jnp.array([[1.0, 2.0, 1.0, 2.0, 1.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    np.testing.assert_array_equal(argtopk(score, 4), [[1, 3, 0, 2], [0, 1, 2, 3]])


def test_take_and_inverse_undo_each_other(draw):
    order = jnp.array([draw.permutation(6) for _ in range(3)])
    values = jnp.array(draw.standard_normal((3, 6, 4)))
    place = inverse_index(order, 6)
    np.testing.assert_array_equal(gather_tokens(gather_tokens(values, order), place), values)
    np.testing.assert_array_equal(inverse_index(jnp.array([[4, 1]]), 5), [[-1, 1, -1, -1, 0]])
    np.testing.assert_array_equal(one_hot(jnp.array([[1, -1]]), 2), [[[0, 1], [0, 0]]])


def test_both_forms_of_take_take_the_same(draw):
    # Each platform has one of them; see test_structure.py.
    index = jnp.array([draw.permutation(6)[:4] for _ in range(3)])
    for shape in ((3, 6), (3, 6, 5)):
        values = jnp.array(draw.standard_normal(shape), jnp.float32)
        gathered, selected = (
            form(values, index) for form in (gathering.by_index, gathering.by_product)
        )
        np.testing.assert_array_equal(gathered, selected)


def test_both_forms_of_ordering_order_the_same(draw):
    # Each platform has one of them. Ties, zeros of both signs, numbers below the normal ones,
    # infinities and what is no number, of both signs.
    score = draw.standard_normal((5, 400)).astype(np.float32)
    score[:, 1::5] = score[:, ::5]
    special = (0.0, -0.0, 1e-40, -1e-40, np.inf, -np.inf, np.nan, -np.nan)
    score[:, 100:300] = draw.choice(np.array(special, np.float32), (5, 200))
    for x in (score, np.sort(score), score[:, :1], score.astype(jnp.bfloat16)):
        x = jnp.array(x)
        np.testing.assert_array_equal(ordering.by_radix_sort(x), ordering.by_stable_sort(x))


def test_both_forms_of_merging_merge_the_same(draw):
    # Each platform has one of them; two tokens of the nine are dropped.
    sequence = jnp.array(draw.standard_normal((2, 11, 4)), jnp.float32)
    weight = jnp.array(draw.uniform(0.1, 1.0, (2, 9)), jnp.float32)
    order = jnp.array([draw.permutation(9) for _ in range(2)])
    groups = [
        Merge(order[:, :2], order[:, 4:6], jnp.array([[0, 1], [1, 1]])),
        Merge(order[:, 2:4], order[:, 6:7], jnp.array([[0], [1]])),
    ]
    merge = groups[0].beside(groups[1])
    route = np.full((2, 9), -1)
    for image, (keep, gone, into) in enumerate(zip(*merge, strict=True)):
        route[image, keep], route[image, gone] = range(4), into
    np.testing.assert_array_equal(merge.into, [[0, 1, 2], [1, 1, 3]])
    np.testing.assert_array_equal(merge.route(9), route)
    taken, product = (
        form(2, sequence, weight, groups) for form in (merging.by_taking, merging.at_once)
    )
    np.testing.assert_allclose(taken, product, atol=1e-6)
    np.testing.assert_array_equal(product[:, :2], sequence[:, :2])
    # What stays alone comes out as it went in.
    np.testing.assert_array_equal(product[1, 2], sequence[1, 2 + order[1, 0]])


def test_joining_is_averaging_where_few_tokens_join(draw):
    tokens, weight = draw.standard_normal((2, 7, 3)), draw.uniform(size=(2, 7))
    weight[0, :3] = 0.0  # an average of nothing but zeros is still one
    partner = jnp.array([[0, 0], [3, 1]])
    route = jnp.concatenate([jnp.broadcast_to(jnp.arange(5), (2, 5)), partner], axis=1)
    tokens, weight = jnp.array(tokens, jnp.float32), jnp.array(weight, jnp.float32)
    expected = weighted_mean(tokens, route, weight, 5)
    found = merge_into(tokens[:, :5], weight[:, :5], tokens[:, 5:], weight[:, 5:], partner)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[:, [2, 4]], tokens[:, [2, 4]])


def test_distances_far_from_the_origin(draw):
    x, y = 300.0 + draw.standard_normal((2, 2, 5, 7))
    expected = np.linalg.norm(x[:, :, None] - y[:, None], axis=-1)
    found = pairwise_distance(jnp.array(x, jnp.float32), jnp.array(y, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_distances_have_a_gradient_where_a_token_meets_itself(draw):
    x = jnp.array(draw.standard_normal((1, 4, 3)), jnp.float32)
    gradient = jax.grad(lambda x: pairwise_distance(x).sum())(x)
    assert np.isfinite(gradient).all()


def test_cosine(draw):
    x, y = draw.standard_normal((2, 1, 4, 3))
    expected = (x @ y.swapaxes(1, 2)) / (
        np.linalg.norm(x, axis=-1)[..., None] * np.linalg.norm(y, axis=-1)[:, None]
    )
    np.testing.assert_allclose(cosine_similarity(jnp.array(x), jnp.array(y)), expected, rtol=1e-5)
    assert np.isfinite(cosine_similarity(jnp.zeros((1, 2, 3)), jnp.array(x))).all()


def test_nearest_centre_and_no_empty_cluster():
    distance = pairwise_distance(jnp.array([[[0.0], [1.0], [5.0], [6.0], [6.0]]]))
    np.testing.assert_array_equal(nearest(distance, jnp.array([[2, 1]])), [[1, 1, 0, 0, 0]])
    # Two centres of the same value: each stays with itself.
    np.testing.assert_array_equal(nearest(distance, jnp.array([[3, 4]])), [[0, 0, 0, 0, 1]])


def test_average_keeps_a_single_token_bit_for_bit(draw):
    tokens = jnp.array(draw.standard_normal((1, 4, 5)), jnp.float32)
    route, weight = jnp.array([[0, 1, 1, -1]]), jnp.array([[0.3, 0.1, 0.3, 9.0]])
    merged = weighted_mean(tokens, route, weight, 3)
    np.testing.assert_array_equal(merged[0, 0], tokens[0, 0])
    np.testing.assert_allclose(merged[0, 1], 0.25 * tokens[0, 1] + 0.75 * tokens[0, 2], atol=1e-6)
    # Nobody went there.
    np.testing.assert_array_equal(merged[0, 2], 0)


def test_average_of_weights_that_underflowed(draw):
    tokens = jnp.array(draw.standard_normal((1, 2, 3)), jnp.float32)
    merged = weighted_mean(tokens, jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 2)), 1)
    np.testing.assert_allclose(merged[0, 0], tokens[0].mean(0), atol=1e-6)


def test_bfloat16_stays_bfloat16(draw):
    tokens = jnp.array(draw.standard_normal((1, 3, 4)), jnp.bfloat16)
    merged = weighted_mean(tokens, jnp.array([[0, 1, 1]]), jnp.ones((1, 3)), 2)
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged[0, 0], tokens[0, 0])
    assert pairwise_distance(tokens).dtype == jnp.float32


def test_a_state_remembers_what_was_dropped_and_what_merged(draw):
    tokens = draw.standard_normal((1, 5, 3)).astype(np.float32)
    state = start(tokens).select(jnp.array([[4, 0, 2]]))
    np.testing.assert_array_equal(state.assign, [[1, -1, 2, -1, 0]])
    np.testing.assert_array_equal(state.dropped_values[0, [1, 3]], tokens[0, [1, 3]])
    np.testing.assert_array_equal(state.kind, [[TokenKind.KEPT] * 3])

    later = state.replace(tokens=state.tokens + 1)
    merge = Merge(keep=jnp.array([[0, 2]]), gone=jnp.array([[1]]), into=jnp.array([[0]]))
    merged = later.merge([merge], jnp.array([[3.0, 1.0, 1.0]]))
    np.testing.assert_array_equal(merged.assign, [[0, -1, 1, -1, 0]])
    np.testing.assert_array_equal(merged.size, [[2, 1]])
    np.testing.assert_array_equal(merged.kind, [[TokenKind.MATCHED, TokenKind.KEPT]])
    expected = 0.75 * tokens[0, 4] + 0.25 * tokens[0, 0] + 1
    np.testing.assert_allclose(merged.tokens[0, 0], expected, atol=1e-6)

    # What goes now leaves its last value; what went before keeps the one it had.
    less = merged.select(jnp.array([[1]]))
    np.testing.assert_array_equal(less.assign, [[-1, -1, 0, -1, -1]])
    np.testing.assert_array_equal(less.dropped_values[0, [1, 3]], tokens[0, [1, 3]])
    np.testing.assert_array_equal(less.dropped_values[0, [0, 4]], merged.tokens[0, [0, 0]])


def test_join_and_split(draw):
    state = start(draw.standard_normal((2, 4, 3)))
    sequence = state.sequence()
    assert sequence.shape == (2, 6, 3)
    np.testing.assert_array_equal(state.with_sequence(sequence).tokens, state.tokens)
    np.testing.assert_array_equal(state.with_sequence(2 * sequence).prefix, 2 * state.prefix)
    assert state.count == 4
