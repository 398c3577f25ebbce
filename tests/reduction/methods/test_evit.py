"""EViT: equal to its original, and its fused token."""

import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import make_reducer
from tdm_jax.errors import InputError
from tdm_jax.reduction import BlockContext, ViTShape, plan
from tdm_jax.reduction.decoupling import Counts
from tdm_jax.reduction.token_state import TokenKind, TokenState

SHAPE = ViTShape((4, 4), 4, 8, 2)


@pytest.mark.golden
@pytest.mark.parametrize("keep_rate", [0.7, 0.5])
def test_equals_the_original(answer, golden, keep_rate):
    expected = golden(f"evit_keep{keep_rate}")
    logits, info = answer(make_reducer("evit", keep_rate=keep_rate))
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    assert [n + 1 for n in info.token_counts] == expected["tokens"].tolist()


def test_the_fused_token_is_the_sum_by_attention_of_what_is_left_over():
    draw = np.random.default_rng(0)
    tokens, score = draw.standard_normal((1, 5, 8)), np.array([[0.1, 0.3, 0.05, 0.4, 0.15]])
    state = TokenState.start(jnp.zeros((1, 1, 8)), jnp.array(tokens))
    context = BlockContext(layer=1, shape=ViTShape((1, 5), 4, 8, 2), train=False, weights={})
    reducer = make_reducer("evit", layers=(1,))
    after = reducer.apply(state, jnp.array(score), Counts(2, 2, 0, 1), context)
    fused = 0.1 * tokens[0, 0] + 0.05 * tokens[0, 2] + 0.15 * tokens[0, 4]
    np.testing.assert_allclose(after.tokens[0], [tokens[0, 3], tokens[0, 1], fused], atol=1e-6)
    np.testing.assert_array_equal(after.assign, [[2, 1, 2, 0, 2]])
    np.testing.assert_array_equal(after.size, [[1, 1, 3]])
    np.testing.assert_array_equal(after.kind, [[TokenKind.KEPT, TokenKind.KEPT, TokenKind.FUSED]])


def test_the_fused_token_counts_in_the_next_stage():
    blocks = plan(make_reducer("evit", keep_rate=0.5, layers=(1, 2)), SHAPE)
    assert [block.out for block in blocks] == [16, 9, 6, 6]
    # A count asked for by number is the whole.
    blocks = plan(make_reducer("evit", counts=(9, 4), layers=(1, 2)), SHAPE)
    assert [block.out for block in blocks] == [16, 9, 4, 4]


def test_one_token_has_no_room_for_the_fused_one():
    with pytest.raises(InputError, match="at least 2 tokens, the last of them fused; got 1"):
        plan(make_reducer("evit", counts=(1,), layers=(1,)), SHAPE)
