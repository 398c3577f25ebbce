"""Schedules: what each setting means in tokens, and what is refused.

With `tdm_jax.reduction.stages` and `tdm_jax.reduction.schedules`.
"""

import numpy as np
import pytest

from tdm_jax import create_model, make_reducer
from tdm_jax.errors import InputError
from tdm_jax.reduction import StageReducer, ViTShape, list_reducers, plan
from tdm_jax.reduction.schedules import removals

SHAPE = ViTShape((10, 10), 4, 32, 2)


def tokens(name="topk", shape=SHAPE, **settings):
    return [b.out for b in plan(make_reducer(name, **{"layers": (1, 3), **settings}), shape)]


def test_keep_rates():
    assert tokens(keep_rate=0.7) == [100, 70, 70, 49]
    assert tokens(keep_rate=(0.5, 0.9)) == [100, 50, 50, 45]
    # By the start, not by what is left: floors of the product.
    assert tokens("dpcknn", keep_rate=0.7) == [100, 70, 70, 49]
    assert tokens("dpcknn", keep_rate=(0.55, 0.9)) == [100, 55, 55, 49]
    assert tokens(keep_rate=1.0) == [100] * 4


def test_where_a_stage_stands_in_its_block():
    between = plan(make_reducer("topk", keep_rate=0.5, layers=(1,)), SHAPE)
    assert between[1] == (100, 50, 50)
    before = plan(make_reducer("dpcknn", keep_rate=0.5, layers=(1,)), SHAPE)
    assert before[1] == (50, 50, 50)


@pytest.mark.parametrize("name", ["random", "topk", "evit", "tdm", "evit+tdm", "tome", "dpcknn"])
def test_counts_are_taken_as_they_are(name):
    assert tokens(name, counts=(57, 31)) == [100, 57, 57, 31]
    assert tokens(name, counts=(90, 80, 70, 50), layers="all") == [90, 80, 70, 50]


@pytest.mark.parametrize("name", ["topk", "tdm", "tome", "sit"])
def test_a_number_to_remove(name):
    assert tokens(name, r=20) == [100, 80, 80, 60]
    assert tokens(name, r=(30, 10)) == [100, 70, 70, 60]
    assert tokens(name, r=10, layers="all", ramp="decreasing") == [80, 67, 61, 61]
    assert tokens(name, r=10, layers="all", ramp="increasing") == [100, 94, 81, 61]


def test_ramps_remove_the_same_in_all():
    for ramp in ("constant", "increasing", "decreasing"):
        assert abs(sum(removals(8, ramp, 12)) - 96) <= 6
    assert removals(8, "decreasing", 12) == removals(8, "increasing", 12)[::-1]
    assert removals(5, "decreasing", 1) == (5,)


def test_the_last_token_stays():
    assert tokens(r=99, layers="all") == [1, 1, 1, 1]
    assert tokens(keep_rate=0.01) == [100, 1, 1, 1]


@pytest.mark.parametrize("name", ["topk", "evit", "tdm", "evit+tdm", "dpcknn"])
def test_rounding_goes_up_to_a_multiple(name):
    assert tokens(name, keep_rate=0.7, round_to=8)[1] == 72
    assert tokens(name, keep_rate=0.99, round_to=64)[1] == 100


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_rate": 0.0}, r"keep_rate must be in \(0, 1\]; got 0\.0"),
        ({"keep_rate": 1.1}, r"keep_rate must be in \(0, 1\]; got 1\.1"),
        (
            {"keep_rate": (0.5, 0.5)},
            "keep_rate must have one number for each of the 3 layers; got 2",
        ),
        ({"counts": (5, 3)}, "counts must have one number for each of the 3 layers; got 2"),
        ({"r": (5, 3)}, "r must have one number for each of the 3 layers; got 2"),
        (
            {"layers": (6, 3)},
            r"ascending block indices from 0, or one of .*'all', .*'quarters', .*; got \(6, 3\)",
        ),
        (
            {"layers": (-1, 3)},
            r"ascending block indices from 0, or one of .*'all', .*'quarters', .*; got \(-1, 3\)",
        ),
        ({"counts": (5, 6, 3)}, r"must not rise; got \(5, 6, 3\)"),
        ({"counts": (5, 3, 0)}, "counts must be at least 1"),
        ({"r": -1}, "r must be at least 0; got -1"),
        ({"ramp": "falling"}, "expected one of: constant, decreasing, increasing"),
        ({"round_to": 0}, "round_to must be at least 1; got 0"),
        (
            {"counts": (5, 3, 2), "r": 3},
            "expected one of keep_rate, counts, r and ratio; got counts, r",
        ),
        (
            {"keep_rate": 0.5, "r": 3},
            "expected one of keep_rate, counts, r and ratio; got keep_rate, r",
        ),
        ({"keep": 0.5}, "did you mean 'keep_rate'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        make_reducer("topk", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": (2, 4)}, r"within the 4 blocks 0\.\.3; got \(2, 4\)"),
        ({"layers": (1,), "counts": (101,)}, r"at most the 100 patches; got \(101,\)"),
        ({"layers": (1,), "r": 100}, "r must be below the 100 patches; got 100"),
        ({"layers": "all", "counts": (50, 40)}, "one number for each of the 4 layers; got 2"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_at_construction(settings, message):
    with pytest.raises(InputError, match=message):
        create_model(
            "vit",
            make_reducer("topk", **settings),
            image_size=40,
            patch_size=4,
            width=8,
            depth=4,
            num_heads=2,
            num_classes=2,
        )


STAGED = [name for name in list_reducers() if isinstance(make_reducer(name), StageReducer)]


@pytest.mark.parametrize("name", STAGED)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_rate": 0.0}, r"keep_rate must be in \(0, 1\]; got 0\.0"),
        ({"keep_rate": 1.5}, r"keep_rate must be in \(0, 1\]; got 1\.5"),
        (
            {"layers": (2, 1)},
            r"ascending block indices from 0, or one of .*'all', .*'quarters', .*; got \(2, 1\)",
        ),
        ({"layers": (1, 4)}, r"layers must lie within the 4 blocks 0\.\.3; got \(1, 4\)"),
        ({"layers": (1,), "counts": (101,)}, r"at most the 100 patches; got \(101,\)"),
    ],
)
def test_every_method_refuses_a_bad_schedule_before_it_runs(name, settings, message):
    with pytest.raises(InputError, match=message):
        make_reducer(name, **settings).check(SHAPE)


def test_unknown_methods_and_weights():
    with pytest.raises(InputError, match="did you mean 'tome'"):
        make_reducer("tomee")
    with pytest.raises(InputError, match="TopK has no weights of its own; got a"):
        make_reducer("topk").import_weights({"a": np.zeros(1)})
