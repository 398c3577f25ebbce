"""What tokens can be ranked by: each score in NumPy, and the models that have none of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import describe_reducer, make_reducer
from tdm_jax.errors import InputError
from tdm_jax.models.attention import AttentionView
from tdm_jax.models.heads import PoolingQuery
from tdm_jax.reduction import BlockContext, ViTShape
from tdm_jax.reduction.importance import (
    IMPORTANCES,
    ClassAttention,
    MeanReceived,
    Preferred,
)
from tdm_jax.reduction.token_state import TokenState

SHAPE = ViTShape((4, 4), 4, 32, 2)
BARE = ViTShape((4, 4), 4, 32, 2, prefix=0, class_token=False, pool="avg")
POOLED = ViTShape((4, 4), 4, 32, 2, prefix=0, class_token=False, pool="map")


def share(values):
    return values / values.sum(1, keepdims=True)


def test_scores_of_the_attention_against_its_whole_map():
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 7, 2, 4))
    logits = np.einsum("bqhc,bkhc->bhqk", q, k) / 2
    attention = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    view = AttentionView(*(jnp.array(x) for x in (q, k, v, q[:, 0])), None, 2)
    context = BlockContext(layer=1, shape=SHAPE, train=False, weights={}, attention=view)
    state = TokenState.start(jnp.zeros((2, 2, 8)), jnp.zeros((2, 5, 8)))
    row, norm = attention[:, :, 0, 2:], np.linalg.norm(v[:, 2:], axis=-1)
    expected = {
        "class": row.mean(1),
        "value": share(row.sum(1) * np.linalg.norm(v[:, 2:].reshape(2, 5, 8), axis=-1)),
        "head_value": share(np.einsum("bhn,bnh->bn", row, norm)),
        "received": attention.sum((1, 2))[:, 2:],
        "mean": share(attention.sum((1, 2))[:, 2:]),
        "key_norm": share(np.linalg.norm(k[:, 2:].reshape(2, 5, 8), axis=-1)),
    }
    for name, score in expected.items():
        np.testing.assert_allclose(IMPORTANCES[name].measure(state, context, {}), score, rtol=1e-5)


def test_pool_is_what_the_head_attends_to(tiny_model):
    """The head itself, on the tokens that leave the last block."""
    model, variables = tiny_model(class_token=False, pool="map", num_classes=0)
    variables = jax.tree.map(jnp.asarray, variables)
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    run = functools.partial(model.apply, return_info=True, intermediates=(2,))
    _, info = jax.jit(run)(variables, images)
    tokens = info.intermediates[0].features
    params = variables["params"]
    query = PoolingQuery.of(params["norm"], params["attn_pool"], 2, model.layer_norm_eps)
    state = TokenState.start(jnp.zeros((2, 0, 16)), tokens)
    context = BlockContext(layer=2, shape=model.shape, train=False, weights={}, pooling=query)
    pool = jax.tree.map(np.asarray, params["attn_pool"])
    q = pool["latent"][0, 0] @ pool["q"]["kernel"] + pool["q"]["bias"]
    keys = np.asarray(info.features) @ pool["kv"]["kernel"][:, :16] + pool["kv"]["bias"][:16]
    logits = np.einsum("hk,bnhk->bhn", q.reshape(2, 8), keys.reshape(2, 16, 2, 8)) * 8**-0.5
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    got = IMPORTANCES["pool"].measure(state, context, {})
    np.testing.assert_allclose(got, expected.mean(1), rtol=1e-4, atol=1e-6)


class Mlps:
    """Blocks whose MLPs add random numbers, for the hooks around them."""

    def __init__(self, reducer, updates):
        self.reducer, self.updates = reducer, updates

    def run(self):
        b, n, d = self.updates[0].shape
        state = TokenState.start(jnp.zeros((b, 1, d)), jnp.ones((b, n, d)))
        recorded = []
        for layer, update in enumerate(self.updates):
            context = BlockContext(layer=layer, shape=SHAPE, train=False, weights={})
            state = self.reducer.after_attention(state, context)
            update = update[:, : state.count]
            state = self.reducer.after_block(state, context.replace(update=update))
            recorded.append(bool(state.carry))
        return state, recorded


def test_shift_keeps_what_the_mlp_of_the_block_before_changed_most():
    updates = jax.random.normal(jax.random.key(0), (4, 2, 16, 32))
    reducer = make_reducer("topk", importance="shift", counts=(5, 5), layers=(2, 3))
    state, recorded = Mlps(reducer, updates).run()
    # Only before a stage that leaves fewer tokens, and not behind it.
    assert recorded == [False, True, False, False]
    norm = np.linalg.norm(updates[1], axis=-1)
    np.testing.assert_array_equal(
        np.sort(np.argsort(-norm, axis=1)[:, :5]), np.sort(np.argsort(state.assign)[:, -5:])
    )
    before = TokenState.start(jnp.zeros((2, 1, 32)), updates[0])
    context = BlockContext(layer=1, shape=SHAPE, train=False, weights={}, update=updates[1])
    stage = BlockContext(layer=2, shape=SHAPE, train=False, weights={})
    after, score = reducer.score(reducer.after_block(before, context), stage)
    np.testing.assert_allclose(score, share(norm), rtol=1e-5)
    assert not after.carry


def test_shift_of_a_branch_that_was_dropped_has_a_gradient():
    state = TokenState.start(jnp.zeros((1, 1, 8)), jnp.zeros((1, 3, 8)))
    context = BlockContext(layer=1, shape=SHAPE, train=True, weights={})

    def score(update):
        return IMPORTANCES["shift"].measure(state, context.replace(update=update), {})

    np.testing.assert_allclose(score(state.tokens), np.full((1, 3), 1 / 3), rtol=1e-6)
    assert np.isfinite(jax.jacobian(score)(state.tokens)).all()


@pytest.mark.parametrize("name", ["topk", "evit", "tdm"])
def test_the_default_is_the_class_tokens_where_there_is_one(name):
    reducer = make_reducer(name, keep_rate=0.5)
    assert reducer.importance == Preferred()
    assert Preferred().for_model(SHAPE) == ClassAttention()
    assert Preferred().for_model(BARE) == MeanReceived()
    reducer = make_reducer(name, keep_rate=0.5, layers=(1,))
    for shape in (SHAPE, BARE, POOLED):
        reducer.check(shape)
    assert "importance" not in describe_reducer(reducer)
    assert describe_reducer(make_reducer(name, importance="class"))["importance"] == "class"


@pytest.mark.parametrize(
    ("importance", "shape", "message"),
    [
        ("class", BARE, "'class' needs a class token and the model has none; expected "
         "importance='received', 'mean', 'key_norm', 'shift' or 'chance'"),
        ("class", POOLED, "expected importance='received', 'mean', 'key_norm', 'pool', 'shift' or"),
        ("value", BARE, "'value' needs a class token and the model has none"),
        ("head_value", BARE, "'head_value' needs a class token and the model has none"),
        ("pool", SHAPE, "'pool' needs a pooling head and the model has none; expected "
         "importance='class', 'value', 'head_value', 'received', 'mean', 'key_norm', 'shift' or"),
    ],
)  # fmt: skip
def test_a_score_needs_its_part_of_a_model(importance, shape, message):
    with pytest.raises(InputError, match=f"TDM: importance .*{message}"):
        make_reducer("tdm", importance=importance, layers=(1,)).check(shape)


def test_shift_needs_a_block_before():
    for layers in ((0, 2), "all"):
        with pytest.raises(
            InputError, match="measured in the block before a stage; expected layers from 1; got 0"
        ):
            make_reducer("evit", importance="shift", layers=layers).check(SHAPE)
    make_reducer("evit", importance="shift", layers=(1, 2)).check(SHAPE)


def test_an_unknown_score_is_named():
    with pytest.raises(InputError, match="did you mean 'mean'"):
        make_reducer("topk", importance="mena")
