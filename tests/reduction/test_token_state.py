"""The token set and what it remembers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax.ops.merging import Merge
from tdm_jax.reduction.token_state import TokenKind, TokenState


@pytest.fixture
def draw():
    return np.random.default_rng(0)


def start(tokens):
    tokens = jnp.asarray(tokens, jnp.float32)
    prefix = jnp.ones((tokens.shape[0], 2, tokens.shape[2]))
    return TokenState.start(prefix, tokens, keep_dropped=True)


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


def test_a_sequence_and_back(draw):
    state = start(draw.standard_normal((2, 4, 3)))
    sequence = state.sequence()
    assert sequence.shape == (2, 6, 3)
    np.testing.assert_array_equal(state.with_sequence(sequence).tokens, state.tokens)
    np.testing.assert_array_equal(state.with_sequence(2 * sequence).prefix, 2 * state.prefix)
    assert state.count == 4


def test_a_tpu_adds_up_sizes_in_full_precision():
    # By default it would round them to bfloat16, which counts in twos from 256 on.
    tokens, route = jnp.ones((1, 576, 2)), jnp.zeros((1, 576), jnp.int32)

    def sizes(tokens, route):
        state = start(tokens)
        return state.replace_tokens(tokens[:, :2], route, state.kind[:, :2]).size

    program = jax.jit(sizes).trace(tokens, route).lower(lowering_platforms=("tpu",)).as_text()
    products = re.findall(r"stablehlo.dot_general.*", program)
    assert all("HIGHEST" in line for line in products), products
    np.testing.assert_array_equal(sizes(tokens, route), [[576, 0]])
