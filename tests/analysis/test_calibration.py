"""Calibration: exact where all fit, smaller where fewer need to, and plain enough for JSON."""

import json

import jax
import numpy as np
import pytest

from tdm_jax import calibrate, create_model, describe_reducer, make_reducer
from tdm_jax.checkpoint import describe, load_model, save_model
from tdm_jax.errors import InputError
from tdm_jax.reduction.methods.avit import AViT

SIZES = {"image_size": (32, 24), "patch_size": 8, "width": 16, "depth": 3, "num_heads": 2}
IMAGES = jax.random.normal(jax.random.key(0), (12, 32, 24, 3))
BATCHES = [IMAGES[:6], IMAGES[6:]]
REDUCERS = {
    "ats": make_reducer("ats", keep_rate=0.8, layers=(0, 1)),
    "avit": AViT(scale=4.0, center=2.0),
    "psvit": make_reducer("psvit", tolerance=0.3),
}


@pytest.fixture(scope="module")
def params():
    params = create_model("vit", num_classes=3, **SIZES).init(jax.random.key(1), IMAGES)
    # Fresh weights attend almost evenly; images should differ.
    return jax.tree.map(lambda x: 20 * x if x.ndim > 1 else x, params)


def model(reducer):
    return create_model("vit", reducer, num_classes=3, **SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ats", "avit"])
def test_exact_on_its_data_where_all_tokens_fit(name, params):
    adaptive = model(REDUCERS[name])
    expected = jax.jit(adaptive.apply)(params, IMAGES)
    fixed = adaptive.clone(reducer=calibrate(adaptive, params, BATCHES, quantile=1.0))
    assert sum(b.attention for b in fixed.schedule) < sum(b.attention for b in adaptive.schedule)
    np.testing.assert_allclose(jax.jit(fixed.apply)(params, IMAGES), expected, atol=1e-5)


def slots(reducer):
    """The counts of an adaptive method, which are its schedule's or, of every block, its own."""
    return reducer.counts if isinstance(reducer, AViT) else reducer.schedule.counts


@pytest.mark.parametrize("name", ["ats", "avit"])
def test_counts_are_the_quantile_of_what_the_images_need(name, params):
    adaptive = model(REDUCERS[name])
    _, info = jax.jit(lambda p, x: adaptive.apply(p, x, return_info=True))(params, IMAGES)
    stages = info.stages if name == "ats" else info.stages[:-1]
    needed = [np.sort((s.size > 0).sum(axis=1)) for s in stages]
    assert needed[-1][0] < needed[-1][-1]
    half = calibrate(adaptive, params, BATCHES, quantile=0.5)
    for count, each in zip(slots(half), needed, strict=True):
        assert (each <= count).mean() >= 0.5
        assert (each < count).mean() <= 0.5
    # Again from what is calibrated: the counts are measured anew.
    again = calibrate(model(half), params, BATCHES, quantile=1.0)
    assert slots(again) == tuple(int(each[-1]) for each in needed)


@pytest.mark.slow
def test_patch_slimming_keeps_the_class_token_near(params):
    whole = model(REDUCERS["psvit"])
    expected = whole.apply(params, IMAGES)
    errors, sizes = [], []
    for tolerance in (0.02, 0.3):
        slim = model(make_reducer("psvit", tolerance=tolerance))
        slim = slim.clone(reducer=calibrate(slim, params, BATCHES))
        sizes.append(sum(len(kept) for kept in slim.reducer.sets))
        errors.append(float(np.abs(slim.apply(params, IMAGES) - expected).max()))
    assert sizes[1] < sizes[0]
    assert errors[0] < errors[1]


def test_patch_slimming_runs_the_blocks_as_the_model_does():
    # 16 * 2.1 channels: the model rounds them up.
    slim = create_model("vit", REDUCERS["psvit"], num_classes=3, mlp_ratio=2.1, **SIZES)
    params = slim.init(jax.random.key(1), IMAGES)
    assert len(calibrate(slim, params, BATCHES).sets) == 4


@pytest.mark.parametrize("name", REDUCERS)
def test_result_survives_json(name, params):
    reducer = calibrate(model(REDUCERS[name]), params, BATCHES[:1])
    description = json.loads(json.dumps(describe_reducer(reducer)))
    assert description["name"] == name
    assert make_reducer(**description) == reducer


def test_result_is_saved_with_a_checkpoint(params, tmp_path):
    adaptive = model(REDUCERS["avit"])
    fixed = adaptive.clone(reducer=calibrate(adaptive, params, BATCHES[:1]))
    described = {**describe(fixed), "reducer": describe_reducer(fixed.reducer)}
    save_model(tmp_path / "calibrated", described, params)
    config, _ = load_model(tmp_path / "calibrated")
    assert create_model(**config).reducer == fixed.reducer


def test_bad_input(params):
    with pytest.raises(InputError, match=r"quantile must be in \(0, 1\]; got 0"):
        calibrate(model(REDUCERS["ats"]), params, BATCHES, quantile=0)
    with pytest.raises(InputError, match="TopK keeps as many tokens of every image"):
        calibrate(model(make_reducer("topk", layers=(1,))), params, BATCHES)
    with pytest.raises(InputError, match="expected an adaptive method"):
        calibrate(model(make_reducer("ats+tdm", layers=(1,))), params, BATCHES)
    with pytest.raises(InputError, match="at least one batch"):
        calibrate(model(REDUCERS["ats"]), params, [])
