"""The keep rate's way down: when each phase starts, and which methods can take it."""

import math

import pytest

from tdm_jax import make_reducer
from tdm_jax.errors import InputError
from tdm_jax.reduction import Reducer
from tdm_jax.training.keep_rate_schedule import KeepWarmupConfig, phases


class Stranger(Reducer):
    """A method without stages."""


PAPER = KeepWarmupConfig(start_epoch=10, end_epoch=110)


def test_without_warm_up_there_is_one_phase():
    reducer = make_reducer("tdm", keep_rate=0.7)
    assert phases(KeepWarmupConfig(), reducer, steps_per_epoch=10) == ((0, reducer),)


def test_the_rounded_cosine_stays_within_half_a_step_of_the_true_one():
    reducer = make_reducer("evit", keep_rate=0.5)
    way = phases(PAPER, reducer, steps_per_epoch=100)
    assert len(way) == 8
    assert way[0].start == 0
    assert way[0].keep_rate == 1.0
    assert way[-1].reducer is reducer
    half = 0.5 * 0.5 / 7
    for step in range(0, 12000, 50):
        share = min(max((step / 100 - 10) / 100, 0.0), 1.0)
        true = 1 - 0.5 * (1 - math.cos(math.pi * share)) / 2
        keep_rate = [phase.keep_rate for phase in way if phase.start <= step][-1]
        assert keep_rate == pytest.approx(true, abs=half + 1e-3), step


def test_keep_rates_of_single_stages_fall_side_by_side():
    way = phases(PAPER, make_reducer("topk", keep_rate=(0.9, 0.5, 0.3)), steps_per_epoch=1)
    assert way[0].keep_rate == (1.0, 1.0, 1.0)
    assert way[-1].keep_rate == (0.9, 0.5, 0.3)


def test_a_published_setting_is_reached_by_derived_ones():
    way = phases(PAPER, make_reducer("tdm", keep_rate=0.5, preset="published"), steps_per_epoch=1)
    assert [phase.reducer.decoupling.preset for phase in way] == ["default"] * 7 + ["published"]


def test_a_short_training_skips_phases_and_still_ends_at_its_own():
    reducer = make_reducer("evit", keep_rate=0.5)
    config = KeepWarmupConfig(start_epoch=1, end_epoch=2)
    way = phases(config, reducer, steps_per_epoch=2)
    starts = [phase.start for phase in way]
    assert starts == sorted(set(starts))
    assert way[-1].reducer is reducer


def test_without_reduction_there_is_nothing_to_warm_up_to():
    reducer = make_reducer("none")
    assert phases(PAPER, reducer, steps_per_epoch=1) == ((0, reducer),)


def test_a_method_without_keep_rate_is_refused():
    with pytest.raises(InputError, match="Stranger has no keep rate to warm up"):
        phases(PAPER, Stranger(), steps_per_epoch=1)
    with pytest.raises(InputError, match="has no keep rate"):
        make_reducer("none").at_keep_rate(0.5)


@pytest.mark.parametrize(
    "settings", [{"start_epoch": 5, "end_epoch": 4}, {"start_epoch": -1}, {"schedules": 9}]
)
def test_bad_settings(settings):
    with pytest.raises(InputError, match="keep_warmup"):
        KeepWarmupConfig(**settings)


def test_counts_by_number_neither_warm_up_nor_overrule_another_keep_rate():
    reducer = make_reducer("topk", counts=(30, 20, 10))
    with pytest.raises(InputError, match=r"got counts=\(30, 20, 10\), r=None"):
        phases(PAPER, reducer, steps_per_epoch=10)
    assert reducer.at_keep_rate(0.5) == make_reducer("topk", keep_rate=0.5)
