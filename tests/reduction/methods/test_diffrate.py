"""DiffRate: equal to its original, its published counts, and what weighs its tokens.

With `tdm_jax.reduction.diffrate_counts`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import create_model, make_reducer
from tdm_jax.errors import InputError
from tdm_jax.reduction import ViTShape, plan
from tdm_jax.reduction.diffrate_counts import PUBLISHED, published_counts
from tdm_jax.reduction.methods.diffrate import DiffRate, alike_weight, most_alike

SHAPE = ViTShape((4, 6), 3, 32, 2)
SIZES = {"image_size": (16, 24), "patch_size": 4, "width": 32, "depth": 3, "num_heads": 2}


# Where it drops and merges; the others take a compilation each.
SLOW = ("prune", "merge", "s2.9scaled", "t0.7scaled")
GOLDENS = ["both", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.mark.golden
@pytest.mark.parametrize("name", GOLDENS)
def test_equals_the_original(answer, golden, name):
    expected = golden(f"diffrate_{name}")
    kept = {key: tuple(expected[key].tolist()) for key in ("prune_kept", "merge_kept")}
    logits, info = answer(DiffRate(**kept))
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    assert [n + 1 for n in info.token_counts] == expected["tokens"].tolist()
    # The original's source matrix counts the class token, which only stands for itself.
    source = np.asarray(info.assign)[:, None] == np.arange(info.token_counts[-1])[:, None]
    np.testing.assert_array_equal(source, expected["source"][:, 1:, 1:])
    np.testing.assert_array_equal(info.size, source.sum(axis=2))
    weight = info.carry.get("diffrate/weight", jnp.ones_like(info.size))
    np.testing.assert_allclose(weight, expected["size"][:, 1:, 0], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "published"), [("s2.9scaled", "small_2.9"), ("t0.7scaled", "tiny_0.7")]
)
def test_published_counts_are_carried_to_another_grid_as_the_original_was(golden, name, published):
    expected = golden(f"diffrate_{name}")
    kept = DiffRate(published=published).kept(ViTShape((8, 8), 12, 48, 3))
    assert list(kept.prune) == expected["prune_kept"].tolist()
    assert list(kept.merge) == expected["merge_kept"].tolist()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts_cost_what_they_were_searched_for(name):
    """By the paper's own count: `4nd^2 + 2n^2d` of what enters a block, `8nd^2` of what leaves."""
    assert published_counts(name, 196) == PUBLISHED[name]
    size, budget = name.split("_")
    d = {"tiny": 192, "small": 384, "base": 768}[size]
    shape = ViTShape((14, 14), 12, d, d // 64)
    macs = 196 * 768 * d + 1000 * d
    for block in plan(DiffRate(published=name), shape):
        n, m = block.attention + 1, block.out + 1
        macs += 4 * n * d * d + 2 * n * n * d + 8 * m * d * d
    assert macs / 1e9 == pytest.approx(float(budget), abs=0.06)


def test_a_count_above_what_is_there_does_nothing():
    def counts(**kept):
        return [tuple(block) for block in plan(DiffRate(**kept), SHAPE)]

    everything = (24, 24, 24)
    assert counts(prune_kept=(99, 30, 25)) == [everything] * 3
    assert counts(merge_kept=(25, 11, 20)) == [everything, (24, 10, 10), (10, 10, 10)]
    both = {"prune_kept": (20, 99, 5), "merge_kept": (30, 11, 9)}
    assert counts(**both) == [(24, 19, 19), (19, 10, 10), (10, 4, 4)]


def test_a_dropped_token_takes_its_weight_along():
    reducer = DiffRate(prune_kept=(25, 25, 9), merge_kept=(25, 15, 9))
    model = create_model("vit", reducer, num_classes=3, **SIZES)
    images = jax.random.normal(jax.random.key(0), (2, 16, 24, 3))
    params = jax.jit(model.init)(jax.random.key(1), images)
    _, info = jax.jit(functools.partial(model.apply, return_info=True))(params, images)
    weight, size = info.carry["diffrate/weight"], info.size
    assert weight.shape == size.shape == (2, 8)
    assert (size > 1).any()
    # A token that nothing has joined still counts once; what joins counts at most once itself.
    np.testing.assert_array_equal(weight[size == 1], 1)
    assert (weight <= size + 1e-5).all()


def test_weights_grow_by_how_alike_what_joins_is_and_stay_positive():
    x = jnp.array([[[1.0, 0.0], [-1.0, -1.0]]])
    partner, cosine = most_alike(x, jnp.array([[[3.0, 4.0], [0.0, 1.0]]]))
    np.testing.assert_array_equal(partner, [[0, 1]])
    np.testing.assert_allclose(cosine, [[0.6, -(0.5**0.5)]], rtol=1e-6)
    weight = alike_weight(jnp.array([[2.0, 1.0]]), jnp.array([[1.0, 3.0]]), partner, cosine)
    np.testing.assert_allclose(weight, [[2.6, 1e-6]], rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "shape", "message"),
    [
        ({}, SHAPE, "are of 12 blocks and the model has 3; expected prune_kept or merge_kept"),
        ({"prune_kept": (9, 9)}, SHAPE, "prune_kept must have one number for each of the 3 blocks"),
        ({"merge_kept": (9, 9)}, SHAPE, "merge_kept must have .* 3 blocks; got 2"),
        ({"merge_kept": (9, 9, 1)}, SHAPE, "merge_kept must count the class token and at least"),
        ({"published": "small"}, SHAPE, "unknown DiffRate published 'small'"),
        ({}, ViTShape((2, 2), 12, 8, 2, 0, class_token=False), "expected a class token to go by"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(settings, shape, message):
    with pytest.raises(InputError, match=message) as refused:
        make_reducer("diffrate", **settings).check(shape)
    assert "\n" not in str(refused.value)


def test_it_says_what_stands_in_place_of_a_keep_rate():
    with pytest.raises(InputError, match="no keep rate: expected prune_kept and merge_kept, or"):
        DiffRate().at_keep_rate(0.7)


def test_costs():
    reducer = DiffRate(prune_kept=(25, 20, 20), merge_kept=(25, 20, 16))
    assert reducer.macs(0, 24, SHAPE) == 0
    assert reducer.macs(1, 24, SHAPE) == 24
    assert reducer.macs(2, 19, SHAPE) == 19 + 4 * 15 * 32 + 4 + 15 * 32
