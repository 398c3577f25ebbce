"""The table of methods: every name, with what is given and what is not, and back again."""

import dataclasses
import json

import pytest

from tdm_jax.errors import InputError
from tdm_jax.reduction import (
    REDUCERS,
    Reducer,
    StageReducer,
    describe_reducer,
    list_reducers,
    make_reducer,
)
from tdm_jax.reduction.registry import setting_names

STAGED = [name for name in list_reducers() if isinstance(make_reducer(name), StageReducer)]


def again(reducer):
    return make_reducer(**json.loads(json.dumps(describe_reducer(reducer))))


def test_the_list_has_the_table_and_what_tdm_makes_of_it():
    names = list_reducers()
    assert names[: len(REDUCERS)] == list(REDUCERS)
    assert {"tdm", "evit+tdm", "dyvit+tdm"} <= set(names)
    assert "tome+tdm" not in names


@pytest.mark.parametrize("name", list_reducers())
def test_none_is_the_default_of_every_setting(name):
    assert make_reducer(name, **dict.fromkeys(setting_names(name))) == make_reducer(name)


@pytest.mark.parametrize("name", list_reducers())
def test_a_description_makes_the_same_reducer(name):
    reducer = make_reducer(name)
    assert again(reducer) == reducer
    assert again(reducer).title == reducer.title


@pytest.mark.parametrize("name", STAGED)
@pytest.mark.parametrize(
    "settings",
    [
        {"keep_rate": 0.6, "layers": "all"},
        {"keep_rate": (0.9, 0.7), "layers": (2, 5)},
        {"counts": (9, 5), "layers": (2, 5)},
        {"r": 2, "ramp": "decreasing", "round_to": 2, "layers": (2, 5)},
    ],
)
def test_a_description_holds_the_schedule(name, settings):
    reducer = make_reducer(name, **settings)
    assert again(reducer) == reducer


def test_a_description_leaves_out_the_keep_rate_that_counts_overrule():
    reducer = make_reducer("topk", keep_rate=0.5)
    reducer = reducer.scheduled(dataclasses.replace(reducer.schedule, counts=(9, 5, 3)))
    assert describe_reducer(reducer) == {"name": "topk", "counts": [9, 5, 3]}
    slots = make_reducer("ats", keep_rate=0.5, counts=(9, 5, 3))
    assert again(slots) == slots


def test_another_keep_rate_leaves_everything_else():
    reducer = make_reducer("tdm", preset="published", keep_rate=0.7, layers=(1, 2))
    other = make_reducer("tdm", preset="published", keep_rate=0.5, layers=(1, 2))
    assert reducer.at_keep_rate(0.5) == other
    with pytest.raises(InputError, match=r"has keep rates 0\.7, .*; got 0\.65"):
        reducer.at_keep_rate(0.65)


def test_who_asks_for_tdm_reads_tdm():
    with pytest.raises(InputError, match="^TDM: layers must be"):
        make_reducer("tdm", layers=(2, 1))
    assert make_reducer("evit+tdm").title == "EViT with TDM"


def test_a_method_outside_the_table_has_no_description():
    class Stranger(Reducer):
        """Known to nobody."""

    with pytest.raises(InputError, match="Stranger has no name"):
        describe_reducer(Stranger())
