"""Tokens by their indices, and indices of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax.ops.gathering import gather_patches, gather_tokens, inverse_index, one_hot


def test_gathering_by_an_order_and_by_its_inverse_changes_nothing():
    draw = np.random.default_rng(0)
    order = jnp.array([draw.permutation(6) for _ in range(3)])
    values = jnp.array(draw.standard_normal((3, 6, 4)))
    place = inverse_index(order, 6)
    np.testing.assert_array_equal(gather_tokens(gather_tokens(values, order), place), values)
    patches = gather_patches(values, 2, order % 4)
    np.testing.assert_array_equal(patches, gather_tokens(values[:, 2:], order % 4))


def test_what_is_not_there_has_no_place():
    np.testing.assert_array_equal(inverse_index(jnp.array([[4, 1]]), 5), [[-1, 1, -1, -1, 0]])
    np.testing.assert_array_equal(one_hot(jnp.array([[1, -1]]), 2), [[[0, 1], [0, 0]]])


@pytest.mark.parametrize("rank", [2, 3])
def test_a_tpu_takes_by_products_and_others_by_gathers(rank):
    values, index = jnp.zeros((4, 9, 8)[:rank]), jnp.zeros((4, 5), jnp.int32)

    def program(platform):
        lowered = jax.jit(gather_tokens).trace(values, index).lower(lowering_platforms=(platform,))
        return lowered.as_text()

    assert "stablehlo.gather" not in program("tpu")
    assert "stablehlo.gather" in program("cpu")
