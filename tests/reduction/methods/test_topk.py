"""Top-K: equal to its original, and the scores that it can rank by.

With `tdm_jax.reduction.scores` and `tdm_jax.reduction.prune`.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import make_reducer
from tdm_jax.errors import InputError
from tdm_jax.models.attention import AttentionView
from tdm_jax.reduction import ViTShape
from tdm_jax.reduction.scores import importance


@pytest.mark.golden
@pytest.mark.parametrize("keep_rate", [0.7, 0.5])
def test_equals_the_original(answer, golden, keep_rate):
    expected = golden(f"topk_keep{keep_rate}")
    logits, info = answer(make_reducer("topk", keep_rate=keep_rate))
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    assert [n + 1 for n in info.token_counts] == expected["tokens"].tolist()


def test_scores_against_the_whole_attention_map():
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 7, 2, 4))
    logits = np.einsum("bqhc,bkhc->bhqk", q, k) / 2
    share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    view = AttentionView(*(jnp.array(x) for x in (q, k, v, q[:, 0])), None, 2)
    np.testing.assert_allclose(importance("class", view), share[:, :, 0, 2:].mean(1), rtol=1e-5)
    received = share.sum((1, 2))[:, 2:]
    np.testing.assert_allclose(
        importance("mean", view), received / received.sum(1, keepdims=True), rtol=1e-5
    )
    norm = np.linalg.norm(k[:, 2:].reshape(2, 5, 8), axis=-1)
    np.testing.assert_allclose(
        importance("key_norm", view), norm / norm.sum(1, keepdims=True), rtol=1e-5
    )


def test_a_score_needs_its_class_token():
    bare = ViTShape((4, 4), 12, 32, 2, prefix=0, class_token=False)
    with pytest.raises(InputError, match="needs a class token"):
        make_reducer("topk").check(bare)
    make_reducer("topk", importance="mean").check(bare)
    with pytest.raises(InputError, match="did you mean 'mean'"):
        make_reducer("topk", importance="mena")
