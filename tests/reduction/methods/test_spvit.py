"""SPViT against a slow reference written from its definition."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import create_model, make_reducer
from tdm_jax.errors import InputError
from tdm_jax.ops.gathering import inverse_index
from tdm_jax.ops.ordering import argtopk
from tdm_jax.reduction.contract import BlockContext, ViTShape
from tdm_jax.reduction.methods import spvit
from tdm_jax.reduction.methods.dyvit import ORIGINAL
from tdm_jax.reduction.token_state import TokenKind, TokenState

SHAPE = ViTShape(grid=(3, 4), depth=3, width=16, num_heads=2)
REDUCERS = {
    gate: make_reducer("spvit", keep_rate=0.6, layers=(1, 2), gate=gate) for gate in (False, True)
}
RNG = np.random.default_rng(0)


def weights_of(reducer):
    tree = jax.eval_shape(lambda key: reducer.init(key, SHAPE), jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), tree)


def state_of(tokens):
    prefix = jnp.zeros((tokens.shape[0], 1, tokens.shape[2]))
    return TokenState.start(prefix, jnp.asarray(tokens, jnp.float32), keep_dropped=True)


def context_of(weights, layer, train=False):
    key = jax.random.key(layer) if train else None
    return BlockContext(layer=layer, shape=SHAPE, train=train, weights=weights, key=key)


def linear(x, w):
    return x @ w["kernel"] + w["bias"]


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def reference_scores(tokens, there, weights, heads, gate):
    """Keep scores of one image's tokens [n, d], head by head."""
    size = tokens.shape[1] // heads
    keep, means = [], []
    for head in range(heads):
        x, w = tokens[:, head * size : (head + 1) * size], weights[f"head_{head}"]
        means.append(x.mean(1))
        x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        x = gelu(linear(x * w["norm"]["scale"] + w["norm"]["bias"], w["token"]))
        mean = (x[:, size // 2 :] * there[:, None]).sum(0) / there.sum()
        x = np.concatenate([x[:, : size // 2], np.tile(mean, (len(x), 1))], 1)
        x = linear(gelu(linear(gelu(linear(x, w["hidden_0"])), w["hidden_1"])), w["out"])
        keep.append(np.exp(x[:, 0]) / np.exp(x).sum(1))
    keep, means = np.stack(keep, 1), np.stack(means, 1)
    if not gate:
        return keep.mean(1)
    gates = 1 / (1 + np.exp(-linear(gelu(linear(means, weights["squeeze"])), weights["excite"])))
    return (keep * gates).sum(1) / gates.sum(1)


def reference_stage(tokens, packages, kept, weights, gate):
    """One image through one stage; the last `packages` tokens are packages."""
    own = len(tokens) - packages
    score = reference_scores(tokens, np.ones(len(tokens)), weights, SHAPE.num_heads, gate)[:own]
    order = np.argsort(-score, kind="stable")
    best, rest = order[:kept], order[kept:]
    package = (score[rest, None] * tokens[rest]).sum(0) / score[rest].sum()
    return np.concatenate([tokens[best], tokens[own:], package[None]])


@pytest.mark.slow
@pytest.mark.parametrize("gate", [False, True])
def test_two_stages_equal_the_reference(gate):
    reducer, weights = REDUCERS[gate], weights_of(REDUCERS[gate])
    tokens = RNG.normal(size=(2, 12, 16))
    state = reducer.before_block(state_of(tokens), context_of(weights, 1))
    assert state.count == 7 + 1
    state = reducer.before_block(state, context_of(weights, 2))
    assert state.count == 4 + 2
    for image in range(2):
        expected = reference_stage(tokens[image], 0, 7, weights["stage_0"], gate)
        expected = reference_stage(expected, 1, 4, weights["stage_1"], gate)
        np.testing.assert_allclose(state.tokens[image], expected, atol=1e-5)
    # The packages stand for what they hold: nothing is lost.
    np.testing.assert_array_equal(state.size.sum(1), 12)
    np.testing.assert_array_equal(state.size[:, 4:], [[5, 3]] * 2)
    np.testing.assert_array_equal(state.kind[:, 4:], TokenKind.FUSED)
    np.testing.assert_array_equal((state.assign == 4).sum(1), 5)


def test_a_training_stage_packs_what_it_drops():
    reducer, weights = REDUCERS[False], weights_of(REDUCERS[False])
    tokens = RNG.normal(size=(2, 12, 16))
    first = reducer.before_block(state_of(tokens), context_of(weights, 1, train=True))
    second = reducer.before_block(first, context_of(weights, 2, train=True))
    assert (first.count, second.count) == (13, 14)
    np.testing.assert_array_equal(second.valid[:, 12:], 1)
    for image in range(2):
        there = np.asarray(first.valid[image])
        dropped = there[:12] - np.asarray(second.valid[image, :12])
        assert set(dropped) == {0.0, 1.0}
        own = np.asarray(first.tokens[image], np.float64)
        score = reference_scores(own, there, weights["stage_1"], 2, False)[:12]
        package = (dropped * score) @ own[:12] / (dropped * score).sum()
        np.testing.assert_allclose(second.tokens[image, 13], package, atol=1e-5)
        np.testing.assert_array_equal(second.assign[image] == 13, dropped == 1)
    # Of 12 patches 7, then 4, are planned to stay.
    share = second.valid[:, :12].mean(1)
    np.testing.assert_allclose(second.carry["excess"][:, 1], share - 4 / 12, atol=1e-6)


@pytest.mark.slow
def test_masking_in_training_is_packing_at_inference(monkeypatch):
    def highest(key, odds):
        kept = next(counts)
        score = jnp.where(already[-1] > 0, odds[..., 0], -jnp.inf)
        keep = (inverse_index(argtopk(score, kept), score.shape[1]) >= 0).astype(jnp.float32)
        already.append(keep)
        return keep

    model = create_model(
        "vit",
        REDUCERS[False],
        image_size=(24, 32),
        patch_size=8,
        width=16,
        depth=3,
        num_heads=2,
        num_classes=5,
    )
    images = jax.random.normal(jax.random.key(1), (2, 24, 32, 3))
    params = jax.jit(model.init)(jax.random.key(0), images)
    params = {"params": {**params["params"], "reducer": weights_of(REDUCERS[False])}}
    expected, gathered = jax.jit(functools.partial(model.apply, return_info=True))(params, images)

    counts, already = iter([7, 4]), [jnp.ones((2, 12))]
    monkeypatch.setattr(spvit, "gumbel_keep", highest)
    rngs = {"reducer": jax.random.key(0)}
    forward = functools.partial(model.apply, train=True, return_info=True, rngs=rngs)
    logits, info = jax.jit(forward)(params, images)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    # Both name the same packages for the same patches.
    masked, packed = np.asarray(info.assign), np.asarray(gathered.assign)
    np.testing.assert_array_equal(masked == 12, packed == 4)
    np.testing.assert_array_equal(masked == 13, packed == 5)


@pytest.mark.parametrize("gate", [False, True])
def test_weights_come_under_the_originals_names(gate):
    reducer, weights = REDUCERS[gate], weights_of(REDUCERS[gate])
    arrays = {}
    for stage in range(2):
        tree = weights[f"stage_{stage}"]
        for head in range(2):
            for name, path in ORIGINAL.items():
                layer, leaf = path.split("/")
                part, rest = name.split(".", 1)
                value = tree[f"head_{head}"][layer][leaf]
                arrays[f"score_predictor.{stage}.{part}.{head}.{rest}"] = value.T
        if gate:
            for name, layer in (("senet.0", "squeeze"), ("senet.2", "excite")):
                arrays[f"score_predictor.{stage}.{name}.weight"] = tree[layer]["kernel"].T
                arrays[f"score_predictor.{stage}.{name}.bias"] = tree[layer]["bias"]
    jax.tree.map(np.testing.assert_array_equal, reducer.import_weights(arrays), weights)
    with pytest.raises(InputError, match="SPViT"):
        REDUCERS[not gate].import_weights(arrays)


def test_counts_make_room_for_the_packages():
    def outs(**settings):
        return tuple(
            create_model(
                "vit",
                make_reducer("spvit", layers=(1, 2), **settings),
                image_size=64,
                patch_size=8,
                width=16,
                depth=3,
                num_heads=2,
                num_classes=5,
            )
            .schedule[layer]
            .out
            for layer in (1, 2)
        )

    assert outs(keep_rate=0.5) == (32 + 1, 16 + 2)
    assert outs(keep_rate=0.5, round_to=8) == (40, 24)
    assert outs(keep_rate=(1.0, 0.5)) == (64, 32 + 1)
    assert outs(counts=(20, 3)) == (20, 3)
    with pytest.raises(InputError, match="at least 3 tokens at stage 1, 2 of them packages; got 2"):
        outs(counts=(20, 2))


def test_heads_too_small_to_halve_twice_are_refused():
    with pytest.raises(InputError, match="heads of at least 4 channels; got 2"):
        make_reducer("spvit", layers=(1,)).check(
            ViTShape(grid=(2, 2), depth=2, width=8, num_heads=4)
        )
