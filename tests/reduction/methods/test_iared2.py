"""IA-RED2: its scores, draws and rewards against references written from the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import create_model, make_reducer
from tdm_jax.errors import InputError
from tdm_jax.reduction.contract import BlockContext, ViTShape
from tdm_jax.reduction.methods.iared2 import policy_loss, rewards
from tdm_jax.reduction.token_state import TokenState

SHAPE = ViTShape(grid=(3, 4), depth=3, width=8, num_heads=2)
REDUCER = make_reducer("iared2", keep_rate=0.5, layers=(1, 2))
RNG = np.random.default_rng(0)
TOKENS = RNG.normal(size=(2, 12, 8)).astype(np.float32)
PREFIX = RNG.normal(size=(2, 2, 8)).astype(np.float32)


def weights_of(reducer, shape):
    tree = jax.eval_shape(lambda key: reducer.init(key, shape), jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), tree)


WEIGHTS = weights_of(REDUCER, SHAPE)


def stage(layer, state=None, key=None):
    state = TokenState.start(jnp.asarray(PREFIX), jnp.asarray(TOKENS)) if state is None else state
    context = BlockContext(
        layer=layer, shape=SHAPE, train=key is not None, weights=WEIGHTS, key=key
    )
    return REDUCER.before_block(state, context)


def reference_score(image, weights):
    def normal(x):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-6)

    scores = []
    for token in TOKENS[image]:
        q = normal(token) @ weights["token"]["kernel"] + weights["token"]["bias"]
        k = normal(PREFIX[image, 0]) @ weights["class"]["kernel"] + weights["class"]["bias"]
        heads = [q[h : h + 4] @ k[h : h + 4] / 2 for h in (0, 4)]
        scores.append(np.mean([1 / (1 + np.exp(-head)) for head in heads]))
    return np.array(scores)


def test_inference_keeps_the_most_informative_in_order():
    state = stage(1)
    for image in range(2):
        order = np.argsort(-reference_score(image, WEIGHTS["stage_0"]), kind="stable")[:6]
        np.testing.assert_array_equal(state.tokens[image], TOKENS[image][order])
    assert stage(2, state).count == 3


def test_training_draws_by_the_scores_and_records_the_odds():
    def draw(key):
        state = stage(1, key=key)
        return state.valid, state.carry

    valid, carry = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 4000))
    for image in range(2):
        score = reference_score(image, WEIGHTS["stage_0"])
        probability = 0.8 * score + 0.2 * (1 - score)
        drawn = np.asarray(valid[:, image])
        np.testing.assert_allclose(drawn.mean(0), probability, atol=0.04)
        logs = np.log(np.where(drawn[0] > 0, probability, 1 - probability)).mean()
        np.testing.assert_allclose(carry["log_probability"][0, image, 0], logs, rtol=1e-4)
        np.testing.assert_allclose(carry["kept"][0, image, 0], drawn[0].mean(), rtol=1e-6)


def test_a_masked_token_stays_masked_and_draws_no_more():
    first = stage(1, key=jax.random.key(0))
    second = stage(2, first, key=jax.random.key(1))
    assert ((first.valid - second.valid) >= 0).all()
    score = reference_score(0, WEIGHTS["stage_1"])
    probability = 0.8 * score + 0.2 * (1 - score)
    there, stays = np.asarray(first.valid[0]) > 0, np.asarray(second.valid[0]) > 0
    logs = np.log(np.where(stays, probability, 1 - probability))[there].mean()
    np.testing.assert_allclose(second.carry["log_probability"][0, 1], logs, rtol=1e-4)


def test_rewards_and_policy_loss():
    kept = jnp.array([[1.0, 0.5], [0.5, 0.1], [0.2, 0.2]])
    reward = rewards(jnp.array([True, True, False]), kept, 0.5)
    np.testing.assert_allclose(reward, [1 - 0.75**2, 1 - 0.3**2, -0.5], rtol=1e-6)
    logs = jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.1], [0.3, 0.6]]))
    advantage = np.asarray(reward) - np.mean(reward)
    expected = -np.mean(advantage * np.asarray(logs).mean(1))
    np.testing.assert_allclose(policy_loss(reward, logs), expected, rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(policy_loss)(reward, logs), 0)


def test_following_the_loss_raises_the_expected_reward():
    # One token a head could keep or drop: right only if it keeps the first and drops the second.
    def draws(logits, key):
        p = jax.nn.sigmoid(logits)
        stays = jax.random.bernoulli(key, p, (512, 2))
        return stays, jnp.log(jnp.where(stays, p, 1 - p))

    def loss(logits, key):
        stays, logs = draws(logits, key)
        kept = stays.mean(1, keepdims=True)
        return policy_loss(rewards(stays[:, 0], kept, 0.5), logs.mean(1, keepdims=True))

    logits, gradient = jnp.zeros(2), jax.jit(jax.grad(loss))
    for context in range(100):
        logits -= 2.0 * gradient(logits, jax.random.key(context))
    assert logits[0] > 1.5
    assert logits[1] < -1.0


def test_the_policy_loss_moves_the_policies_alone():
    model = create_model(
        "vit",
        REDUCER,
        image_size=(24, 32),
        patch_size=8,
        width=8,
        depth=3,
        num_heads=2,
        num_classes=3,
    )
    images = jax.random.normal(jax.random.key(1), (6, 24, 32, 3))
    labels = jax.nn.one_hot(jnp.arange(6) % 3, 3)

    @jax.jit
    @jax.grad
    def gradient(params):
        rngs = {"reducer": jax.random.key(2)}
        logits, info = model.apply(params, images, train=True, return_info=True, rngs=rngs)
        return REDUCER.losses(info, logits, labels)["policy"]

    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    params["reducer"] = weights_of(REDUCER, model.shape)
    grads = gradient({"params": params})["params"]
    for kernel in ("token", "class"):
        assert np.abs(grads["reducer"]["stage_1"][kernel]["kernel"]).max() > 1e-6
    del grads["reducer"]
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), grads)


def test_weights_come_by_name():
    arrays = {
        f"interpreter.{stage}.{part}.{name}": WEIGHTS[f"stage_{stage}"][part][leaf].T
        for stage in range(2)
        for part in ("token", "class")
        for name, leaf in (("weight", "kernel"), ("bias", "bias"))
    }
    jax.tree.map(np.testing.assert_array_equal, REDUCER.import_weights(arrays), WEIGHTS)


def test_bad_settings_are_refused():
    with pytest.raises(InputError, match="IARED2: .* needs a class token and the model has none"):
        REDUCER.check(ViTShape(grid=(2, 2), depth=3, width=8, num_heads=2, class_token=False))
    with pytest.raises(InputError, match=r"exploration must be in \[0, 0.5\); got 0.5"):
        make_reducer("iared2", exploration=0.5)
