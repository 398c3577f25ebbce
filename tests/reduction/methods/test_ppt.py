"""PPT: equal to its original, where it prunes and where it pools, and its limits."""

import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import make_reducer
from tdm_jax.errors import InputError
from tdm_jax.reduction import BlockContext, ViTShape, plan
from tdm_jax.reduction.contract import Attention
from tdm_jax.reduction.importance import ValueNorm
from tdm_jax.reduction.methods.ppt import spread
from tdm_jax.reduction.token_state import TokenState

# Where some images prune and others pool; the others take a compilation each.
GOLDENS = [
    "mixed_r12",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("prune_r12", "pool_r12", "mixed_r4_all")
    ),
]


@pytest.mark.golden
@pytest.mark.parametrize("name", GOLDENS)
def test_equals_the_original(answer, golden, name):
    expected, info = compared(answer, golden, name, True)
    np.testing.assert_array_equal(info.size, expected["size"][:, 1:, 0])


@pytest.mark.golden
@pytest.mark.slow
def test_without_proportional_attention_equals_the_original(answer, golden):
    # The original forgets the sizes there; ours still count patches.
    compared(answer, golden, "mixed_r12_noprop", False)


def compared(answer, golden, name, proportional):
    expected = golden(f"ppt_{name}")
    reducer = make_reducer(
        "ppt",
        r=int(expected["r"]),
        layers=tuple(expected["layers"].tolist()),
        threshold=float(expected["threshold"]),
        proportional_attention=proportional,
    )
    logits, info = answer(reducer)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    assert [n + 1 for n in info.token_counts] == expected["tokens"].tolist()
    # The original's source matrix counts the class token; what it dropped has no column.
    source = np.asarray(info.assign)[:, None] == np.arange(info.token_counts[-1])[:, None]
    np.testing.assert_array_equal(source, expected["source"][:, 1:, 1:])
    pooled = expected["pooled"]
    for image in range(4):
        assert (np.asarray(info.assign[image]) >= 0).all() == pooled[image].all()
    return expected, info


def test_the_score_and_its_spread_are_the_formula():
    draw = np.random.default_rng(0)
    row, values = draw.random((2, 3, 7)), draw.standard_normal((2, 7, 3, 4))

    class Given(Attention):
        def class_row(self):
            return jnp.array(row, jnp.float32)

        def values(self):
            return jnp.array(values, jnp.float32)

    expected = row.sum(1) * np.linalg.norm(values.reshape(2, 7, 12), axis=-1)
    expected /= expected.sum(-1, keepdims=True)
    shape = ViTShape((1, 7), 4, 12, 3)
    context = BlockContext(layer=3, shape=shape, train=False, weights={}, attention=Given())
    state = TokenState.start(jnp.zeros((2, 1, 12)), jnp.zeros((2, 7, 12)))
    score = ValueNorm().measure(state, context, {})
    np.testing.assert_allclose(score, expected, rtol=1e-5)
    np.testing.assert_allclose(spread(score), expected.var(axis=-1, ddof=1), rtol=1e-4)


def test_limits():
    shape = ViTShape((1, 10), 12, 8, 2)
    blocks = plan(make_reducer("ppt", r=5), shape)
    assert [blocks[layer].out for layer in (3, 6, 9)] == [5, 3, 2]
    with pytest.raises(InputError, match="PPT: a stage merges at most half of its 10 tokens"):
        plan(make_reducer("ppt", keep_rate=0.3), shape)
    with pytest.raises(InputError, match="PPT: threshold must be at least 0; got -1"):
        make_reducer("ppt", threshold=-1)
    with pytest.raises(InputError, match="PPT: expected a class token to go by"):
        make_reducer("ppt").check(ViTShape((1, 10), 12, 8, 2, 0, class_token=False))
