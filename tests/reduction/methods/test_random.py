"""Random dropping: reproducible, different by image and by key."""

import jax
import jax.numpy as jnp
import numpy as np

from tdm_jax import make_reducer
from tdm_jax.reduction import BlockContext, ViTShape
from tdm_jax.reduction.token_state import TokenState

SHAPE = ViTShape((5, 8), 3, 4, 1)


def drawn(key=None, seed=0, layer=1):
    state = TokenState.start(jnp.zeros((3, 1, 4)), jnp.zeros((3, 40, 4)))
    reducer = make_reducer("random", keep_rate=0.5, layers=(1, 2), seed=seed)
    context = BlockContext(layer=layer, shape=SHAPE, train=False, weights={}, key=key)
    return np.asarray(reducer.reduce(state, context).assign >= 0)


def test_draws_follow_the_key_or_the_seed():
    plain = drawn()
    assert (plain.sum(1) == 20).all()
    np.testing.assert_array_equal(plain, drawn())
    for other in (drawn(seed=1), drawn(layer=2), drawn(jax.random.key(0))):
        assert (plain != other).any()
    np.testing.assert_array_equal(drawn(jax.random.key(3)), drawn(jax.random.key(3), seed=5))


def test_each_image_has_its_own_draw():
    assert len(np.unique(drawn(), axis=0)) == 3
