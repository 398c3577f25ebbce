"""Evo-ViT: equal to its original; what waits comes back, and what is merged comes back changed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import create_model, make_reducer
from tdm_jax.errors import InputError
from tdm_jax.reduction import BlockContext, ViTShape, plan
from tdm_jax.reduction.contract import Attention
from tdm_jax.reduction.token_state import TokenKind, TokenState

SHAPE = ViTShape(grid=(2, 6), depth=6, width=8, num_heads=2)


class Row(Attention):
    """An attention that only knows its class row."""

    def __init__(self, row):
        self.row = jnp.asarray(row)

    def class_row(self):
        return self.row


def context(layer):
    return BlockContext(layer=layer, shape=SHAPE, train=False, weights={})


@pytest.fixture
def start():
    """Tokens at the door of a stage, whose importance falls from patch 0 to patch 11."""
    prefix, tokens = (
        jax.random.normal(jax.random.key(i), (2, n, SHAPE.width)) for i, n in ((0, 1), (1, 12))
    )
    attention = jnp.broadcast_to(jnp.linspace(0.2, 0.01, 12), (2, 12))
    return TokenState.start(prefix, tokens, keep_dropped=True).replace(
        carry={"attention": attention}
    )


@pytest.mark.golden
@pytest.mark.parametrize("keep_rate", [0.5, 0.7])
def test_equals_the_original(golden, answer, keep_rate):
    logits, info = answer(make_reducer("evovit", keep_rate=keep_rate))
    np.testing.assert_allclose(logits, golden(f"evovit_keep{keep_rate}")["logits"], atol=1e-4)
    updated = int(64 * keep_rate)
    stage = (updated,) * 3 + (64,)
    assert info.token_counts == (64,) * 4 + stage * 2


def test_schedule_returns_to_all_patches_when_a_stage_ends():
    attention = [
        b.attention
        for b in plan(make_reducer("evovit", keep_rate=(0.5, 0.75), layers=(1, 4)), SHAPE)
    ]
    assert attention == [12, 6, 6, 6, 9, 9]
    out = [b.out for b in plan(make_reducer("evovit", keep_rate=0.5, layers=(1, 2)), SHAPE)]
    assert out == [12, 12, 6, 6, 6, 12]


def test_what_waits_comes_back_as_it_was(start):
    reducer = make_reducer("evovit", keep_rate=0.25, layers=(2, 4))
    stage = reducer.before_block(start, context(2))
    np.testing.assert_array_equal(stage.tokens, start.tokens[:, :3])
    assert (stage.assign[:, 3:] == -1).all()

    same = reducer.after_block(stage, context(2))
    assert same.count == 3
    back = reducer.after_block(stage.replace(tokens=stage.tokens + 1), context(3))
    np.testing.assert_array_equal(back.tokens[:, :3], start.tokens[:, :3] + 1)
    np.testing.assert_array_equal(back.tokens[:, 3:], start.tokens[:, 3:])
    np.testing.assert_array_equal(back.assign, start.assign)
    assert (back.size == 1).all()
    assert set(back.carry) == {"attention"}


def test_global_attention_averages_where_a_patch_is_updated(start):
    reducer = make_reducer(
        "evovit", keep_rate=0.25, layers=(2, 4), tradeoff=(0.5, 0.5, 0.25, 0.5, 0.5, 0.5)
    )
    first = reducer.after_attention(
        start.replace(carry={}), context(0).replace(attention=Row(np.full((2, 2, 12), 0.1)))
    )
    np.testing.assert_allclose(first.carry["attention"], np.full((2, 12), 0.2), rtol=1e-6)

    stage = reducer.before_block(start, context(2))
    row = np.stack([np.full((2, 3), 0.3), np.full((2, 3), 0.1)], axis=1)  # two heads
    after = reducer.after_attention(stage, context(2).replace(attention=Row(row)))
    expected = np.array(start.carry["attention"])
    expected[:, :3] = 0.75 * expected[:, :3] + 0.25 * 0.4
    np.testing.assert_allclose(after.carry["attention"], expected, rtol=1e-6)


def test_head_reads_the_mean_of_the_patches(start):
    mean = make_reducer("evovit").finish(start, SHAPE).prefix
    np.testing.assert_allclose(mean[:, 0], start.tokens.mean(axis=1), atol=1e-6)
    np.testing.assert_array_equal(
        make_reducer("evovit", head="class").finish(start, SHAPE).prefix, start.prefix
    )


@pytest.mark.slow
def test_merged_patches_come_back_with_the_change_of_their_token(start):
    reducer = make_reducer("evovit+tdm", keep_rate=0.5, layers=(2, 4))
    stage = reducer.before_block(start, context(2))
    assert stage.count == 6
    assert (stage.assign >= 0).all()  # nothing is left out
    np.testing.assert_allclose(stage.size.sum(axis=1), 12)
    assert (stage.kind == TokenKind.CLUSTER).any()

    change = jax.random.normal(jax.random.key(2), stage.tokens.shape)
    back = reducer.after_block(stage.replace(tokens=stage.tokens + change), context(3))
    for b in range(2):
        for patch in range(12):
            expected = start.tokens[b, patch] + change[b, stage.assign[b, patch]]
            np.testing.assert_allclose(back.tokens[b, patch], expected, atol=1e-5)


@pytest.mark.slow
def test_keep_rate_1_only_changes_the_head():
    sizes = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 3, "num_heads": 2}
    plain = create_model("vit", num_classes=3, **sizes)
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    params = plain.init(jax.random.key(1), images)
    same = plain.clone(reducer=make_reducer("evovit", keep_rate=1.0, layers=(1, 2), head="class"))
    np.testing.assert_allclose(same.apply(params, images), plain.apply(params, images), atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": "mena"}, "did you mean 'mean'"),
        ({"tradeoff": 1.5}, r"tradeoff must be in \[0, 1\]; got 1.5"),
        ({"tradeoff": (0.5, 0.5), "layers": (1, 2)}, "each of the 6 blocks; got 2"),
        ({"layers": (0, 2)}, "expected layers from 1"),
        ({"keep_rate": 0.0}, "keep_rate must be in"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        make_reducer("evovit", **settings).check(SHAPE)


def test_needs_a_class_token():
    with pytest.raises(InputError, match="expected a class token"):
        make_reducer("evovit", layers=(1,)).check(
            ViTShape((2, 6), 6, 8, 2, prefix=0, class_token=False)
        )
