"""ToMe by a traced number: the same tokens as ToMe's own, and no patch lost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import make_reducer
from tdm_jax.models.attention import AttentionView
from tdm_jax.reduction import ViTShape
from tdm_jax.reduction.contract import BlockContext
from tdm_jax.reduction.elastic import drawn_pair, leading, merge_leading, visible
from tdm_jax.reduction.token_state import TokenState


def start(prefix, patches):
    draw = np.random.default_rng(0)
    tokens = jnp.array(draw.standard_normal((2, prefix + patches, 5)), jnp.float32)
    return TokenState.start(tokens[:, :prefix], tokens[:, prefix:])


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_it_leaves_what_tome_leaves(prefix):
    patches, r, blocks = 15, 4, 4  # the third merges three of seven
    tome = make_reducer("tome", r=r)
    shape = ViTShape((1, patches), blocks, 5, 1, prefix, class_token=False, pool="avg")
    own = same = start(prefix, patches)

    @functools.partial(jax.jit, static_argnums=2)
    def step(state, r, layer):
        return merge_leading(state, state.tokens, *leading(patches, r, layer))

    for layer in range(blocks):
        x = own.sequence()[:, :, None]
        view = AttentionView(x, x, x, x[:, :1, 0], None, prefix)
        context = BlockContext(layer, shape, train=False, weights={}, attention=view)
        own = tome.after_attention(own, context)
        same = step(same, jnp.asarray(r), layer)
        np.testing.assert_allclose(same.tokens[:, : own.count], own.tokens, atol=1e-6)
        np.testing.assert_array_equal(same.size[:, : own.count], own.size)
        np.testing.assert_array_equal(same.assign, own.assign)
        np.testing.assert_array_equal(same.size[:, own.count :], 0)
    assert own.count == 2
    np.testing.assert_array_equal(visible(same)[:, :prefix], 1)


def test_no_merge_changes_nothing():
    state = start(1, 8)
    after = jax.jit(lambda s: merge_leading(s, s.tokens, *leading(8, jnp.asarray(0), 3)))(state)
    # ToMe sorts even then: those of A first.
    np.testing.assert_allclose(
        jnp.take_along_axis(after.tokens, after.assign[..., None], axis=1), state.tokens, atol=1e-6
    )
    np.testing.assert_array_equal(after.size, 1)


def test_pairs_cover_the_range():
    pairs = jax.vmap(lambda key: drawn_pair(key, 3))(jax.random.split(jax.random.key(0), 200))
    assert {tuple(pair) for pair in pairs.tolist()} == {(i, j) for i in range(4) for j in range(4)}
