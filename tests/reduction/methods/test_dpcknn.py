"""DPC-KNN: equal to its original, and its weights."""

import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import make_reducer
from tdm_jax.errors import InputError
from tdm_jax.reduction import BlockContext, ViTShape
from tdm_jax.reduction.token_state import TokenState


@pytest.mark.golden
@pytest.mark.parametrize("keep_rate", [0.7, 0.5])
def test_equals_the_original(answer, golden, keep_rate):
    expected = golden(f"dpcknn_keep{keep_rate}")
    logits, info = answer(make_reducer("dpcknn", keep_rate=keep_rate))
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    assert [n + 1 for n in info.token_counts] == expected["tokens"].tolist()
    assert [info.token_counts[i] for i in (3, 6, 9)] == expected["clusters"].tolist()


def test_a_cluster_is_the_mean_of_its_tokens_or_of_their_patches():
    tokens = jnp.array([[[0.0], [0.1], [1.0]]])
    state = TokenState.start(jnp.zeros((1, 0, 1)), tokens).replace(size=jnp.array([[1.0, 3, 2]]))
    context = BlockContext(layer=1, shape=ViTShape((1, 3), 2, 1, 1, 0), train=False, weights={})
    for average, near in (("uniform", 0.05), ("size", 0.075)):
        reducer = make_reducer("dpcknn", counts=(2,), layers=(1,), average=average)
        after = reducer.reduce(state, context)
        np.testing.assert_allclose(np.sort(after.tokens[0, :, 0]), [near, 1.0], rtol=1e-6)
        np.testing.assert_allclose(np.sort(after.size[0]), [2, 4])


def test_a_learned_score_weighs_by_its_exponential():
    tokens = jnp.array([[[0.0, 0.1], [0.1, 0.3], [1.0, 0.0]]])
    state = TokenState.start(jnp.zeros((1, 0, 2)), tokens)
    reducer = make_reducer("dpcknn_score", counts=(2,), layers=(1,), weight="size")
    state = state.replace(size=jnp.array([[1.0, 3.0, 2.0]]))
    weights = reducer.import_weights(
        {
            "cluster_layers.0.score.weight": np.array([[0.0, 5.0]], np.float32),
            "cluster_layers.0.score.bias": np.array([7.0], np.float32),
        }
    )
    context = BlockContext(
        layer=1, shape=ViTShape((1, 3), 2, 2, 1, 0), train=False, weights=weights
    )
    after = np.asarray(reducer.reduce(state, context).tokens[0])
    a, b = np.exp(0.5), 3 * np.exp(1.5)
    expected = (a * np.array([0.0, 0.1]) + b * np.array([0.1, 0.3])) / (a + b)
    np.testing.assert_allclose(after[np.argsort(after[:, 0])], [expected, [1.0, 0.0]], rtol=1e-6)


def test_bad_settings():
    with pytest.raises(InputError, match="neighbors must be at least 1; got 0"):
        make_reducer("dpcknn", neighbors=0)
    with pytest.raises(InputError, match="unknown average of reducer 'dpcknn' 'score'"):
        make_reducer("dpcknn", average="score")
