"""DTEM: equal to its original, at inference and in a step of its training, and what it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import make_reducer
from tdm_jax.analysis import costs
from tdm_jax.errors import InputError
from tdm_jax.ops.distances import cosine_similarity
from tdm_jax.reduction import ViTShape
from tdm_jax.reduction.methods.dtem import SoftTokens, soft_assignment, soft_merge
from tdm_jax.reduction.metrics import project

# Where it merges in some blocks; the others take a compilation each.
GOLDENS = [
    ("rlist", None),
    *(pytest.param(*row, marks=pytest.mark.slow) for row in (("r5", None), ("r3_dim24", 24))),
]


@pytest.mark.golden
@pytest.mark.parametrize(("name", "width"), GOLDENS)
def test_equals_the_original(answer, golden, name, width):
    expected = golden(f"dtem_{name}")
    logits, info = answer(
        make_reducer("dtem", r=tuple(expected["r"].tolist()), metric_width=width), expected
    )
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    assert [n + 1 for n in info.token_counts] == expected["tokens"].tolist()
    np.testing.assert_array_equal(info.size, expected["size"][:, 1:, 0])
    # The original's source matrix counts the class token, which only stands for itself.
    source = np.asarray(info.assign)[:, None] == np.arange(info.token_counts[-1])[:, None]
    np.testing.assert_array_equal(source, expected["source"][:, 1:, 1:])


@pytest.mark.golden
def test_named_layers_take_their_blocks_weights(answer, golden):
    expected = golden("dtem_rlist")
    layers = tuple(np.flatnonzero(expected["r"]).tolist())
    logits, _ = answer(make_reducer("dtem", r=8, layers=layers), expected)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)


@pytest.mark.golden
def test_a_training_step_equals_the_original(golden):
    step = golden("dtemtrain_step")
    x, weight = jnp.array(step["x"][:, 1:]), jnp.array(step["size"][:, 1:])
    metric, r = jnp.array(step["metric"][:, 1:]), int(step["r"])
    similarity = cosine_similarity(metric[:, ::2], metric[:, 1::2])
    np.testing.assert_allclose(similarity, step["scores"], atol=1e-5)
    assignment = jax.jit(soft_assignment, static_argnums=1)(similarity, r)
    np.testing.assert_allclose(assignment, step["assign"], atol=1e-4)
    merge = jax.jit(soft_merge, static_argnums=(2, 3))
    after = merge(SoftTokens(x, weight), similarity, r, 64)
    np.testing.assert_allclose(after.x, step["x_out"][:, 1:], atol=2e-4)
    np.testing.assert_allclose(after.weight, step["size_out"][:, 1:], atol=1e-4)
    assert int(step["n_out"]) == 65 - r


def test_a_training_step_keeps_the_patches_and_what_takes_no_part():
    draw = np.random.default_rng(0)
    x, metric = draw.standard_normal((2, 1, 9, 4)).astype(np.float32)
    tokens = SoftTokens(jnp.array(x), jnp.ones((1, 9)))
    similarity = cosine_similarity(jnp.array(metric[:, :7:2]), jnp.array(metric[:, 1:7:2]))
    after = jax.jit(lambda t: soft_merge(t, similarity, 2, 7))(tokens)
    np.testing.assert_allclose(after.weight.sum(), 9, rtol=1e-5)
    np.testing.assert_array_equal(after.x[:, 7:], x[:, 7:])
    assert (np.diff(after.weight[0, :7]) <= 0).all()


def test_a_training_step_teaches_the_projection_alone():
    draw = np.random.default_rng(1)
    x = jnp.array(draw.standard_normal((2, 8, 4)), jnp.float32)
    weights = {"kernel": jnp.array(draw.standard_normal((4, 3)), jnp.float32), "bias": jnp.zeros(3)}

    def loss(weights, normed):
        metric = project(normed, weights)
        similarity = cosine_similarity(metric[:, ::2], metric[:, 1::2])
        after = soft_merge(SoftTokens(x, jnp.ones((2, 8))), similarity, 3, 8)
        return (after.x**2).sum()

    learned, through = jax.jit(jax.grad(loss, argnums=(0, 1)))(weights, x)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in learned.values())
    np.testing.assert_array_equal(through, 0)


def test_a_network_in_training_merges_softly_and_teaches_the_projections(tiny_model):
    model, variables = tiny_model("dtem", r=4)
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))

    def loss(params, train):
        logits, info = model.apply({"params": params}, images, train=train, return_info=True)
        return (logits**2).sum(), info

    params = jax.tree.map(jnp.asarray, variables["params"])
    grad = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    gradient, info = grad(params, True)
    learned = gradient["reducer"]
    assert set(learned) == {"stage_0", "stage_1", "stage_2"}
    # Behind the last attention nothing that the head reads depends on a merge.
    for leaf in jax.tree.leaves([learned["stage_0"], learned["stage_1"]]):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0
    # All tokens stay, those that stand for most in front; no patch is lost.
    assert info.token_counts == (16, 16, 16)
    np.testing.assert_allclose(info.size.sum(axis=1), 16, rtol=1e-3)
    assert (np.diff(info.size[:, :8]) <= 1e-5).all()
    assert sorted(np.asarray(info.assign)[0].tolist()) == list(range(16))
    # Inference merges hard, and its choice has no gradient.
    gradient, info = grad(params, False)
    assert info.token_counts == (12, 8, 4)
    for leaf in jax.tree.leaves(gradient["reducer"]):
        np.testing.assert_array_equal(leaf, 0)


def test_its_cost_is_tomes_with_another_metric():
    settings = {"image_size": 32, "patch_size": 8, "width": 24, "num_heads": 2, "num_classes": 5}
    model = {**settings, "depth": 2}
    own, tome = (costs.count("vit", make_reducer(name, r=4), **model) for name in ("dtem", "tome"))
    tokens = 17 + 13
    assert own.macs - tome.macs == tokens * 24 * 12 - tokens * 12
    assert own.parameters - tome.parameters == 2 * (24 * 12 + 12)


def test_limits():
    assert make_reducer("dtem").metric.width(ViTShape((4, 4), 2, 1024, 16)) == 128
    with pytest.raises(InputError, match="DTEM: metric_width must be at least 1; got 0"):
        make_reducer("dtem", metric_width=0)
    with pytest.raises(InputError, match="DTEM: r must be at most half of the 10 patches; got 6"):
        make_reducer("dtem", r=6).check(ViTShape((1, 10), 4, 8, 2))
