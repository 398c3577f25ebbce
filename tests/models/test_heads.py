"""Pooling against NumPy, and what a model is composed of (models/block.py)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax.errors import InputError
from tdm_jax.models.heads import AttentionPool, PoolingQuery, mean_patch
from tdm_jax.reduction.token_state import TokenState

WIDTH, HEADS, EPS = 12, 3, 1e-6


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def normed(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPS)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


@functools.cache
def attention_pool():
    pool = AttentionPool(HEADS, 20, "gelu_tanh", EPS)
    shapes = jax.eval_shape(pool.init, jax.random.key(0), draw(1, 2, WIDTH))
    return pool, jax.tree.map(lambda leaf: 0.5 * draw(*leaf.shape, seed=3), shapes["params"])


def logits_of(params, x):
    """[b, h, t], head by head."""
    dense = lambda x, p: x @ p["kernel"] + p["bias"]  # noqa: E731
    query = dense(params["latent"][0, 0], params["q"]).reshape(HEADS, -1)
    keys = dense(x, params["kv"])[..., :WIDTH].reshape(*x.shape[:2], HEADS, -1)
    return np.einsum("hk,bthk->bht", query, keys) * (WIDTH // HEADS) ** -0.5


def test_the_attention_pool_is_its_definition():
    pool, params = attention_pool()
    x, bias = draw(2, 5, WIDTH), draw(2, 5, seed=1)
    share = softmax(logits_of(params, x) + bias[:, None])
    values = (x @ params["kv"]["kernel"] + params["kv"]["bias"])[..., WIDTH:]
    y = np.einsum("bht,bthk->bhk", share, values.reshape(2, 5, HEADS, -1)).reshape(2, WIDTH)
    y = y @ params["proj"]["kernel"] + params["proj"]["bias"]
    mlp = params["mlp"]
    hidden = normed(y) * params["norm"]["scale"] + params["norm"]["bias"]
    hidden = np.asarray(jax.nn.gelu(hidden @ mlp["fc1"]["kernel"] + mlp["fc1"]["bias"]))
    expected = y + hidden @ mlp["fc2"]["kernel"] + mlp["fc2"]["bias"]
    np.testing.assert_allclose(pool.apply({"params": params}, x, bias), expected, atol=2e-5)


def test_the_pooling_query_sees_what_the_head_would_see():
    _, params = attention_pool()
    norm = {"scale": 1 + 0.2 * draw(WIDTH, seed=4), "bias": draw(WIDTH, seed=5)}
    tokens = 3 * draw(2, 7, WIDTH, seed=6)
    expected = softmax(logits_of(params, normed(tokens) * norm["scale"] + norm["bias"]))
    query = PoolingQuery.of(norm, params, HEADS, EPS)
    np.testing.assert_allclose(query(jnp.asarray(tokens)), expected, atol=1e-5)


def test_a_token_counts_as_often_as_it_stands_for_patches():
    features = draw(1, 1 + 3, WIDTH)
    state = TokenState.start(jnp.asarray(features[:, :1]), jnp.asarray(features[:, 1:]))
    state = state.replace(size=jnp.asarray([[1.0, 5.0, 2.0]]))
    expected = (features[:, 1] + 5 * features[:, 2] + 2 * features[:, 3]) / 8
    np.testing.assert_allclose(mean_patch(jnp.asarray(features), state), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "relu"}, "relu.*gelu_tanh"),
        ({"pool": "max"}, "max.*token"),
        ({"positions": "class"}, "class.*patches"),
        ({"interpolation": "cubic"}, "cubic.*bicubic"),
        ({"qkv_bias": "vq"}, "letters of 'qkv'.*'vq'"),
        ({"pool": "token", "class_token": False}, "class_token=False.*'avg' or 'map'"),
        ({"fc_norm": True}, "fc_norm.*pool='avg'; got 'token'"),
        ({"distilled": True, "pool": "avg"}, "distilled.*got pool='avg'"),
        ({"num_classes": -1}, "num_classes must be at least 0; got -1"),
        ({"width": 12, "num_heads": 2, "rotary": {}}, "multiple of 4 channels; got 6"),
    ],
)
def test_what_fits_no_head_or_block_is_refused(tiny_model, settings, message):
    with pytest.raises(InputError, match=message):
        tiny_model(**settings)
