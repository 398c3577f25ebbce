"""DynamicViT: equal to its original at inference, and what it learns from in training.

With `tdm_jax.reduction.learned`, most of which it is made of.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import create_model, make_reducer
from tdm_jax.errors import InputError
from tdm_jax.models.attention import masked_attention
from tdm_jax.ops.gathering import inverse_index
from tdm_jax.ops.ordering import argtopk
from tdm_jax.reduction.learned import (
    gumbel_keep,
    logit_distillation,
    mask_tokens,
    token_distillation,
)
from tdm_jax.reduction.methods.dyvit import Predicted
from tdm_jax.reduction.token_state import TokenState

TINY = {
    "image_size": (32, 48),
    "patch_size": 8,
    "width": 32,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 5,
}
IMAGES = jax.random.normal(jax.random.key(1), (3, 32, 48, 3))
LABELS = jax.nn.one_hot(jnp.arange(3), 5)
RNGS = {"reducer": jax.random.key(2)}


REDUCER = make_reducer("dyvit", keep_rate=0.5, layers=(1, 2))


def tiny(reducer):
    return create_model("vit", reducer, **TINY)


@pytest.fixture(scope="module")
def params():
    """Of all models here: the weights follow from the stages alone."""
    params = jax.jit(tiny(REDUCER).init)(jax.random.key(0), IMAGES)
    # Fresh predictors hardly tell two tokens apart.
    own = jax.tree.map(lambda x: x if x.ndim < 2 else 10 * x, params["params"]["reducer"])
    return {"params": {**params["params"], "reducer": own}}


def run(reducer, params, **options):
    forward = functools.partial(tiny(reducer).apply, return_info=True, **options)
    return jax.jit(forward)(params, IMAGES)


@pytest.fixture(scope="module")
def trained(params):
    """Logits and `Info` of a training forward pass."""
    return run(REDUCER, params, train=True, rngs=RNGS)


@pytest.fixture(scope="module")
def teacher(params):
    return run("none", params)


@pytest.mark.golden
@pytest.mark.parametrize("keep_rate", [0.7, 0.5])
def test_inference_equals_the_original(answer, golden, keep_rate):
    expected = golden(f"dyvit_keep{keep_rate}")
    logits, info = answer(make_reducer("dyvit", keep_rate=keep_rate), expected)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    assert [n + 1 for n in info.token_counts] == expected["tokens"].tolist()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MasksTheLowest(Predicted):
    """Masks in training what inference would drop."""

    def mask(self, state, context, weights, share):
        score = self.measure(state, context, weights)
        if state.valid is not None:
            score = jnp.where(state.valid > 0, score, -1.0)
        kept = round(share * context.shape.patches)
        return mask_tokens(
            state, (inverse_index(argtopk(score, kept), state.count) >= 0).astype(jnp.float32)
        )


def test_a_hidden_token_stays_where_it_is():
    state = TokenState.start(jnp.zeros((1, 1, 4)), jnp.zeros((1, 6, 4)))
    masked = mask_tokens(state, jnp.array([[1.0, 0.0, 1.0, 0.0, 0.0, 1.0]]))
    np.testing.assert_array_equal(masked.positions((2, 3)), state.positions((2, 3)))


def test_masking_in_training_is_dropping_at_inference(params):
    reducer = make_reducer("dyvit", keep_rate=0.6, layers=(1, 2))
    reducer = dataclasses.replace(reducer, importance=MasksTheLowest())
    logits, info = run(reducer, params, train=True)
    expected, gathered = run(reducer, params)
    assert info.token_counts == (24,) * 3
    assert gathered.token_counts == (24, 14, 8)
    # The epsilon in the masked softmax is all that differs.
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    dropped = np.asarray(info.assign) < 0
    np.testing.assert_array_equal(dropped, gathered.assign < 0)
    np.testing.assert_allclose(
        np.asarray(info.dropped_values)[dropped],
        np.asarray(gathered.dropped_values)[dropped],
        atol=1e-4,
    )


def test_training_draws_nested_masks_and_records_how_many_stay(trained):
    _, info = trained
    assert set(np.unique(info.valid)) == {0.0, 1.0}
    np.testing.assert_array_equal(info.valid > 0, info.assign >= 0)
    kept = info.carry["excess"] + jnp.array([0.5, 0.25])
    np.testing.assert_allclose(kept[:, 1], info.valid.mean(1), atol=1e-6)
    assert (kept[:, 1] < kept[:, 0]).all()
    # Each image has its own draw.
    assert len(np.unique(info.valid, axis=0)) == 3


@pytest.mark.parametrize("name", ["dyvit", "dyvit+tdm"])
def test_the_class_answer_teaches_every_predictor(params, name):
    model = tiny(make_reducer(name, keep_rate=0.5, layers=(1, 2)))

    def loss(own):
        weights = {"params": {**params["params"], "reducer": own}}
        logits = model.apply(weights, IMAGES, train=True, rngs=RNGS)
        return -(LABELS * jax.nn.log_softmax(logits)).sum(-1).mean()

    grads = jax.jit(jax.grad(loss))(params["params"]["reducer"])
    assert set(grads) == {"stage_0", "stage_1"}
    for stage in grads.values():
        gradient = stage["out"]["kernel"]
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 1e-6


def test_losses_against_their_definitions(trained, teacher):
    logits, info = trained
    losses = REDUCER.losses(info, logits, LABELS, teacher)
    ratio = np.square(info.carry["excess"]).sum(1).mean() / 2
    log_p, log_q = (np.asarray(jax.nn.log_softmax(x)) for x in (teacher[0], logits))
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(1).mean()
    kept = np.asarray(info.valid) > 0
    tokens = np.square(np.asarray(info.features - teacher[1].features))[:, 1:][kept].mean()
    np.testing.assert_allclose(losses["ratio"], 2.0 * ratio, rtol=1e-5)
    np.testing.assert_allclose(losses["logit_distillation"], 0.5 * divergence, rtol=1e-4)
    np.testing.assert_allclose(losses["token_distillation"], 0.5 * tokens, rtol=1e-5)
    assert set(REDUCER.losses(info, logits, LABELS)) == {"ratio"}


def test_answers_that_are_no_logits_are_refused(trained, teacher):
    _, info = trained
    with pytest.raises(InputError, match="expected logits of 5 classes; got 32 numbers.*classes=0"):
        REDUCER.losses(info, info.features[:, 0], LABELS, teacher)


def test_the_teacher_gets_no_gradient_and_teaches_nothing_to_itself(teacher):
    logits, info = teacher
    assert token_distillation(info, info) == 0
    np.testing.assert_allclose(logit_distillation(logits, logits), 0, atol=1e-6)
    gradient = jax.grad(lambda t: logit_distillation(logits + LABELS, t))(logits)
    np.testing.assert_array_equal(gradient, 0)
    narrow = info.replace(
        features=info.features[..., :16],
        dropped_values=info.dropped_values[..., :16],
        patches=info.patches[..., :16],
    )
    with pytest.raises(InputError, match=r"got features \(3, 24, 16\), expected \(3, 24, 32\)"):
        token_distillation(info, narrow)


def test_gumbel_masks_keep_with_the_odds_and_pass_the_soft_gradient():
    logits = jnp.log(jnp.array([[0.2, 0.8], [0.9, 0.1]]))
    many = jnp.broadcast_to(logits, (20_000, 2, 2))
    keep = gumbel_keep(jax.random.key(0), many)
    assert set(np.unique(keep)) == {0.0, 1.0}
    np.testing.assert_allclose(keep.mean(0), [0.2, 0.9], atol=0.02)

    def soft(logits):
        return jax.nn.softmax(logits + jax.random.gumbel(jax.random.key(1), (4, 2, 2)))[..., 0]

    few = many[:4]
    hard = jax.vjp(lambda x: gumbel_keep(jax.random.key(1), x), few)[1](jnp.ones((4, 2)))
    np.testing.assert_allclose(hard[0], jax.vjp(soft, few)[1](jnp.ones((4, 2)))[0], rtol=1e-6)


def test_a_strong_hidden_key_neither_leaks_nor_explodes():
    # The hidden key's logit lies 40 above those that are seen.
    key = jnp.array([0.0, 40.0, 0.0]).reshape(1, 3, 1, 1)

    def second_of_first(mask):
        return masked_attention(jnp.ones_like(key), key, key / 40, mask)[0, 0, 0, 0]

    value, gradient = jax.value_and_grad(second_of_first)(jnp.array([[1.0, 0.0, 1.0]]))
    np.testing.assert_allclose(value, 0.0, atol=1e-5)
    np.testing.assert_allclose(gradient, [[0.0, 0.5, 0.0]], atol=1e-5)


def test_bad_input_is_refused(golden, params):
    with pytest.raises(InputError, match="expected rngs"):
        jax.eval_shape(lambda x: tiny(REDUCER).apply(params, x, train=True), IMAGES)
    with pytest.raises(InputError, match="width of at least 4; got 2"):
        create_model("vit", "dyvit", **{**TINY, "width": 2, "layers": (1, 2)})
    arrays = {k[2:]: v for k, v in golden("dyvit_keep0.5").items() if k.startswith("w:")}
    del arrays["score_predictor.1.in_conv.1.bias"]
    with pytest.raises(InputError, match=r"score_predictor\.1\.in_conv\.1\.bias"):
        make_reducer("dyvit").import_weights(arrays)
