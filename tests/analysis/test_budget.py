"""Methods at one cost: every method of the table, by its own setting."""

import pytest

from tdm_jax import create_model, make_reducer
from tdm_jax.analysis import costs
from tdm_jax.analysis.budget import at_budget
from tdm_jax.analysis.candidate import make_candidates, parse_method
from tdm_jax.errors import InputError
from tdm_jax.reduction import describe_reducer
from tdm_jax.reduction.registry import REDUCERS

NO_SETTING = ("none", "avit", "psvit")


@pytest.fixture(scope="module")
def model():
    return create_model("deit_small_patch16_224")


@pytest.fixture(scope="module")
def whole(model):
    return costs.multiply_adds(model)


@pytest.mark.parametrize("name", sorted(set(REDUCERS) - set(NO_SETTING)))
def test_costs_come_close_and_never_exceed(name, model, whole):
    reducer = make_reducer(name)
    # Published counts and rows and columns come in steps, and ToCom loses few tokens.
    steps, share = (
        {"diffrate": 0.08, "cubist": 0.08, "tocom": 0.05},
        0.8 if name == "tocom" else 0.6,
    )
    macs = int(share * whole)
    solved = at_budget(model, reducer, macs)
    cost = costs.multiply_adds(model.clone(reducer=solved))
    assert (share - steps.get(name, 0.015)) * whole < cost <= macs
    described = describe_reducer(solved)
    assert make_reducer(**described) == solved
    # The next costlier one would not fit.
    costlier = [v for v in reducer.variants(model.shape) if v != solved]
    assert not any(cost < c <= macs for c in (cost_of(model, v) for v in costlier[::7]))


def cost_of(model, reducer):
    try:
        reducer.check(model.shape)
        return costs.multiply_adds(model.clone(reducer=reducer))
    except InputError:
        return 0


def test_the_frozen_preset_has_no_gap_where_its_blocks_change(model, whole):
    frozen = make_reducer("tdm", preset="frozen")
    for share in (0.9, 0.75, 0.65, 0.6, 0.55, 0.5, 0.4):
        solved = at_budget(model, frozen, int(share * whole))
        assert 0.985 * share < cost_of(model, solved) / whole <= share


@pytest.mark.parametrize("name", NO_SETTING)
def test_who_has_no_such_setting_says_so(name, model, whole):
    with pytest.raises(InputError, match="has no setting that decides its cost"):
        at_budget(model, make_reducer(name), whole // 2)


def test_a_budget_below_all_names_the_least(model, whole):
    with pytest.raises(InputError, match=r"ToCom: expected a budget of 2.41 G .* got 1.381 G"):
        at_budget(model, make_reducer("tocom"), int(0.3 * whole))


def test_a_budget_that_reduces_nothing_is_refused(model, whole):
    with pytest.raises(InputError, match=r"below the 4.604 G without reduction; got 4.604 G"):
        at_budget(model, make_reducer("tome"), whole)


def test_candidates_at_budgets(whole):
    made = make_candidates(
        ["deit_small_patch16_224"],
        ["none", "tome", "tdm/preset=published", "diffrate"],
        gmacs=[2.3, 2.9],
        macs_ratios=[0.5],
    )
    assert [c.label for c in made] == [
        "none",
        *(f"tome {budget}" for budget in ("2.3G", "2.9G", "2.302G")),
        *(f"tdm/preset=published {budget}" for budget in ("2.3G", "2.9G", "2.302G")),
        *(f"diffrate {budget}" for budget in ("2.3G", "2.9G", "2.302G")),
    ]
    for candidate in made[1:]:
        assert cost_of(candidate.model, candidate.model.reducer) <= candidate.budget * 1e9
        # The description builds the same method.
        name, settings = parse_method(candidate.row["description"])
        assert make_reducer(name, **settings) == candidate.model.reducer
    assert "description" not in made[0].row
