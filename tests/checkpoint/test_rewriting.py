"""Another program's fields, and a tree that computes the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from tdm_jax.checkpoint.export import flat
from tdm_jax.checkpoint.rewriting import rewritten
from tdm_jax.errors import InputError

IMAGES = np.random.default_rng(0).normal(size=(1, 16, 16, 3)).astype(np.float32)


def _answer(model, params):
    tree = traverse_util.unflatten_dict(jax.tree.map(jnp.asarray, params), sep="/")
    return model.apply({"params": tree}, jnp.asarray(IMAGES))


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"num_registers": 2}, {"positions": "patches"}),
        ({"distilled": True}, {"positions": "patches"}),
        ({"distilled": True, "positions": "patches"}, {"positions": "all"}),
        ({"class_token": False, "positions": "patches"}, {"positions": "all"}),
        ({"patch_bias": False, "head_bias": False}, {"patch_bias": True, "head_bias": True}),
        ({"qkv_bias": "v"}, {"qkv_bias": "qkv"}),
        ({"qkv_bias": ""}, {"qkv_bias": "qv"}),
        ({"pool": None}, {"pooling": "token"}),
    ],
)
def test_the_same_function(fields, wanted, tiny_model):
    model, variables = tiny_model(**fields)
    params = flat(variables)
    before = {path: array.copy() for path, array in params.items()}
    other, changed = rewritten(model, params, wanted, "a test")
    assert {name: getattr(other, name) for name in wanted} == wanted
    np.testing.assert_allclose(_answer(other, changed), _answer(model, params), atol=1e-6)
    for path, array in params.items():
        np.testing.assert_array_equal(array, before[path])


def test_a_bias_of_zeros_is_left_out(tiny_model):
    model, variables = tiny_model()
    params = flat(variables) | {"head/bias": np.zeros(3, np.float32)}
    other, changed = rewritten(model, params, {"head_bias": False}, "a test")
    assert set(params) - set(changed) == {"head/bias"}
    np.testing.assert_array_equal(_answer(other, changed), _answer(model, params))


@pytest.mark.parametrize(
    ("fields", "wanted", "message"),
    [
        ({}, {"head_bias": False}, "a test has head_bias=False; got True: expected a model of"),
        ({}, {"qkv_bias": "qv"}, "qkv_bias='qv'; got 'qkv'"),
        ({}, {"positions": "none"}, "positions='none'; got 'all'"),
        ({"pool": "avg"}, {"pooling": "token"}, "pool='token'; got 'avg': expected --pool=token,"),
        ({}, {"layer_scale": True}, "layer_scale=True; got False"),
    ],
)
def test_refused(fields, wanted, message, tiny_model):
    model, variables = tiny_model(**fields)
    with pytest.raises(InputError, match=message):
        rewritten(model, flat(variables), wanted, "a test")
