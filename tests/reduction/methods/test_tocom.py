"""ToCom: equal to its original, by its hook and folded; no correction where r is the source's.

With `tdm_jax.models.folding`.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from tdm_jax import create_model, make_reducer
from tdm_jax.errors import InputError
from tdm_jax.models.folding import fold
from tdm_jax.reduction import ViTShape
from tdm_jax.reduction.elastic import drawn_pair
from tdm_jax.reduction.methods.tocom import ToCom

SHAPE = ViTShape((4, 4), 2, 16, 2)
SIZES = {"image_size": (16, 16), "patch_size": 4, "width": 16, "depth": 2, "num_heads": 2}
IMAGES = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))


# Fewer merges than the source, and more; those take a compilation each for the same lines of code.
GOLDENS = [(3, 5), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((5, 0), (0, 4)))]


@pytest.mark.golden
@pytest.mark.parametrize(("r", "source"), GOLDENS)
def test_equals_the_original(answer, golden, r, source):
    expected = golden(f"tocom_tgt{r}_src{source}")
    settings = {"scale": float(expected["scale"]), "dim": int(expected["dim"])}
    logits, info = answer(ToCom(r=r, source_r=source, **settings), expected)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    assert [n + 1 for n in info.token_counts] == expected["tokens"].tolist()
    if r:
        np.testing.assert_array_equal(info.size, expected["size"][:, 1:, 0])
        source = np.asarray(info.assign)[:, None] == np.arange(info.token_counts[-1])[:, None]
        np.testing.assert_array_equal(source, expected["source"][:, 1:, 1:])


def random_model(**settings):
    model = create_model("vit", make_reducer("tocom", **settings), num_classes=3, **SIZES)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.3 * draw.standard_normal(x.shape, np.float32), shapes)
    return model, params


def test_folded_it_is_tome_and_answers_the_same():
    model, params = random_model(r=3, source_r=1, dim=16, scale=1.0)
    folded, others = fold(model, params)
    assert folded == model.clone(reducer=make_reducer("tome", r=3))
    assert "reducer" in params["params"]
    assert "reducer" not in others["params"]
    apply = jax.jit(lambda m, p: m.apply(p, IMAGES), static_argnums=0)
    corrected = apply(model, params)
    np.testing.assert_allclose(apply(folded, others), corrected, atol=1e-5)
    plain = {"params": {k: v for k, v in params["params"].items() if k != "reducer"}}
    assert np.abs(apply(folded, plain) - corrected).max() > 1e-3
    assert fold(folded, others) == (folded, others)


def test_at_the_source_it_is_tome():
    model, params = random_model(r=3, source_r=3, dim=16)
    tome = model.clone(reducer=make_reducer("tome", r=3))
    apply = jax.jit(lambda m, p: m.apply(p, IMAGES), static_argnums=0)
    np.testing.assert_array_equal(apply(model, params), apply(tome, params))
    assert model.reducer.macs(0, 16, SHAPE) == make_reducer("tome", r=3).macs(0, 16, SHAPE)


def test_fresh_weights_correct_nothing_and_can_learn():
    model = create_model("vit", ToCom(r=3, dim=16), num_classes=3, **SIZES)
    params = jax.jit(model.init)(jax.random.key(1), IMAGES)
    tome = model.clone(reducer=make_reducer("tome", r=3))

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.grad, argnums=1, has_aux=True)
    def gradient_of(model, params):
        out = model.apply(params, IMAGES)
        return (out**2).sum(), out

    gradient, out = gradient_of(model, params)
    np.testing.assert_allclose(out, jax.jit(tome.apply)(params, IMAGES), atol=1e-6)
    up = gradient["params"]["reducer"]["stage_0"]["v"]["up"]["kernel"]
    # Of the 16 channels between the maps, the last 3 are switched on.
    assert (np.abs(up).max(axis=1) > 0).tolist() == [False] * 13 + [True] * 3


@functools.cache
def in_training():
    """A network's answers to a key in training, and its teacher's."""
    model, params = random_model(r=3, source_r=1, dim=16, scale=1.0)
    teacher = model.clone(reducer=model.reducer.of_teacher())

    @jax.jit
    def answers(params, key):
        student = model.apply(params, IMAGES, train=True, rngs={"reducer": key})
        return student, teacher.apply(params, IMAGES, rngs={"reducer": key})

    return model, params, answers


@pytest.mark.parametrize("seed", [0, 1])
def test_in_training_any_pair_answers_as_it_does_at_inference(seed):
    model, params, answers = in_training()
    key = jax.random.key(seed)
    student, teacher = answers(params, key)
    stem = nn.apply(lambda m: m.make_rng("reducer"), model)({}, rngs={"reducer": key})
    r, source = (int(x) for x in drawn_pair(stem, 8))
    assert r != source
    own = model.clone(reducer=ToCom(r=r, source_r=source, dim=16, scale=1.0))
    tome = model.clone(reducer=make_reducer("tome", r=source))
    np.testing.assert_allclose(teacher, jax.jit(tome.apply)(params, IMAGES), atol=1e-5)
    np.testing.assert_allclose(student, jax.jit(own.apply)(params, IMAGES), atol=1e-5)


def test_training_needs_a_key():
    model, params, _ = in_training()
    with pytest.raises(InputError, match="ToCom draws in training: expected rngs="):
        model.apply(params, IMAGES, train=True)


def test_channels_that_are_switched_on():
    assert ToCom(r=5, source_r=0).channels == (22, 32)
    assert ToCom(r=3, source_r=5).channels == (22, 26)
    assert ToCom(r=4, source_r=4).channels == (24, 24)


def test_costs():
    reducer = ToCom(r=5, source_r=3)
    own = 2 * 4 * 16 * 17
    assert reducer.macs(0, 16, SHAPE) == own + make_reducer("tome", r=5).macs(0, 16, SHAPE)
    assert dataclasses.replace(reducer, r=3).folded() == make_reducer("tome", r=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 17}, "r must be from 0 to 16; got 17"),
        ({"source_r": -1}, "source_r must be from 0 to 16; got -1"),
        ({"dim": 24}, "dim must be a positive multiple of 16; got 24"),
        ({"r": 9}, "r must be at most half of the 16 patches; got 9"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(settings, message):
    with pytest.raises(InputError, match=message) as refused:
        make_reducer("tocom", **settings).check(SHAPE)
    assert "\n" not in str(refused.value)


def test_weights_of_another_width_between_the_maps_are_refused(answer, golden):
    with pytest.raises(InputError, match=r"misshapen: reducer/stage_\S*/down/kernel"):
        answer(ToCom(r=5, dim=16), golden("tocom_tgt5_src0"))
    with pytest.raises(InputError, match="ToCom: expected weights blocks"):
        ToCom().import_weights({"blocks.0.attn.q_tocom.adapter_up.weight": np.zeros((4, 4))})


def test_it_says_what_stands_in_place_of_a_keep_rate():
    with pytest.raises(InputError, match="no keep rate: expected r, from 0 to 16; got"):
        ToCom().at_keep_rate(0.7)
