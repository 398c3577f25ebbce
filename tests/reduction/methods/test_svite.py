"""SViTE+'s token selector against a reference written from its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import make_reducer
from tdm_jax.errors import InputError
from tdm_jax.reduction.contract import BlockContext, ViTShape
from tdm_jax.reduction.token_state import TokenState

SHAPE = ViTShape(grid=(3, 4), depth=3, width=8, num_heads=2)
REDUCER = make_reducer("svite", keep_rate=0.4)  # 5 of 12
RNG = np.random.default_rng(0)
TOKENS = RNG.normal(size=(2, 12, 8)).astype(np.float32)
WEIGHTS = {
    "kernel": RNG.normal(size=(8, 1)).astype(np.float32),
    "bias": np.ones(1, np.float32),
}


def select(tokens, weights, key=None, reducer=REDUCER):
    context = BlockContext(
        layer=0, shape=SHAPE, train=key is not None, weights={"stage_0": weights}, key=key
    )
    return reducer.before_block(TokenState.start(jnp.zeros((2, 1, 8)), tokens), context)


def test_inference_keeps_the_highest_scores_in_order():
    state = select(jnp.asarray(TOKENS), WEIGHTS)
    for image in range(2):
        order = np.argsort(-(TOKENS[image] @ WEIGHTS["kernel"])[:, 0], kind="stable")[:5]
        np.testing.assert_array_equal(state.tokens[image], TOKENS[image][order])
        np.testing.assert_array_equal(state.assign[image, order], np.arange(5))


def test_training_samples_without_replacement_by_the_scores():
    draw = jax.jit(jax.vmap(lambda key: select(jnp.asarray(TOKENS), WEIGHTS, key).assign >= 0))
    often = np.asarray(draw(jax.random.split(jax.random.key(0), 4000))).mean(0)
    np.testing.assert_allclose(often.sum(1), 5, rtol=1e-6)
    # The same law, simulated one draw at a time.
    odds = np.exp(TOKENS @ WEIGHTS["kernel"])[..., 0]
    odds /= odds.sum(1, keepdims=True)
    for image in range(2):
        counts = np.zeros(12)
        for _ in range(4000):
            counts[RNG.choice(12, 5, replace=False, p=odds[image])] += 1
        np.testing.assert_allclose(often[image], counts / 4000, atol=0.05)


def test_the_gradient_is_that_of_the_softmax_over_kept_tokens():
    key, readout = jax.random.key(3), jnp.asarray(RNG.normal(size=(2, 5, 8)), jnp.float32)

    def ours(weights):
        return (select(jnp.asarray(TOKENS), weights, key).tokens * readout).sum()

    kept = select(jnp.asarray(TOKENS), WEIGHTS, key)
    place = np.asarray(kept.assign)

    def relaxed(weights):
        score = (TOKENS @ weights["kernel"] + weights["bias"])[..., 0]
        noise = jax.random.gumbel(key, score.shape)
        soft = jax.nn.softmax(jax.nn.log_softmax(score) + noise)
        worth = jnp.einsum("bnd,bkd->bnk", TOKENS, readout)
        worth = jnp.where(place >= 0, np.take_along_axis(worth, place[..., None], 2)[..., 0], 0)
        return (soft * worth).sum()

    got, expected = jax.grad(ours)(WEIGHTS), jax.grad(relaxed)(WEIGHTS)
    np.testing.assert_allclose(got["kernel"], expected["kernel"], rtol=1e-4, atol=1e-6)
    assert np.abs(got["kernel"]).max() > 1e-3


def test_weights_come_under_the_originals_names():
    arrays = {"gumbel.weight": WEIGHTS["kernel"].T, "gumbel.bias": WEIGHTS["bias"]}
    jax.tree.map(
        np.testing.assert_array_equal, REDUCER.import_weights(arrays), {"stage_0": WEIGHTS}
    )
    with pytest.raises(InputError, match=r"expected the weights gumbel\.weight .* got other"):
        REDUCER.import_weights({"other": WEIGHTS["bias"]})
    with pytest.raises(InputError, match=r"expected layers with one block; got \(0, 3\)"):
        make_reducer("svite", layers=(0, 3)).import_weights(arrays)


def test_bad_settings_are_refused():
    with pytest.raises(InputError, match="temperature must be positive; got 0"):
        make_reducer("svite", temperature=0.0)
